// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
)

// Stage is a layer on its way into a [Set]. It must be ended with Commit or Abort.
type Stage struct {
	set      *Set
	dir      string
	data     *os.File
	end      int64 // of what has been written, rounded up to blocks
	started  int64 // up to where the kernel has been told to write it to disk
	reserved int64 // bytes of the set's space
}

// ErrNoRoom means that a layer cannot be stored within the limit of the cache.
var ErrNoRoom = errors.New("no room for the layer within cache_limit")

// Stage begins to add a layer. Two stages of one layer may exist; the first one
// to be committed wins.
func (s *Set) Stage(d digest.Digest) (*Stage, error) {
	if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("staging layer %q: only sha256 digests are supported", d)
	}
	dir, err := os.MkdirTemp(s.root, stagingPrefix)
	if err != nil {
		return nil, fmt.Errorf("staging layer %s: %w", d, err)
	}
	st := &Stage{set: s, dir: dir}
	if st.data, err = os.OpenFile(filepath.Join(dir, cache.DataName), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("staging layer %s: %w", d, errors.Join(err, st.Abort()))
	}
	return st, nil
}

// WriteAt writes data of the layer's device that has come with its index, in
// ascending order. Without room for it within the limit of the cache it fails with
// [ErrNoRoom].
func (st *Stage) WriteAt(p []byte, off int64) (int, error) {
	start := max(st.end, off/index.BlockSize*index.BlockSize)
	end := (off + int64(len(p)) + index.BlockSize - 1) / index.BlockSize * index.BlockSize
	if n := end - start; n > 0 {
		// What it may have to wait for, an eviction, ends by itself.
		ok, err := st.set.space.Reserve(context.Background(), n)
		if err != nil {
			return 0, err
		}
		if !ok {
			return 0, ErrNoRoom
		}
		st.end, st.reserved = end, st.reserved+n
	}
	n, err := st.data.WriteAt(p, off)
	st.writeBack(off + int64(n))
	return n, err
}

// writeBackStep is how much is written to disk at a time, in bytes.
const writeBackStep = 32 << 20

// writeBack has the kernel write to disk what has been written: otherwise it would
// begin when gigabytes are waiting, and Commit waits for all of them.
func (st *Stage) writeBack(end int64) {
	if end-st.started < writeBackStep {
		return
	}
	// The result does not matter: Commit makes it durable, and finds out.
	_ = unix.SyncFileRange(int(st.data.Fd()), st.started, end-st.started, unix.SYNC_FILE_RANGE_WRITE)
	st.started = end
}

// release gives back the space; the layer's cache counts its own.
func (st *Stage) release() {
	st.set.space.Release(st.reserved)
	st.reserved = 0
}

// Abort throws the stage away. After Commit it does nothing.
func (st *Stage) Abort() error {
	if st.dir == "" {
		return nil
	}
	var err error
	if st.data != nil {
		err = st.data.Close()
	}
	err = errors.Join(err, os.RemoveAll(st.dir))
	st.dir = ""
	st.release()
	return err
}

// Commit adds the layer to the set and mounts it. complete means that all of the
// data has been written with WriteAt and verified.
func (st *Stage) Commit(ctx context.Context, m Meta, idx *index.Index, complete bool) (*Layer, error) {
	defer st.Abort() //nolint:errcheck // what is left of a failed stage goes at the next start
	m.Created, m.Kind, m.Landmark = time.Now().UTC().Truncate(time.Second), idx.Kind, idx.Landmark
	root := idx.Inodes[0]
	m.Root = Root{Mode: root.Mode, UID: root.UID, GID: root.GID, Implied: idx.RootImplied}
	if err := st.write(m, idx, complete); err != nil {
		return nil, fmt.Errorf("adding layer %s: %w", m.Digest, err)
	}
	st.set.changing.Lock()
	defer st.set.changing.Unlock()
	if l, ok := st.set.Get(m.Digest); ok {
		return l, nil // another stage was first
	}
	if err := st.moveIn(m.Digest); err != nil {
		return nil, fmt.Errorf("adding layer %s: %w", m.Digest, err)
	}
	st.release()
	l, err := st.set.add(ctx, m.Digest)
	if err != nil {
		// Nothing refers to it yet.
		return nil, errors.Join(err, st.set.discard(m.Digest))
	}
	return l, nil
}

// moveIn gives the stage's directory its name, in place of a layer that could
// not be loaded.
func (st *Stage) moveIn(d digest.Digest) error {
	if err := st.set.discard(d); err != nil {
		return err
	}
	if err := os.Rename(st.dir, filepath.Join(st.set.root, d.Encoded())); err != nil {
		return err
	}
	return atomicfile.SyncDir(st.set.root)
}

func (st *Stage) write(m Meta, idx *index.Index, complete bool) error {
	if err := st.data.Truncate(idx.DeviceSize); err != nil {
		return err
	}
	if complete {
		if err := cache.MarkComplete(st.dir, idx.DeviceSize, len(idx.Chunks)); err != nil {
			return err
		}
	}
	image := func(f *os.File) error { return erofs.Write(f, idx, erofs.Name(m.Digest)) }
	if err := atomicfile.Create(filepath.Join(st.dir, imageName), 0o600, image); err != nil {
		return err
	}
	table := func(f *os.File) error { return index.WriteTable(f, idx) }
	if err := atomicfile.Create(filepath.Join(st.dir, tableName), 0o600, table); err != nil {
		return err
	}
	if err := writeDigests(st.dir, idx); err != nil {
		return err
	}
	return atomicfile.WriteJSON(filepath.Join(st.dir, metaName), m, 0o600)
}
