// SPDX-License-Identifier: Apache-2.0

// Package layer keeps prepared layers: what each needs to be mounted again lies
// in one directory on local disk, so that a restart needs no network.
//
//	<root>/<sha256 hex>/layer.json   Meta
//	                    image.erofs  the tree (package erofs)
//	                    chunks       where the data lies in the blob (index.Table)
//	                    digests      the digests of chunks, sorted (index.Digests)
//	                    data         the data that is local (package cache)
//	                    present      which of it is
//
// A [Set] holds all layers of a node. Its directories appear whole, by rename.
package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	goerofs "github.com/erofs/go-erofs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/mount"
)

const (
	metaName  = "layer.json"
	imageName = "image.erofs"
	tableName = "chunks"

	maxMeta = 1 << 20 // bytes of layer.json that are read
)

// Meta is what is known of a layer beside its index.
type Meta struct {
	Digest digest.Digest `json:"digest"` // of the blob
	Size   int64         `json:"size"`   // of the blob, in bytes
	DiffID digest.Digest `json:"diffID"` // of the uncompressed tar, as the image's configuration states it
	// DiffSize is the size of the uncompressed tar in bytes. It is an estimate,
	// from the index, until the layer has been verified.
	DiffSize int64 `json:"diffSize"`
	// BlobCompression is how the blob as a whole is compressed.
	BlobCompression index.Compression `json:"blobCompression"`
	Kind            index.Kind        `json:"kind"`
	// Trust is what the index was worth when the layer was added.
	Trust index.Trust `json:"trust"`
	// Landmark is how much of the blob the image asks to have at once, in bytes.
	Landmark int64     `json:"landmark,omitempty"`
	Root     Root      `json:"root"`
	Created  time.Time `json:"created"`
	Verdict            // as it was when the layer was opened: see [Layer.Verdict]
}

// Root is the root directory of a layer's tree.
type Root struct {
	Mode uint32 `json:"mode"` // st_mode
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	// Implied means that the layer does not describe it: it is the one of the
	// layer below, so this layer can only be put on top of such a one.
	Implied bool `json:"implied,omitempty"`
}

// Layer is a layer that is prepared and open. Its methods may be called concurrently.
type Layer struct {
	Meta
	dir        string
	target     string // where it is mounted
	devicePath string // the exported device
	table      *index.Table
	lending    *lending
	origins    origins // protected by lending.mu
	cache      *cache.File
	space      *cache.Space
	dev        *device.Device

	// As it was when the layer was mounted; see pages.go.
	added         bool // by this process
	throughDevice bool

	mu      sync.Mutex // protects the field below, and layer.json
	verdict Verdict
}

// open opens the layer in dir, for a set.
func open(dir, target string, s *Set) (_ *Layer, err error) {
	l := &Layer{dir: dir, target: target, space: s.space, lending: &s.lending}
	defer func() {
		if err != nil {
			err = fmt.Errorf("opening layer %s: %w", filepath.Base(dir), errors.Join(err, l.close()))
		}
	}()
	if err := atomicfile.ReadJSON(filepath.Join(dir, metaName), maxMeta, &l.Meta); err != nil {
		return nil, err
	}
	if l.Digest.Validate() != nil || l.Digest.Encoded() != filepath.Base(dir) || l.DiffID.Validate() != nil {
		return nil, fmt.Errorf("%s speaks of layer %q", metaName, l.Digest)
	}
	if l.table, err = index.OpenTable(filepath.Join(dir, tableName)); err != nil {
		return nil, err
	}
	if l.cache, err = cache.Open(dir, l.table, s.space); err != nil {
		return nil, err
	}
	l.dev = device.New(device.Config{
		Descriptor: blob.Descriptor{Digest: l.Digest, Size: l.Size},
		Table:      l.table, Cache: l.cache, Local: borrower{l}, Scheduler: s.sched, Patience: s.patience, Logger: s.log,
	})
	l.settle(l.Meta.Verdict)
	if err := l.lending.join(l); err != nil {
		s.log.Warn("other layers cannot have chunks of a layer", "layer", l.Digest.String(), "err", err)
	}
	return l, nil
}

