// SPDX-License-Identifier: Apache-2.0

package lazyblob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/chunklist"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
)

// Listing is a chunk list, and what it is worth.
type Listing struct {
	*chunklist.List
	Trust index.Trust
}

// Add adds a blob that can be read from these sources, best first. list may be nil.
// One that is there gets sources, and the list if it has none.
func (s *Set) Add(ctx context.Context, desc blob.Descriptor, list *Listing, sources []blob.Source) (*Blob, error) {
	if desc.Digest.Validate() != nil || desc.Digest.Algorithm() != digest.SHA256 || desc.Size < 0 {
		return nil, fmt.Errorf("adding blob %q of %d bytes: only sha256 is supported", desc.Digest, desc.Size)
	}
	s.changing.Lock()
	defer s.changing.Unlock()
	if b, ok := s.Get(desc.Digest); ok {
		if b.desc.Size != desc.Size {
			return nil, fmt.Errorf("adding blob %s of %d bytes: it has %d", desc.Digest, desc.Size, b.desc.Size)
		}
		b.AddSources(sources)
		return b, b.adopt(list)
	}
	if err := s.create(desc, list); err != nil {
		return nil, fmt.Errorf("adding blob %s: %w", desc.Digest, err)
	}
	err := s.open(desc.Digest)
	b, ok := s.Get(desc.Digest)
	if err == nil && ok {
		b.AddSources(sources)
		err = s.mount(ctx, b)
	}
	if err != nil {
		return nil, errors.Join(err, s.discard(desc.Digest))
	}
	return b, nil
}

// create makes the directory of a blob.
func (s *Set) create(desc blob.Descriptor, list *Listing) error {
	dir := filepath.Join(s.Root, stagingPrefix+desc.Digest.Encoded())
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	meta := Meta{Digest: desc.Digest, Size: desc.Size}
	image := func(f *os.File) error { return erofs.Write(f, chunklist.Tree(desc.Size), erofs.Name(desc.Digest)) }
	err := atomicfile.Create(filepath.Join(dir, imageName), 0o600, image)
	if err == nil && list != nil {
		meta.Trust = list.Trust
		err = writeTable(dir, list.List)
	}
	if err == nil {
		err = atomicfile.WriteJSON(filepath.Join(dir, metaName), meta, 0o600)
	}
	if err == nil {
		err = os.Rename(dir, filepath.Join(s.Root, desc.Digest.Encoded()))
	}
	if err == nil {
		return atomicfile.SyncDir(s.Root)
	}
	return errors.Join(err, os.RemoveAll(dir))
}

func writeTable(dir string, list *chunklist.List) error {
	return atomicfile.Create(filepath.Join(dir, tableName), 0o600, func(f *os.File) error { return index.WriteTable(f, list.Index()) })
}

// adopt takes a chunk list, unless there is one, or all of the blob is on its way.
func (b *Blob) adopt(list *Listing) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if list == nil || b.listed != nil || b.whole != nil {
		return nil
	}
	b.meta.Trust = list.Trust
	err := b.saveMeta()
	if err == nil {
		err = writeTable(b.dir, list.List)
	}
	if err == nil {
		err = b.openListed()
	}
	if err != nil {
		return fmt.Errorf("taking the chunk list of blob %s: %w", b.desc.Digest, err)
	}
	return nil
}

// saveMeta writes blob.json. The caller holds b.mu.
func (b *Blob) saveMeta() error {
	return atomicfile.WriteJSON(filepath.Join(b.dir, metaName), b.meta, 0o600)
}

// maxSources bounds what artifacts can add.
const maxSources = 16

// AddSources adds places the blob is read from, before those it has; one of the same
// name is replaced, since it may have newer credentials.
func (b *Blob) AddSources(added []blob.Source) {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := slices.Clone(added)
	for _, s := range b.sources {
		same := func(a blob.Source) bool { return a.String() == s.String() }
		if !slices.ContainsFunc(added, same) && len(all) < maxSources {
			all = append(all, s)
		}
	}
	b.sources = all
	if b.listed != nil {
		b.listed.dev.AddSources(added)
	}
}

