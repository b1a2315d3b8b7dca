// SPDX-License-Identifier: Apache-2.0

// Package imagestore reads and writes the layout of containers/storage: the
// additional image store in which our layers are recorded, and the main stores
// of the runtimes, to see what they refer to.
//
// The directory overlay/<id> of a recorded layer is a symbolic link to a mount:
//
//	<records>/<32 hex of id>/tree           bind mount of the layer's EROFS image
//	                         link           read through links in tree: see package erofs
//	                         lower
//	                         lower-layers
//
// Up to v1.61 containers/storage takes a layer's tree from where its file link
// leads, for a user namespace from an id-mapped clone of the directory two above
// that; from v1.64 on from diff in the layer's directory, for a user namespace
// from an id-mapped clone of that directory. Neither clone has submounts. Both
// are the EROFS mount here. The older versions also read the link that file link
// names, l/x in the mount, and look for overlay/<what it says>: so the name of the
// mount is a name in overlay/, too. No runtime looks for a layer of that name.
//
// A record in an image store is a promise to every process that has the store
// open, made without asking them. Its rules, learned on real runtimes:
//
//   - A directory overlay/<id> without a record makes a runtime write into our
//     store and fail its pull. So both change under the store's own write lock,
//     which readers of records take: the record comes first and goes first.
//   - A record that goes while an image needs it makes the runtime's whole image
//     list fail. See [References].
//   - A runtime does not start if the store, its lists or its lock files are
//     missing: [Create] makes all of them, on local disk, and nothing removes them.
package imagestore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/erofs"
)

// The files of a store: go.podman.io/storage, store.go, layers.go and
// drivers/overlay/overlay.go.
const (
	layersDir  = "overlay-layers"
	imagesDir  = "overlay-images"
	driverDir  = "overlay"
	layersJSON = "layers.json"
	layersLock = "layers.lock"
	imagesJSON = "images.json"
	imagesLock = "images.lock"

	maxJSON = 256 << 20 // bytes of a list that is read
)

// Compression is how a layer's blob is compressed, in containers/storage's
// numbers (pkg/archive.Compression).
type Compression int

// The compressions of layers.
const (
	Uncompressed Compression = 0
	Gzip         Compression = 2
	Zstd         Compression = 4
)

// Layer is a layer's record.
type Layer struct {
	ID             string        `json:"id"`
	Parent         string        `json:"parent,omitempty"`
	Created        time.Time     `json:"created"`
	BlobDigest     digest.Digest `json:"compressed-diff-digest,omitempty"`
	BlobSize       int64         `json:"compressed-size,omitempty"`
	DiffID         digest.Digest `json:"diff-digest,omitempty"`
	DiffSize       int64         `json:"diff-size,omitempty"`
	Compression    Compression   `json:"compression,omitempty"`
	MountDirectory string        `json:"-"` // where the layer's tree is mounted; see [Store.Publish]
	Hidden         bool          `json:"-"` // see [Store.Hide]
}

// name is the name that the layer's image has, and a name in overlay/.
func (l Layer) name() string { return erofs.Name(l.BlobDigest) }

// ChainID is the id under which containers/storage looks for a layer: see
// go.podman.io/image/v5/storage, layerID. parent is "" for a base layer.
func ChainID(parent string, diffID digest.Digest) string {
	if parent == "" {
		return diffID.Encoded()
	}
	sum := sha256.Sum256([]byte(parent + "+" + diffID.Encoded()))
	return hex.EncodeToString(sum[:])
}

// Store is an additional image store that we write. Its methods may be called
// concurrently, by several processes.
type Store struct{ root, records string }

// Create opens the store at root and makes what is missing of it. What a reboot
// undoes is kept in records.
func Create(root, records string) (*Store, error) {
	s := &Store{root: root, records: records}
	for _, dir := range []string{s.root, s.path(stagingDir), records} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("creating image store: %w", err)
		}
	}
	if err := CreateLists(root); err != nil {
		return nil, fmt.Errorf("creating image store: %w", err)
	}
	return s, nil
}

