// SPDX-License-Identifier: Apache-2.0

// Package lazyblob makes blobs readable that are not here yet: the files of artifacts,
// such as the weights of a model, which are read as they are.
//
// Each blob is a directory on local disk, so that a restart needs no network:
//
//	<root>/<sha256 hex>/blob.json    its size, and what is known of it
//	                    image.erofs  a tree with one file, which is all of the device
//	                    chunks       the chunk list (index.Table), if there is one
//	                    data         the data that is local (package cache)
//	                    present      which of it is
//	                    incoming     the data of a blob without a list, so far
//
// A reader comes through an EROFS mount of the one file, whose data is a device served
// by FUSE, as for layers. With a chunk list the device is [device.Device]: parts of the
// blob are fetched and verified as they are read. Without one, readers wait until all
// of the blob has been fetched and has its digest (whole.go).
//
// A blob that is complete and has its digest needs nothing of us: [Blob.Path] is then
// its data file, which is exactly the blob.
package lazyblob

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/chunklist"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/mount"
)

const (
	metaName  = "blob.json"
	imageName = "image.erofs"
	tableName = "chunks"

	stagingPrefix = ".staging-"
	maxMeta       = 1 << 16 // bytes of blob.json that are read
)

// Meta is what is known of a blob.
type Meta struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	// Trust is what the chunk list is worth; it means nothing without one.
	Trust index.Trust `json:"trust"`
	// Verified means that all of it was compared with its digest.
	Verified bool `json:"verified,omitempty"`
	// Bad is why nobody may read it: what its chunk list says is not its content.
	Bad string `json:"bad,omitempty"`
}

// Exporter makes devices readable as files: the FUSE server.
type Exporter interface {
	Export(d digest.Digest, dev Device) error
	Path(d digest.Digest) string
	Withdraw(d digest.Digest)
}

// Device is what is exported: see fusedev.Device.
type Device interface {
	Size() int64
	Wait(ctx context.Context, off int64, n int) (release func(), err error)
	ReadAt(p []byte, off int64) (int, error)
}

// Config is what a Set works with. Root is on local disk, Mounts in a directory that a
// reboot empties; both belong to the set alone.
type Config struct {
	Root, Mounts string
	Exporter     Exporter
	Space        *cache.Space
	Scheduler    *device.Scheduler
	// Patience is how long readers wait without progress.
	Patience time.Duration
	// Pay is called with a number of bytes before so many are fetched that nobody waits
	// for; nil: nothing is fetched that nobody reads.
	Pay func(ctx context.Context, n int64) error
	// Keep is told the chunk list of each blob that was fetched whole.
	Keep func(context.Context, *chunklist.List) error
	// Changed is called when what a blob's Path or State tells has changed.
	Changed func()
	Logger  *slog.Logger
}

// Set is the lazy blobs of a node. Its methods may be called concurrently.
type Set struct {
	Config

	ctx    context.Context // ends with Close; parent of all fetches
	cancel context.CancelFunc
	active sync.WaitGroup

	changing sync.Mutex // held while blobs come and go, before mu
	mounter  *mount.Mounter

	mu    sync.Mutex // protects the field below
	blobs map[digest.Digest]*Blob
}

// Blob is one of them. Its methods may be called concurrently.
type Blob struct {
	set    *Set
	desc   blob.Descriptor
	dir    string
	target string // where it is mounted

	filling atomic.Bool

	mu      sync.Mutex // protects the fields below, and blob.json
	meta    Meta
	sources []blob.Source
	listed  *listed   // nil as long as it has no chunk list
	whole   *fetching // a fetch of the whole that is under way
	failed  error     // why the last one has ended
}

// listed is what a blob with a chunk list consists of.
type listed struct {
	table *index.Table
	cache *cache.File
	dev   *device.Device
}

