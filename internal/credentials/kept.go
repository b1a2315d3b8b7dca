// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob/registry"
)

// The file of a [Kept] has two slots. A change is written to the one that is not
// in use, with the next sequence number, and then the other is emptied: whenever
// the writer is killed, at least one of them is whole.
//
//	magic     8 bytes
//	sequence  8 bytes, big endian
//	length    8 bytes, of the content
//	sum       SHA-256 of all other bytes of the slot
//	content   JSON, a list of entries
const (
	slots      = 2
	slotSize   = 2 << 20
	headerSize = 24 + sha256.Size
	maxContent = slotSize - headerSize
	magic      = "HFKEPT01"

	// maxSecret bounds credentials in bytes; the largest tokens in use have a few thousand.
	maxSecret = 64 << 10
)

// Kept are the credentials that pulls brought, by the image's reference. They
// are in memory only, and outlive this process if their file does, which a
// parent process holds open. It may be used by several goroutines at once, but
// by one process at a time. However it is printed, it shows nothing.
//
// The methods of a nil *Kept keep nothing.
type Kept struct {
	file *os.File // nil: none

	mu       sync.Mutex // protects the fields below, and writing to file
	sequence uint64     // of the slot in use, which is sequence % slots
	entries  []entry    // the oldest first
}

type entry struct {
	reference   string
	credentials registry.Credentials
}

// NewMemfd makes a file in memory for [OpenKept]. It is closed on exec unless it
// is passed on.
func NewMemfd() (*os.File, error) {
	fd, err := unix.MemfdCreate("holdfast-credentials", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("creating a file in memory for credentials: %w", err)
	}
	return os.NewFile(uintptr(fd), "holdfast-credentials"), nil
}

// OpenKept returns what is kept in a file: the last change that was completely
// written, nothing if there is none. The file stays the caller's, who closes it
// when the Kept is not used any more; programs that are run do not inherit it.
// Without a file, what is kept ends with the process.
func OpenKept(f *os.File) (*Kept, error) {
	k := &Kept{file: f}
	if f == nil {
		return k, nil
	}
	unix.CloseOnExec(int(f.Fd())) // a parent's is open to the programs that are run here
	for slot := range int64(slots) {
		sequence, entries, err := readSlot(io.NewSectionReader(f, slot*slotSize, slotSize))
		if err != nil {
			return nil, fmt.Errorf("reading kept credentials: %w", err)
		}
		if sequence > k.sequence {
			k.sequence, k.entries = sequence, entries
		}
	}
	return k, nil
}

// Put keeps the credentials for an image, in place of those that were kept for
// it. If there is no room, those go that were put first. An error means that the
// next process will not have them, or that they are too large to be kept.
func (k *Kept) Put(reference string, c registry.Credentials) error {
	if k == nil || c == (registry.Credentials{}) {
		return nil
	}
	if len(reference)+len(c.Username)+len(c.Password)+len(c.IdentityToken) > maxSecret {
		return fmt.Errorf("keeping credentials for an image: they have more than %d bytes", maxSecret)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if i := k.index(reference); i >= 0 {
		if k.entries[i].credentials == c {
			return nil
		}
		k.entries = slices.Delete(k.entries, i, i+1)
	}
	k.entries = append(k.entries, entry{reference, c})
	return k.write()
}

// Get returns the credentials for an image; ok is false if none are kept.
func (k *Kept) Get(reference string) (c registry.Credentials, ok bool) {
	if k == nil {
		return registry.Credentials{}, false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.index(reference)
	if i < 0 {
		return registry.Credentials{}, false
	}
	return k.entries[i].credentials, true
}

// Forget forgets the credentials for images. An error means that the next
// process may know them again.
func (k *Kept) Forget(references ...string) error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	n := len(k.entries)
	k.entries = slices.DeleteFunc(k.entries, func(e entry) bool { return slices.Contains(references, e.reference) })
	if len(k.entries) == n {
		return nil
	}
	return k.write()
}

func (k *Kept) index(reference string) int {
	return slices.IndexFunc(k.entries, func(e entry) bool { return e.reference == reference })
}

// String shows nothing.
func (k *Kept) String() string { return "kept credentials" }

// GoString shows nothing.
func (k *Kept) GoString() string { return "credentials.Kept{}" }

// MarshalJSON shows nothing.
func (k *Kept) MarshalJSON() ([]byte, error) { return []byte("{}"), nil }

// write writes all entries, or the newest that fit. The caller holds k.mu.
func (k *Kept) write() error {
	if k.file == nil {
		return nil
	}
	content, err := encode(k.entries)
	for err == nil && len(content) > maxContent {
		k.entries = slices.Delete(k.entries, 0, 1+len(k.entries)/8)
		content, err = encode(k.entries)
	}
	if err == nil {
		next := k.sequence + 1
		_, err = k.file.WriteAt(slotOf(next, content), offset(next))
		if err == nil {
			k.sequence = next
			// What was forgotten is gone.
			err = unix.Fallocate(int(k.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset(next+1), slotSize)
		}
	}
	if err != nil {
		return fmt.Errorf("writing kept credentials: %w", err)
	}
	return nil
}

func offset(sequence uint64) int64 { return int64(sequence%slots) * slotSize } //nolint:gosec // 0 or 1

// slotOf is a slot as it is in the file.
func slotOf(sequence uint64, content []byte) []byte {
	head := binary.BigEndian.AppendUint64([]byte(magic), sequence)
	head = binary.BigEndian.AppendUint64(head, uint64(len(content)))
	sum := checksum(head, content)
	return slices.Concat(head, sum[:], content)
}

func checksum(head, content []byte) [sha256.Size]byte {
	return sha256.Sum256(slices.Concat(head, content))
}

// readSlot reads a slot. The sequence number is 0 if it is empty, or not whole.
func readSlot(r io.Reader) (uint64, []entry, error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, unlessShort(err)
	}
	sequence, length := binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint64(head[16:])
	if !bytes.HasPrefix(head[:], []byte(magic)) || length > maxContent {
		return 0, nil, nil
	}
	content := make([]byte, length)
	if _, err := io.ReadFull(r, content); err != nil {
		return 0, nil, unlessShort(err)
	}
	if checksum(head[:24], content) != [sha256.Size]byte(head[24:]) {
		return 0, nil, nil
	}
	entries, err := decode(content)
	if err != nil {
		return 0, nil, nil //nolint:nilerr // nobody wrote this: it counts as nothing
	}
	return sequence, entries, nil
}

// unlessShort is nil for the errors of a file that ends early.
func unlessShort(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// stored is an entry in the file. Bytes are exact in JSON, other than strings.
type stored struct {
	Reference     string
	Username      []byte
	Password      []byte
	IdentityToken []byte
}

func encode(entries []entry) ([]byte, error) {
	list := make([]stored, len(entries))
	for i, e := range entries {
		c := e.credentials
		list[i] = stored{e.reference, []byte(c.Username), []byte(c.Password), []byte(c.IdentityToken)}
	}
	return json.Marshal(list)
}

func decode(content []byte) ([]entry, error) {
	var list []stored
	if err := json.Unmarshal(content, &list); err != nil {
		return nil, err
	}
	entries := make([]entry, len(list))
	for i, s := range list {
		entries[i] = entry{s.Reference, registry.Credentials{
			Username: string(s.Username), Password: string(s.Password), IdentityToken: string(s.IdentityToken),
		}}
	}
	return entries, nil
}