// createFile makes an empty list or lock file, complete from its first instant.
func createFile(name string) error {
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if filepath.Ext(name) == ".json" {
		return atomicfile.Write(name, []byte("[]"), 0o600)
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// Root is the path that runtimes list in additionalimagestores.
func (s *Store) Root() string { return s.root }

// Layers returns all records.
func (s *Store) Layers() ([]Layer, error) { return Records(s.root) }

// Records returns the records of the store at root, without creating anything.
// The error is fs.ErrNotExist if there is no store.
func Records(root string) ([]Layer, error) {
	var layers []Layer
	if err := ReadList(root, Layers, &layers); err != nil {
		return nil, err
	}
	return layers, nil
}

// stagingDir holds directories on their way into overlay/ and out of it.
const stagingDir = "staging"

// layerID is what an id must look like before it becomes a path.
var layerID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Publish records a chain of layers, base first, each the parent of the next.
// Layers that are recorded already stay as they are. The image of a layer, made
// by package erofs with the name that [erofs.Name] gives its blob, is mounted at
// MountDirectory, an absolute path that ends with this name.
func (s *Store) Publish(ctx context.Context, chain []Layer) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	old, err := s.Layers()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, l := range old {
		known[l.ID] = true
	}
	layers := old
	var below parents
	for i, l := range chain {
		if err := checkChain(chain, i); err != nil {
			return err
		}
		if !known[l.ID] {
			if err := s.stage(l, below); err != nil {
				return fmt.Errorf("publishing layer %s: %w", l.ID, err)
			}
			layers = append(layers, l)
		}
		below = append(parents{l}, below...)
	}
	if len(layers) == len(old) {
		return nil
	}
	if err := s.writeLayers(layers); err != nil {
		return err
	}
	for _, l := range layers[len(old):] {
		if err := os.Rename(s.path(stagingDir, l.ID), s.path(driverDir, l.ID)); err != nil {
			return fmt.Errorf("publishing layer %s: %w", l.ID, errors.Join(err, s.undo(old, layers[len(old):])))
		}
	}
	return atomicfile.SyncDir(s.path(driverDir))
}

// undo takes back layers that were published in part.
func (s *Store) undo(old, added []Layer) error {
	err := s.writeLayers(old)
	for _, l := range added {
		err = errors.Join(err, s.dropDirectory(l.ID))
	}
	return err
}

func checkChain(chain []Layer, i int) error {
	l, parent := chain[i], ""
	if i > 0 {
		parent = chain[i-1].ID
	}
	if !layerID.MatchString(l.ID) || l.Parent != parent || l.ID != ChainID(parent, l.DiffID) ||
		l.BlobDigest.Validate() != nil || !filepath.IsAbs(l.MountDirectory) || filepath.Base(l.MountDirectory) != l.name() {
		return fmt.Errorf("publishing layer %q: it does not continue its chain", l.ID)
	}
	return nil
}

// Withdraw removes records, and then the directories of their layers. Ids that
// are not recorded are ignored. The caller has made sure that nothing refers to
// the layers; a layer whose child stays recorded is an error.
func (s *Store) Withdraw(ctx context.Context, ids ...string) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	layers, err := s.Layers()
	if err != nil {
		return err
	}
	gone := map[string]bool{}
	for _, id := range ids {
		gone[id] = true
	}
	var kept []Layer
	for _, l := range layers {
		if gone[l.ID] {
			continue
		}
		if gone[l.Parent] {
			return fmt.Errorf("withdrawing layer %s: layer %s is built on it", l.Parent, l.ID)
		}
		kept = append(kept, l)
	}
	if len(kept) == len(layers) {
		return nil
	}
	if err := s.writeLayers(kept); err != nil {
		return err
	}
	for _, l := range layers {
		if gone[l.ID] {
			if err := s.dropDirectory(l.ID); err != nil {
				return fmt.Errorf("withdrawing layer %s: %w", l.ID, err)
			}
		}
	}
	return s.dropStrays(kept)
}

// dropDirectory makes a layer's directory vanish at once.
func (s *Store) dropDirectory(id string) error {
	if err := os.RemoveAll(s.path(stagingDir, id)); err != nil {
		return err
	}
	if err := os.Remove(s.path(driverDir, id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.dropView(id)
}

// writeLayers replaces the list of records. The caller holds the lock.
func (s *Store) writeLayers(layers []Layer) error {
	if layers == nil {
		layers = []Layer{}
	}
	return WriteList(s.root, Layers, layers)
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}