// Descriptor names the blob.
func (b *Blob) Descriptor() blob.Descriptor { return b.desc }

// Path is the file by which runtimes read the blob: its data, once that is complete, has
// its digest, and stays; until then the file in the mount.
func (b *Blob) Path() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.meta.Verified && b.listed != nil && b.listed.cache.Frozen() {
		return filepath.Join(b.dir, cache.DataName)
	}
	return filepath.Join(b.target, "diff", chunklist.FileName)
}

// State is how far a blob is.
type State struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	// Local is how many of its bytes are here.
	Local    int64 `json:"local"`
	Listed   bool  `json:"listed"` // it has a chunk list
	Verified bool  `json:"verified"`
	// Fetching means that it is being fetched whole.
	Fetching bool          `json:"fetching,omitempty"`
	Error    string        `json:"error,omitempty"`
	Device   *device.Stats `json:"device,omitempty"`
}

// State tells how far the blob is.
func (b *Blob) State() State {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := State{Digest: b.desc.Digest, Size: b.desc.Size, Verified: b.meta.Verified, Listed: b.listed != nil, Fetching: b.whole != nil, Error: b.meta.Bad}
	switch {
	case b.listed != nil:
		stats := b.listed.dev.Stats()
		s.Device, s.Local = &stats, min(b.listed.cache.Allocated(), b.desc.Size)
		if s.Error == "" {
			s.Error = stats.LastError
		}
	case b.whole != nil:
		s.Local = b.whole.done.Load()
	case b.failed != nil:
		s.Error = b.failed.Error()
	}
	return s
}

// Bad is why nobody may read the blob; nil if everybody may.
func (b *Blob) Bad() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.meta.Bad == "" {
		return nil
	}
	return errors.New(b.meta.Bad)
}

// wait is Device.Wait for a range of the blob.
func (b *Blob) wait(ctx context.Context, off int64, n int) (release func(), err error) {
	b.Fill()
	l := b.list()
	if l == nil {
		if err := b.fetchWhole(ctx); err != nil {
			return nil, fmt.Errorf("reading blob %s: %w", b.desc.Digest, err)
		}
		l = b.list()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, b.set.Patience, fmt.Errorf("no answer within %s", b.set.Patience))
	defer cancel()
	return l.dev.Wait(ctx, off, n)
}

// padded is a blob as the device of an EROFS image, which consists of whole blocks.
type padded struct{ b *Blob }

// Size is that of the blob, rounded up.
func (p padded) Size() int64 { return chunklist.Tree(p.b.desc.Size).DeviceSize }

// Wait waits for what of a range lies in the blob.
func (p padded) Wait(ctx context.Context, off int64, n int) (release func(), err error) {
	return p.b.wait(ctx, off, int(max(0, min(int64(n), p.b.desc.Size-off))))
}

// ReadAt reads what Wait has waited for; behind the blob there are zeros, which no file
// has.
func (p padded) ReadAt(buf []byte, off int64) (int, error) {
	inside := max(0, min(int64(len(buf)), p.b.desc.Size-off))
	clear(buf[inside:])
	l := p.b.list()
	if l == nil {
		return 0, cache.ErrAbsent
	}
	if n, err := l.dev.ReadAt(buf[:inside], off); err != nil {
		return n, err
	}
	return len(buf), nil
}

