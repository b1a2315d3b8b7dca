// SPDX-License-Identifier: Apache-2.0

package layer

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
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/mount"
)

// flushInterval is how often present maps are made durable: what a crash of the
// machine can cost is this much of the line.
const flushInterval = 5 * time.Second

const stagingPrefix = ".staging-"

// Set is all prepared layers of a node. Its methods may be called concurrently.
type Set struct {
	root, mounts string
	exporter     Exporter
	space        *cache.Space
	sched        *device.Scheduler
	patience     time.Duration
	log          *slog.Logger
	lending      lending

	// changing is held while layers come and go, before mu. What a directory's
	// name says and what the set holds differ only within it.
	changing sync.Mutex
	mounter  *mount.Mounter // protected by changing

	mu     sync.Mutex // protects the fields below
	layers map[digest.Digest]*Layer
}

// Config is what a Set works with. Root is on local disk, Mounts in a directory
// that a reboot empties; both belong to the set alone.
type Config struct {
	Root, Mounts string
	Exporter     Exporter
	Space        *cache.Space // nil: without a limit
	Scheduler    *device.Scheduler
	// Patience is how long readers wait, and so how long a source may take; 0
	// means device.DefaultPatience.
	Patience time.Duration
	Logger   *slog.Logger
}

// NewSet returns a set that holds nothing until [Set.Open] is called, and to which
// layers can be added after [Set.Mount].
func NewSet(c Config) (*Set, error) {
	if c.Space == nil {
		c.Space = cache.NewSpace(0, c.Logger)
	}
	for _, dir := range []string{c.Root, c.Mounts} {
		// 0700: or any user of the host could execute an image's setuid files.
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("creating layer directory: %w", err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			return nil, fmt.Errorf("creating layer directory: %w", err)
		}
	}
	return &Set{
		root: c.Root, mounts: c.Mounts, exporter: c.Exporter,
		space: c.Space, sched: c.Scheduler, patience: c.Patience, log: c.Logger,
		layers: map[digest.Digest]*Layer{},
	}, nil
}

// Open opens every layer on disk, without a network. A layer that cannot be opened
// stays on disk, is logged, and is not in the set.
func (s *Set) Open(ctx context.Context) error {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return fmt.Errorf("opening layers: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), stagingPrefix) {
			if err := os.RemoveAll(filepath.Join(s.root, e.Name())); err != nil {
				return fmt.Errorf("opening layers: %w", err)
			}
			continue
		}
		l, err := s.open(digest.NewDigestFromEncoded(digest.SHA256, e.Name()))
		if err != nil {
			s.log.Error("opening layer", "err", err)
			continue
		}
		s.mu.Lock()
		s.layers[l.Digest] = l
		s.mu.Unlock()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// Export exports the devices of all layers: what is mounted already, by an earlier
// process, works from then on. By then devices have their sources, or readers
// would get an error.
func (s *Set) Export() error {
	for _, l := range s.All() {
		if err := l.export(s.exporter); err != nil {
			return err
		}
	}
	return nil
}

// Mount mounts the layers of the set that are not mounted, by the method that it
// will use from then on, and ends mounts of layers that the set does not have. A
// layer that cannot be mounted is logged and leaves the set.
func (s *Set) Mount(ctx context.Context, m *mount.Mounter) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mounter = m
	for _, l := range s.All() {
		err := l.mount(ctx, m, true)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s.log.Error("mounting layer", "err", errors.Join(err, l.unmount()))
		s.exporter.Withdraw(l.Digest)
		if err := l.close(); err != nil {
			s.log.Warn("closing layer", "layer", l.Digest, "err", err)
		}
		s.mu.Lock()
		delete(s.layers, l.Digest)
		s.mu.Unlock()
	}
	return s.unmountStrays()
}

// unmountStrays ends the mounts of layers that are not in the set.
func (s *Set) unmountStrays() error {
	entries, err := os.ReadDir(s.mounts)
	if err != nil {
		return fmt.Errorf("looking for stray mounts: %w", err)
	}
	known := map[string]bool{}
	for _, l := range s.All() {
		known[filepath.Base(l.target)] = true
	}
	for _, e := range entries {
		if known[e.Name()] {
			continue
		}
		if err := unmount(filepath.Join(s.mounts, e.Name())); err != nil {
			return fmt.Errorf("ending a stray mount: %w", err)
		}
	}
	return nil
}

// MountDirectory is where a layer is or would be mounted: under the name that
// records expect.
func (s *Set) MountDirectory(d digest.Digest) string {
	return filepath.Join(s.mounts, erofs.Name(d))
}

// open opens a layer on disk.
func (s *Set) open(d digest.Digest) (*Layer, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("opening layer %q: %w", d, err)
	}
	return open(filepath.Join(s.root, d.Encoded()), s.MountDirectory(d), s)
}

// add opens and mounts a layer that is new on disk.
func (s *Set) add(ctx context.Context, d digest.Digest) (*Layer, error) {
	l, err := s.open(d)
	if err != nil {
		return nil, err
	}
	if err = l.export(s.exporter); err == nil {
		err = l.mount(ctx, s.mounter, false)
	}
	if err != nil {
		err = errors.Join(err, l.unmount())
		s.exporter.Withdraw(d)
		return nil, errors.Join(err, l.close())
	}
	l.added = true
	s.mu.Lock()
	defer s.mu.Unlock()
	s.layers[d] = l
	return l, nil
}

// Get returns a layer of the set.
func (s *Set) Get(d digest.Digest) (*Layer, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.layers[d]
	return l, ok
}

// All returns the layers of the set, sorted by digest.
func (s *Set) All() []*Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Layer, 0, len(s.layers))
	for _, l := range s.layers {
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b *Layer) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return all
}

// Remove unmounts a layer and deletes it from disk. Nothing may refer to it.
func (s *Set) Remove(d digest.Digest) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mu.Lock()
	l, ok := s.layers[d]
	delete(s.layers, d)
	s.mu.Unlock()
	if !ok {
		return nil
	}
	if err := l.unmount(); err != nil {
		return err
	}
	s.exporter.Withdraw(d)
	if err := l.close(); err != nil {
		s.log.Warn("closing layer", "layer", d, "err", err)
	}
	if err := s.discard(d); err != nil {
		return fmt.Errorf("removing layer %s: %w", d, err)
	}
	return nil
}

// discard deletes a layer's directory, if there is one. It is renamed first: a
// directory is a layer as long as it has its name.
func (s *Set) discard(d digest.Digest) error {
	trash := filepath.Join(s.root, stagingPrefix+d.Encoded())
	if err := os.RemoveAll(trash); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(s.root, d.Encoded()), trash); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(trash)
}

// Run makes what has been fetched durable, until ctx ends.
func (s *Set) Run(ctx context.Context) error {
	tick := time.NewTicker(flushInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		s.Flush()
	}
}

// Flush makes durable what has been fetched. What fails is logged.
func (s *Set) Flush() {
	for _, l := range s.All() {
		if err := l.cache.Flush(); err != nil {
			s.log.Error("flushing cache", "layer", l.Digest, "err", err)
		}
	}
}

// Unmount unmounts all layers. What containers hold of the mounts stays with them.
func (s *Set) Unmount() error {
	var err error
	for _, l := range s.All() {
		err = errors.Join(err, l.unmount())
		s.exporter.Withdraw(l.Digest)
	}
	return err
}

// Close closes all layers; they stay on disk, and as they are mounted.
func (s *Set) Close() error {
	var err error
	for _, l := range s.All() {
		err = errors.Join(err, l.close())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.layers)
	return err
}