// NewSet returns a set that holds nothing until [Set.Open] is called, and to which
// blobs can be added after [Set.Mount].
func NewSet(c Config) (*Set, error) {
	for _, dir := range []string{c.Root, c.Mounts} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("creating directory for blobs: %w", err)
		}
	}
	s := &Set{Config: c, blobs: map[digest.Digest]*Blob{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// exported is the name of a blob's device: the same digest may be a layer's.
func exported(d digest.Digest) digest.Digest { return digest.FromString("blob " + d.String()) }

// Open opens what is on disk, and exports it: what is mounted already, by an earlier
// process, works from then on.
func (s *Set) Open(ctx context.Context) error {
	entries, err := os.ReadDir(s.Root)
	if err != nil {
		return fmt.Errorf("opening blobs: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), stagingPrefix) {
			if err := os.RemoveAll(filepath.Join(s.Root, e.Name())); err != nil {
				return fmt.Errorf("opening blobs: %w", err)
			}
			continue
		}
		d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		if d.Validate() != nil {
			continue // not ours
		}
		if err := s.open(d); err != nil {
			s.Logger.Error("opening blob", "err", err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// open opens a blob on disk, and exports it.
func (s *Set) open(d digest.Digest) (err error) {
	b := &Blob{set: s, dir: filepath.Join(s.Root, d.Encoded()), target: filepath.Join(s.Mounts, erofs.Name(d))}
	defer func() {
		if err != nil {
			err = fmt.Errorf("opening blob %s: %w", d, errors.Join(err, b.close()))
		}
	}()
	if err := atomicfile.ReadJSON(filepath.Join(b.dir, metaName), maxMeta, &b.meta); err != nil {
		return err
	}
	if b.meta.Digest != d || b.meta.Size < 0 {
		return fmt.Errorf("%s speaks of blob %q of %d bytes", metaName, b.meta.Digest, b.meta.Size)
	}
	b.desc = blob.Descriptor{Digest: d, Size: b.meta.Size}
	_, err = os.Stat(filepath.Join(b.dir, tableName))
	switch {
	case err == nil:
		if err := b.openListed(); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := s.Exporter.Export(exported(d), padded{b}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[d] = b
	return nil
}

// openListed opens the chunk list, and what comes with it. The caller holds b.mu, or
// nobody else knows b.
func (b *Blob) openListed() (err error) {
	l := &listed{}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.table, err = index.OpenTable(filepath.Join(b.dir, tableName)); err != nil {
		return err
	}
	if l.table.DeviceSize() != b.desc.Size {
		return fmt.Errorf("its chunk list is about %d bytes: %w", l.table.DeviceSize(), index.ErrInvalid)
	}
	if l.cache, err = cache.Open(b.dir, l.table, b.set.Space); err != nil {
		return err
	}
	l.dev = device.New(device.Config{
		Descriptor: b.desc, Table: l.table, Cache: l.cache, Scheduler: b.set.Scheduler, Patience: b.set.Patience, Logger: b.set.Logger,
	})
	l.dev.AddSources(b.sources)
	if b.meta.Bad != "" {
		l.dev.Fail(errors.New(b.meta.Bad))
	}
	if b.meta.Verified {
		b.freeze(l) // what was frozen is not any more after a boot
	}
	b.listed = l
	return nil
}

func (l *listed) close() error {
	var err error
	if l.dev != nil {
		l.dev.Close()
	}
	if l.cache != nil {
		err = l.cache.Close()
	}
	if l.table != nil {
		err = errors.Join(err, l.table.Close())
	}
	return err
}

// close ends fetches and closes files. Nobody reads.
func (b *Blob) close() error {
	b.mu.Lock()
	l := b.listed
	b.mu.Unlock()
	if l == nil {
		return nil
	}
	return l.close()
}

// Flush makes durable what is local.
func (s *Set) Flush() {
	for _, b := range s.All() {
		if l := b.list(); l != nil {
			if err := l.cache.Flush(); err != nil {
				s.Logger.Warn("making a blob durable", "blob", b.desc.Digest.String(), "err", err)
			}
		}
	}
}

// flushInterval is how often present maps are made durable.
const flushInterval = 5 * time.Second

// Run makes what has been fetched durable, until ctx ends.
func (s *Set) Run(ctx context.Context) error {
	tick := time.NewTicker(flushInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			s.Flush()
		}
	}
}

// Close ends all fetches. Nobody reads.
func (s *Set) Close() error {
	s.cancel()
	s.active.Wait()
	var err error
	for _, b := range s.All() {
		err = errors.Join(err, b.close())
	}
	return err
}

// Get returns a blob of the set.
func (s *Set) Get(d digest.Digest) (*Blob, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.blobs[d]
	return b, ok
}

// All returns the blobs of the set, sorted by digest.
func (s *Set) All() []*Blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Blob, 0, len(s.blobs))
	for _, b := range s.blobs {
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b *Blob) int { return strings.Compare(string(a.desc.Digest), string(b.desc.Digest)) })
	return all
}

// list is what the blob has with its chunk list; nil if it has none.
func (b *Blob) list() *listed {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.listed
}
