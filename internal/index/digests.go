// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"math/bits"
	"os"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
)

// The digests of a layer's chunks on disk: a header, then one record a chunk that
// has a digest, sorted by the start of the digest, then by the chunk. Integers are
// little endian, the start of a digest is as it is.
//
//	header: magic [8]byte, records u64, reserved u32, crc32c of the records and
//	        of the header before it u32
//	record: first 8 bytes of the digest, chunk u32
//
// A list makes a chunk of one layer findable for others. It says nothing that is
// not in the [Table], and can be made anew from that.
const (
	digestsMagic     = "HFDIGST1"
	digestsHeader    = 24
	digestRecordSize = 12
	maxDigestsLen    = int64(1) << 34
)

// Chunks is what a list of digests is made from: an [Index] or a [Table].
type Chunks interface {
	Len() int
	At(i int) Chunk
}

// Len is the number of chunks.
func (x *Index) Len() int { return len(x.Chunks) }

// At returns chunk i, 0 <= i < Len().
func (x *Index) At(i int) Chunk { return x.Chunks[i] }

// HasDigest reports whether the chunk can be verified, and found, by a digest of
// its own.
func (c Chunk) HasDigest() bool { return c.Digest != [sha256.Size]byte{} }

// WriteDigests writes the list of the digests of chunks.
func WriteDigests(w io.WriteSeeker, chunks Chunks) error {
	if err := writeDigests(w, chunks); err != nil {
		return fmt.Errorf("writing digests of chunks: %w", err)
	}
	return nil
}

func writeDigests(w io.WriteSeeker, chunks Chunks) error {
	type record struct {
		key   uint64
		chunk uint32
	}
	records := make([]record, 0, chunks.Len())
	for i := range chunks.Len() {
		if c := chunks.At(i); c.HasDigest() {
			records = append(records, record{digestKey(c.Digest), uint32(i)}) //nolint:gosec // Limits.Chunks is far smaller
		}
	}
	slices.SortFunc(records, func(a, b record) int {
		return cmp.Or(cmp.Compare(a.key, b.key), cmp.Compare(a.chunk, b.chunk))
	})
	if _, err := w.Seek(digestsHeader, io.SeekStart); err != nil {
		return err
	}
	crc := crc32.New(castagnoli)
	buf := bufio.NewWriterSize(io.MultiWriter(w, crc), 1<<16)
	for _, r := range records {
		var rec [digestRecordSize]byte
		binary.BigEndian.PutUint64(rec[:], r.key)
		binary.LittleEndian.PutUint32(rec[8:], r.chunk)
		if _, err := buf.Write(rec[:]); err != nil {
			return err
		}
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	var head [digestsHeader]byte
	copy(head[:], digestsMagic)
	binary.LittleEndian.PutUint64(head[8:], uint64(len(records)))
	binary.LittleEndian.PutUint32(head[20:], crc32.Update(crc.Sum32(), castagnoli, head[:20]))
	if _, err := w.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err := w.Write(head[:])
	return err
}

// digestKey is the start of a digest as a number: they sort alike.
func digestKey(digest [sha256.Size]byte) uint64 { return binary.BigEndian.Uint64(digest[:]) }

// Digests is the list of a layer's digests, on disk. It is immutable and safe for
// concurrent use until it is closed.
type Digests struct {
	n      int
	mapped []byte
}

// OpenDigests opens a list that [WriteDigests] wrote, checking that it is whole.
func OpenDigests(name string) (*Digests, error) {
	d, err := openDigests(name)
	if err != nil {
		return nil, fmt.Errorf("opening digests of chunks %s: %w", name, err)
	}
	return d, nil
}

func openDigests(name string) (*Digests, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only; the mapping outlives the descriptor
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	size := info.Size()
	if size < digestsHeader || size > maxDigestsLen || (size-digestsHeader)%digestRecordSize != 0 {
		return nil, fmt.Errorf("%d bytes: %w", size, ErrInvalid)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping: %w", err)
	}
	d := &Digests{mapped: m, n: int((size - digestsHeader) / digestRecordSize)}
	if string(m[:8]) != digestsMagic || binary.LittleEndian.Uint64(m[8:]) != uint64(d.n) ||
		crc32.Update(crc32.Checksum(m[digestsHeader:], castagnoli), castagnoli, m[:20]) != binary.LittleEndian.Uint32(m[20:]) {
		_ = d.Close()
		return nil, fmt.Errorf("damaged: %w", ErrInvalid)
	}
	return d, nil
}

// Close releases the list. No method may be called afterwards.
func (d *Digests) Close() error {
	m := d.mapped
	d.mapped = nil
	if m == nil {
		return nil
	}
	return unix.Munmap(m)
}

// Len is the number of chunks in the list.
func (d *Digests) Len() int { return d.n }

// Find returns the chunks whose digests start like this one, ascending: which of
// them have it, the table tells.
func (d *Digests) Find(digest [sha256.Size]byte) iter.Seq[int] {
	key := digestKey(digest)
	return func(yield func(int) bool) {
		for i := d.search(key); i < d.n && d.key(i) == key; i++ {
			if !yield(int(binary.LittleEndian.Uint32(d.record(i)[8:]))) {
				return
			}
		}
	}
}

func (d *Digests) record(i int) []byte {
	return d.mapped[digestsHeader+i*digestRecordSize:][:digestRecordSize]
}
func (d *Digests) key(i int) uint64 { return binary.BigEndian.Uint64(d.record(i)) }

// search returns the first record that is not below key. Digests are spread evenly,
// so it looks where such a record would be, corrects that by what is there, and goes
// on in growing steps: in most cases it touches two lines of memory.
func (d *Digests) search(key uint64) int {
	if d.n == 0 {
		return 0
	}
	records := func(distance uint64) int {
		n, _ := bits.Mul64(distance, uint64(d.n))
		return int(n) //nolint:gosec // at most d.n
	}
	guess := records(key)
	if at := d.key(guess); at < key {
		guess = min(d.n-1, guess+records(key-at))
	} else {
		guess = max(0, guess-records(at-key))
	}
	low, high := guess, guess
	for step := 4; low > 0 && d.key(low-1) >= key; step *= 4 {
		high, low = low-1, max(0, low-step)
	}
	for step := 4; high < d.n && d.key(high) < key; step *= 4 {
		low, high = high+1, min(d.n, high+step)
	}
	return low + sort.Search(high-low, func(i int) bool { return d.key(low+i) >= key })
}
