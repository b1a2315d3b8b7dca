// SPDX-License-Identifier: Apache-2.0

package sharedstore

import (
	"context"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/unpack"
)

// The files of a layer that is staged.
const (
	tarSplit  = "tar-split.gz"
	metaFile  = "layer.json"
	unpacking = ".unpacking" // ends the name of one that is not complete
)

// layerID is what an id must look like before it becomes a path.
var layerID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// meta is what a staged layer is to become.
type meta struct {
	Record imagestore.Layer `json:"record"`
	// What is still to be done, for which the layers below have to be there.
	RootImplied bool     `json:"rootImplied,omitempty"`
	Opaque      []string `json:"opaque,omitempty"`
}

// linkName is the short name of a layer, which mounts use: 26 characters, as
// containers/storage has them (drivers/overlay, idLength), out of its id.
func linkName(id string) string {
	raw, _ := hex.DecodeString(id) // it is a layerID
	return base32.StdEncoding.EncodeToString(raw)[:26]
}

// staged is where a layer is before it is recorded.
func (s *Store) staged(id string) string { return s.path(stagingDir, id) }

// unpack makes a layer and leaves it in staging, complete, verified and durable.
func (s *Store) unpack(ctx context.Context, id, parent string, l image.Layer, from []blob.Source, progress func(done int64)) error {
	if _, err := os.Stat(s.staged(id)); err == nil {
		return nil // an earlier writer has done this
	}
	dir := s.staged(id) + unpacking
	var failed error
	for _, src := range from {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		m, err := s.unpackFrom(ctx, dir, id, parent, l, src, progress)
		if err == nil {
			if err := atomicfile.WriteJSON(filepath.Join(dir, metaFile), m, 0o600); err != nil {
				return err
			}
			if err := s.sync(); err != nil {
				return err
			}
			if err := os.Rename(dir, s.staged(id)); err != nil {
				return err
			}
			return atomicfile.SyncDir(s.path(stagingDir))
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", src, err))
		if ctx.Err() != nil || errors.Is(err, unpack.ErrNotKept) || errors.Is(err, fs.ErrPermission) {
			break
		}
	}
	return errors.Join(failed, os.RemoveAll(dir))
}

func (s *Store) unpackFrom(ctx context.Context, dir, id, parent string, l image.Layer, src blob.Source, progress func(int64)) (*meta, error) {
	rc, err := src.Open(ctx, l.Blob(), 0, l.Size)
	if err != nil {
		return nil, err
	}
	defer rc.Close() //nolint:errcheck // read only; a broken stream shows in Read
	split, err := os.Create(filepath.Join(dir, tarSplit))
	if err != nil {
		return nil, err
	}
	res, err := unpack.Layer(ctx, &reporting{r: rc, progress: progress}, l.Size, dir, unpack.Options{Keeps: s.state.Keeps, TarSplit: split})
	if err := errors.Join(err, split.Close()); err != nil {
		return nil, err
	}
	if res.Blob != l.Digest || res.DiffID != l.DiffID {
		return nil, fmt.Errorf("it has digest %s and diff ID %s, not %s and %s: %w", res.Blob, res.DiffID, l.Digest, l.DiffID, blob.ErrCorrupt)
	}
	if res.Unsplit {
		if err := os.Remove(filepath.Join(dir, tarSplit)); err != nil {
			return nil, err
		}
	}
	return &meta{
		Record: imagestore.Layer{
			ID: id, Parent: parent, Created: time.Now().UTC(), BlobDigest: l.Digest, BlobSize: l.Size,
			DiffID: l.DiffID, DiffSize: res.DiffSize, Compression: compression(res.Compression),
		},
		RootImplied: res.RootImplied, Opaque: res.Opaque,
	}, nil
}

func compression(c index.Compression) imagestore.Compression {
	switch c {
	case index.Gzip:
		return imagestore.Gzip
	case index.Zstd:
		return imagestore.Zstd
	case index.None:
	}
	return imagestore.Uncompressed
}

// reporting reports what is read through it.
type reporting struct {
	r        io.Reader
	done     int64
	progress func(int64)
}

func (r *reporting) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.done += int64(n)
	r.progress(r.done)
	return n, err
}

// settle does what a staged layer needs the layers below for, which are recorded:
// nearest first. It may be done twice.
func (s *Store) settle(id string, below []string) (*meta, error) {
	var m meta
	if err := atomicfile.ReadJSON(filepath.Join(s.staged(id), metaFile), 1<<20, &m); err != nil {
		return nil, fmt.Errorf("reading staged layer %s: %w", id, err)
	}
	diff := filepath.Join(s.staged(id), unpack.Diff)
	var diffs, links []string
	for _, b := range below {
		diffs = append(diffs, s.path(driverDir, b, unpack.Diff))
		links = append(links, "l/"+linkName(b))
	}
	if m.RootImplied && len(diffs) > 0 {
		if err := unpack.InheritRoot(diff, diffs[0]); err != nil {
			return nil, err
		}
	}
	if err := unpack.HideBelow(diff, m.Opaque, diffs); err != nil {
		return nil, err
	}
	files := map[string]string{"link": linkName(id)}
	if len(links) > 0 {
		files["lower"] = strings.Join(links, ":")
	}
	for name, text := range files {
		if err := atomicfile.Write(filepath.Join(s.staged(id), name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	return &m, nil
}

// record records a staged layer that has been settled.
func (s *Store) record(ctx context.Context, m *meta) error {
	id := m.Record.ID
	if len(m.Opaque) > 0 {
		if err := s.sync(); err != nil {
			return err
		}
	}
	unlock, err := imagestore.Lock(ctx, s.root, imagestore.Layers)
	if err != nil {
		return err
	}
	defer unlock()
	layers, err := s.layers()
	if err != nil {
		return err
	}
	if err := imagestore.WriteList(s.root, imagestore.Layers, append(layers, m.Record)); err != nil {
		return err
	}
	return s.place(id)
}

// place moves a staged layer to where its record leads.
func (s *Store) place(id string) error {
	link := s.path(driverDir, "l", linkName(id))
	if err := os.Symlink(filepath.Join("..", id, unpack.Diff), link); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	split := filepath.Join(s.staged(id), tarSplit)
	if err := os.Rename(split, s.splitFile(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(s.staged(id), s.path(driverDir, id)); err != nil {
		return err
	}
	return errors.Join(atomicfile.SyncDir(s.path(driverDir, "l")), atomicfile.SyncDir(s.path(layersDir)), atomicfile.SyncDir(s.path(driverDir)), atomicfile.SyncDir(s.path(stagingDir)))
}

// splitFile is where containers/storage has the tar-split of a layer.
func (s *Store) splitFile(id string) string { return s.path(layersDir, id+".tar-split.gz") }
