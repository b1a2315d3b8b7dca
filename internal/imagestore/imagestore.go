// SPDX-License-Identifier: Apache-2.0

// Package imagestore reads and writes the layout of containers/storage: the
// additional image store in which our layers are recorded, and the main stores
// of the runtimes, to see what they refer to.
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
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
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
}

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
type Store struct{ root string }

// Create opens the store at root and makes what is missing of it.
func Create(root string) (*Store, error) {
	s := &Store{root: root}
	for _, dir := range []string{layersDir, imagesDir, filepath.Join(driverDir, "l"), stagingDir} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			return nil, fmt.Errorf("creating image store: %w", err)
		}
	}
	for _, name := range []string{
		filepath.Join(layersDir, layersJSON), filepath.Join(imagesDir, imagesJSON),
		filepath.Join(layersDir, layersLock), filepath.Join(imagesDir, imagesLock),
	} {
		if err := s.createFile(filepath.Join(root, name)); err != nil {
			return nil, fmt.Errorf("creating image store: %w", err)
		}
	}
	return s, nil
}

// createFile makes an empty list or lock file, complete from its first instant.
func (s *Store) createFile(name string) error {
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
func (s *Store) Layers() ([]Layer, error) {
	var layers []Layer
	if err := atomicfile.ReadJSON(filepath.Join(s.root, layersDir, layersJSON), maxJSON, &layers); err != nil {
		return nil, fmt.Errorf("reading records of %s: %w", s.root, err)
	}
	return layers, nil
}

// stagingDir holds directories on their way into overlay/ and out of it.
const stagingDir = "staging"

// layerID is what an id must look like before it becomes a path.
var layerID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Publish records a chain of layers, base first, each the parent of the next.
// Layers that are recorded already stay as they are. The tree of a layer is
// <MountDirectory>/diff, and <MountDirectory>/l/x points to it; MountDirectory
// is absolute and need not exist yet.
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
	lower := "" // the lower file of the next layer: its parents, nearest first
	for i, l := range chain {
		if err := checkChain(chain, i); err != nil {
			return err
		}
		if !known[l.ID] {
			if err := s.stage(l, lower); err != nil {
				return fmt.Errorf("publishing layer %s: %w", l.ID, err)
			}
			layers = append(layers, l)
		}
		lower = strings.TrimSuffix(linkText(l.MountDirectory)+":"+lower, ":")
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
	if !layerID.MatchString(l.ID) || l.Parent != parent || l.ID != ChainID(parent, l.DiffID) || !filepath.IsAbs(l.MountDirectory) {
		return fmt.Errorf("publishing layer %q: it does not continue its chain", l.ID)
	}
	return nil
}

// stage makes a layer's directory. The link trick lets a runtime clone and
// id-map the mount of the layer itself: link and lower lead out of the store,
// by more ".." than any store is deep, into the mount.
func (s *Store) stage(l Layer, lower string) error {
	dir := s.path(stagingDir, l.ID)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	// A directory that a crash left without its record.
	if err := os.RemoveAll(s.path(driverDir, l.ID)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join(l.MountDirectory, "diff"), filepath.Join(dir, "diff")); err != nil {
		return err
	}
	if err := atomicfile.Write(filepath.Join(dir, "link"), []byte(linkText(l.MountDirectory)), 0o600); err != nil {
		return err
	}
	if lower == "" {
		return nil
	}
	return atomicfile.Write(filepath.Join(dir, "lower"), []byte(lower), 0o600)
}

func linkText(mount string) string {
	return strings.Repeat("../", 10) + strings.TrimPrefix(filepath.Join(mount, "l", "x"), "/")
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
	return nil
}

// dropDirectory makes a layer's directory vanish at once.
func (s *Store) dropDirectory(id string) error {
	if err := os.RemoveAll(s.path(stagingDir, id)); err != nil {
		return err
	}
	err := os.Rename(s.path(driverDir, id), s.path(stagingDir, id))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(s.path(stagingDir, id))
}

// Recover puts right what a crash left: directories without a record go, and
// records without a directory get it back if mountDirectory knows the layer's
// blob. It returns the ids of records that it could not make whole.
func (s *Store) Recover(ctx context.Context, mountDirectory func(blob digest.Digest) (string, bool)) ([]string, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	layers, err := s.Layers()
	if err != nil {
		return nil, err
	}
	byID := map[string]Layer{}
	for _, l := range layers {
		byID[l.ID] = l
	}
	if err := s.dropStrays(byID); err != nil {
		return nil, err
	}
	var broken []string
	for _, l := range layers {
		if _, err := os.Lstat(s.path(driverDir, l.ID, "diff")); err == nil {
			continue
		}
		lower, ok := "", layerID.MatchString(l.ID)
		for p := l; ok && p.Parent != ""; {
			p, ok = byID[p.Parent]
			var dir string
			if ok {
				dir, ok = mountDirectory(p.BlobDigest)
			}
			lower = strings.TrimPrefix(lower+":"+linkText(dir), ":")
		}
		if l.MountDirectory, ok = withDirectory(ok, l.BlobDigest, mountDirectory); !ok {
			broken = append(broken, l.ID)
			continue
		}
		if err := s.stage(l, lower); err != nil {
			return nil, fmt.Errorf("recovering layer %s: %w", l.ID, err)
		}
		if err := os.Rename(s.path(stagingDir, l.ID), s.path(driverDir, l.ID)); err != nil {
			return nil, fmt.Errorf("recovering layer %s: %w", l.ID, err)
		}
	}
	return broken, nil
}

func withDirectory(ok bool, blob digest.Digest, mountDirectory func(digest.Digest) (string, bool)) (string, bool) {
	if !ok {
		return "", false
	}
	return mountDirectory(blob)
}

// dropStrays removes layer directories that have no record.
func (s *Store) dropStrays(known map[string]Layer) error {
	for _, dir := range []string{driverDir, stagingDir} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			return fmt.Errorf("recovering %s: %w", s.root, err)
		}
		for _, e := range entries {
			_, recorded := known[e.Name()]
			if dir == driverDir && (recorded || e.Name() == "l") {
				continue
			}
			if err := os.RemoveAll(s.path(dir, e.Name())); err != nil {
				return fmt.Errorf("recovering %s: %w", s.root, err)
			}
		}
	}
	return nil
}

// writeLayers replaces the list of records. The caller holds the lock.
func (s *Store) writeLayers(layers []Layer) error {
	if layers == nil {
		layers = []Layer{}
	}
	if err := atomicfile.WriteJSON(s.path(layersDir, layersJSON), layers, 0o600); err != nil {
		return fmt.Errorf("writing records of %s: %w", s.root, err)
	}
	if err := s.recordWrite(); err != nil {
		return fmt.Errorf("writing records of %s: %w", s.root, err)
	}
	return nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}