// close ends the layer's fetches and closes its files, as far as they are open.
func (l *Layer) close() error {
	err := l.lending.leave(l)
	if l.dev != nil {
		l.dev.Close()
	}
	if l.cache != nil {
		err = errors.Join(err, l.cache.Close())
	}
	if l.table != nil {
		err = errors.Join(err, l.table.Close())
	}
	return err
}

// Device is the layer's data.
func (l *Layer) Device() *device.Device { return l.dev }

// MountDirectory is where the layer is mounted: its tree is in diff below it.
func (l *Layer) MountDirectory() string { return l.target }

// Complete reports whether all of the layer is on local disk.
func (l *Layer) Complete() bool { return l.cache.Complete() }

// LocalBytes is the disk space that the layer's data takes.
func (l *Layer) LocalBytes() int64 { return l.cache.Allocated() }

// Tree is a layer's file tree as its image has it. Files say where their content
// is (DataRange), in addresses in which the layer's device starts at Origin.
type Tree struct {
	fs.FS
	io.Closer
	Origin int64
}

// Tree opens the layer's file tree. The caller closes it.
func (l *Layer) Tree() (*Tree, error) {
	f, err := os.Open(filepath.Join(l.dir, imageName))
	if err != nil {
		return nil, fmt.Errorf("reading tree of layer %s: %w", l.Digest, err)
	}
	t := &Tree{Closer: f}
	if t.Origin, _, err = erofs.Device(f); err == nil {
		var devices []goerofs.OpenOpt
		if l.table.DeviceSize() > 0 {
			devices = append(devices, goerofs.WithExtraDevices(l.dev))
		}
		t.FS, err = goerofs.Open(f, devices...)
	}
	if err == nil {
		t.FS, err = fs.Sub(t.FS, "diff")
	}
	if err != nil {
		return nil, fmt.Errorf("reading tree of layer %s: %w", l.Digest, errors.Join(err, f.Close()))
	}
	return t, nil
}

// Chunks is the layer's chunk table.
func (l *Layer) Chunks() *index.Table { return l.table }

// Exporter makes devices readable as files: the FUSE server.
type Exporter interface {
	Export(d digest.Digest, dev *device.Device) (path string, err error)
	Withdraw(d digest.Digest)
}

// export makes the device readable as a file. Complete or not: mounts that others
// hold may read it.
func (l *Layer) export(e Exporter) (err error) {
	l.devicePath, err = e.Export(l.Digest, l.dev)
	return err
}

// mount mounts the layer and makes sure that the mount answers; one that is there
// stays if keep is true.
func (l *Layer) mount(ctx context.Context, m *mount.Mounter, keep bool) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mounting layer %s: %w", l.Digest, err)
		}
	}()
	l.throughDevice = l.table.DeviceSize() > 0 && !l.cache.Frozen()
	if keep {
		mounted, err := mount.Mounted(l.target)
		if err == nil && mounted {
			err = mount.Check(ctx, l.target)
		}
		if err != nil || mounted {
			return err
		}
	}
	if err := mount.Unmount(l.target, true); err != nil {
		return err
	}
	dev := l.devicePath
	switch {
	case l.table.DeviceSize() == 0:
		dev = ""
	case l.direct():
		dev = filepath.Join(l.dir, cache.DataName)
		l.throughDevice = false
	}
	if err := os.MkdirAll(l.target, 0o700); err != nil {
		return err
	}
	if err := m.Mount(ctx, filepath.Join(l.dir, imageName), dev, l.target); err != nil {
		return err
	}
	return mount.Check(ctx, l.target)
}

// direct reports whether the layer is to be mounted from its data file, with no
// need of us: if all of it is there, and is what it should be, since nothing can
// be taken back then.
func (l *Layer) direct() bool {
	return l.Verdict().Verified && (l.cache.Frozen() || l.space.MayFreeze(l.table.DeviceSize())) && l.cache.Freeze()
}

// unmount undoes mount. What containers hold of the mount stays with them.
func (l *Layer) unmount() error {
	if err := unmount(l.target); err != nil {
		return fmt.Errorf("unmounting layer %s: %w", l.Digest, err)
	}
	return nil
}

func unmount(target string) error {
	if err := mount.Unmount(target, true); err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Flush makes durable what of the layer is local.
func (l *Layer) Flush() error { return l.cache.Flush() }