// Fill has all of the blob fetched in the background, and compared with its digest, if
// the set fetches what nobody reads.
func (b *Blob) Fill() {
	b.mu.Lock()
	done := b.meta.Verified || b.meta.Bad != ""
	b.mu.Unlock()
	if done || b.set.Pay == nil || !b.filling.CompareAndSwap(false, true) {
		return
	}
	b.set.active.Go(func() {
		err := b.Fetch(b.set.ctx)
		if b.set.ctx.Err() != nil {
			return
		}
		if err == nil {
			b.filling.Store(false)
			return
		}
		b.set.Logger.Warn("blob is not complete yet", "blob", b.desc.Digest.String(), "err", err)
		const pause = 30 * time.Second
		time.AfterFunc(pause, func() { b.filling.Store(false) }) // the next reader tries again
	})
}

// Fetch fetches what is missing, and compares all of the blob with its digest.
func (b *Blob) Fetch(ctx context.Context) error {
	l := b.list()
	if l == nil {
		return b.fetchWhole(ctx)
	}
	pay := b.set.Pay
	if pay == nil {
		pay = func(context.Context, int64) error { return nil }
	}
	if err := l.dev.FillMissing(ctx, pay); err != nil {
		return err
	}
	if err := l.cache.Flush(); err != nil {
		return err
	}
	frozen := b.freeze(l)
	got, err := b.sum(ctx, l)
	if err != nil {
		return fmt.Errorf("comparing blob %s with its digest: %w", b.desc.Digest, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if got == b.desc.Digest {
		b.meta.Verified = true
		b.set.Logger.Info("blob is complete", "blob", b.desc.Digest.String(), "bytes", b.desc.Size, "direct", frozen)
	} else {
		b.meta.Bad = fmt.Sprintf("its chunk list (%s) is about other content: %s, not %s", b.meta.Trust, got, b.desc.Digest)
		l.dev.Fail(errors.New(b.meta.Bad))
		b.set.Logger.Error("blob is not what its chunk list says", "blob", b.desc.Digest.String(), "trust", b.meta.Trust.String())
	}
	err = b.saveMeta()
	b.set.Changed()
	return err
}

// freeze makes a complete data file stay as it is, if there is room for that.
func (b *Blob) freeze(l *listed) bool {
	if !l.cache.Frozen() && !b.set.Space.MayFreeze(b.desc.Size) || !l.cache.Freeze() {
		return false
	}
	// Containers read it as any user.
	if err := os.Chmod(filepath.Join(b.dir, cache.DataName), 0o444); err != nil {
		b.set.Logger.Warn("letting all users read a blob", "blob", b.desc.Digest.String(), "err", err)
		return false
	}
	return true
}

// sum is the digest that the blob has.
func (b *Blob) sum(ctx context.Context, l *listed) (digest.Digest, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < b.desc.Size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), b.desc.Size-off)]
		release, err := l.dev.Wait(ctx, off, len(p))
		if err != nil {
			return "", err
		}
		_, err = l.dev.ReadAt(p, off)
		release()
		if err != nil {
			return "", err
		}
		_, _ = h.Write(p) // never fails
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

// Remove deletes a blob, unless a container has it mounted: then it reports that it has
// not. Whoever holds the data file itself keeps that.
func (s *Set) Remove(d digest.Digest) (bool, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	b, ok := s.Get(d)
	if !ok {
		return true, nil
	}
	used, err := inUse(b.target)
	if used || err != nil {
		return false, err
	}
	return true, s.discard(d)
}

// discard takes a blob out of the set, and off the disk. The caller holds s.changing.
func (s *Set) discard(d digest.Digest) error {
	s.mu.Lock()
	b := s.blobs[d]
	delete(s.blobs, d)
	s.mu.Unlock()
	var err error
	if b != nil {
		err = unmount(b.target)
		b.stop()
		s.Exporter.Withdraw(exported(d))
		err = errors.Join(err, b.close())
	}
	// Renamed first: a directory is a blob as long as it has its name.
	trash := filepath.Join(s.Root, stagingPrefix+d.Encoded())
	if rerr := os.Rename(filepath.Join(s.Root, d.Encoded()), trash); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		return errors.Join(err, rerr)
	}
	return errors.Join(err, os.RemoveAll(trash))
}

var _ io.ReaderAt = padded{}
