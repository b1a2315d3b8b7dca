// SPDX-License-Identifier: Apache-2.0

// Package indexes finds indexes for layers that carry none, says what they are
// worth, and keeps those that were made here for other nodes.
//
// A [Finder] knows the node's own directory, whose indexes were made here from the
// whole of their layers, and the places of the configuration. What it finds in
// those is only as true as whoever can write there: see [index.Trust].
package indexes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/soci"
	"github.com/holdfast/holdfast/internal/indexstore"
)

// OwnLimit is the disk space of a node's own indexes, in bytes.
const OwnLimit = 2 << 30

// Config is what a Finder works with.
type Config struct {
	// Own is the directory of what was made here, from the whole of layers.
	Own string
	// Limit is the disk space that Own may take, in bytes; 0: any.
	Limit int64
	// Temp is where temporary files go; "" is Own, which then belongs to this node
	// alone.
	Temp string
	// Look and Publish are where indexes are looked for, in this order, and where
	// those that are made here go.
	Look, Publish []index.Place
	Registry      *registry.Client
	Logger        *slog.Logger
	// Tool names the program in the indexes that it makes.
	Tool string
}

// Finder finds and keeps indexes. Its methods may be called concurrently.
type Finder struct {
	Config
	own *indexstore.Dir

	mu   sync.Mutex
	said map[string]bool // what has been logged once
}

// New returns a Finder. The directory need not exist.
func New(c Config) (*Finder, error) {
	if c.Temp == "" {
		c.Temp = c.Own
		if err := os.MkdirAll(c.Own, 0o700); err != nil {
			return nil, fmt.Errorf("creating directory for indexes: %w", err)
		}
	}
	return &Finder{Config: c, own: indexstore.NewDir(c.Own), said: map[string]bool{}}, nil
}

// Offline returns a Finder that leaves out repositories.
func (f *Finder) Offline() *Finder {
	c := f.Config
	local := func(places []index.Place) (dirs []index.Place) {
		for _, p := range places {
			if !strings.HasPrefix(string(p), index.RepositoryPlace) {
				dirs = append(dirs, p)
			}
		}
		return dirs
	}
	c.Look, c.Publish = local(c.Look), local(c.Publish)
	return &Finder{Config: c, own: f.own, said: map[string]bool{}}
}

// Looks reports whether indexes are looked for anywhere but on this node.
func (f *Finder) Looks() bool { return len(f.Look) > 0 }

// Publishes reports whether there is any place to publish to.
func (f *Finder) Publishes() bool { return len(f.Config.Publish) > 0 }

// Own is the place of what was made here.
func (f *Finder) Own() *indexstore.Dir { return f.own }

// Temp returns a file without a name for what is on its way to an index.
func (f *Finder) Temp() (*os.File, error) {
	file, err := os.OpenFile(f.Config.Temp, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) { // overlayfs before Linux 6.1
		if file, err = os.CreateTemp(f.Config.Temp, "holdfast-index-"); err == nil {
			err = os.Remove(file.Name())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("creating temporary file for an index: %w", err)
	}
	return file, nil
}

// Image is one image whose layers need indexes. Its methods may be called
// concurrently.
type Image struct {
	f       *Finder
	repo    *registry.Repository
	subject indexstore.Subject
	look    []Place
}

// Place is a place, and what indexes from there are worth.
type Place struct {
	indexstore.Place
	Trust index.Trust
}

// Image returns the places for an image. The readers are where it is itself, in the
// order in which to ask them; what is published goes to the first of them that is a
// repository.
func (f *Finder) Image(img *image.Image, readers ...indexstore.Reader) *Image {
	i := &Image{f: f, subject: indexstore.Subject{MediaType: img.Manifest.MediaType, Digest: img.Manifest.Digest, Size: img.Manifest.Size}}
	for _, r := range readers {
		if repo, ok := r.(*registry.Repository); ok && i.repo == nil {
			i.repo = repo
		}
		if img.Bound != "" {
			i.look = append(i.look, Place{indexstore.NewImage(r, i.subject, img.Bound), index.Bound})
		}
	}
	for _, p := range f.Look {
		if p == index.RegistryPlace {
			for _, r := range readers {
				i.look = append(i.look, Place{indexstore.NewImage(r, i.subject, ""), index.Found})
			}
			continue
		}
		if place, err := i.Open(p); err != nil {
			f.once("looking", p, err)
		} else {
			i.look = append(i.look, Place{place, index.Found})
		}
	}
	return i
}

// Open opens a place of the configuration to publish to it.
func (i *Image) Open(p index.Place) (indexstore.Place, error) {
	name, ok := strings.CutPrefix(string(p), index.RepositoryPlace)
	switch {
	case p == index.RegistryPlace && i.repo == nil:
		return nil, fmt.Errorf("image %s is in no registry", i.subject.Digest)
	case p == index.RegistryPlace:
		return indexstore.NewImage(i.repo, i.subject, ""), nil
	case !ok:
		return indexstore.NewDir(string(p)), nil
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("repository %q: %w", name, err)
	}
	all, err := i.f.Registry.Endpoints(named, nil)
	if err == nil && len(all) == 0 {
		err = fmt.Errorf("repository %s is nowhere", name)
	}
	if err != nil {
		return nil, err
	}
	return indexstore.NewRepository(all[len(all)-1]), nil // not a mirror
}

// Places are where indexes of the image's layers are looked for, the best first:
// the node's own directory, then the others.
func (i *Image) Places() []Place {
	return append([]Place{{i.f.own, index.Verified}}, i.look...)
}

// Index is an index that was found. It must be closed when it has been used.
type Index struct {
	*soci.File
	Trust index.Trust
	From  string // the place
	// Digests is what came with it; zero if nothing did.
	Digests Digests
}

// Find looks for an index that is worth at least that much. It wraps
// [index.ErrNoIndex] if there is none; what keeps a place from answering, and what
// is wrong with what was found, is logged, and does not keep it from others.
func (i *Image) Find(ctx context.Context, l image.Layer, least index.Trust) (*Index, error) {
	for _, place := range i.Places() {
		if place.Trust < least {
			continue
		}
		got, err := i.f.Fetch(ctx, place, l)
		switch {
		case err == nil:
			return got, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errors.Is(err, fs.ErrNotExist):
		default:
			i.f.Logger.Warn("index is of no use", "layer", l.Digest.String(), "from", place.String(), "err", err)
		}
	}
	return nil, fmt.Errorf("layer %s: %w", l.Digest, index.ErrNoIndex)
}

// Fetch reads the index of a layer from a place. The error wraps fs.ErrNotExist if
// there is none, [index.ErrInvalid] or [index.ErrTooLarge] if it is damaged, not
// sound, or that of another layer; others are those of [indexstore.Place].
func (f *Finder) Fetch(ctx context.Context, place Place, l image.Layer) (_ *Index, err error) {
	got := &Index{Trust: place.Trust, From: place.String()}
	var digests bytes.Buffer
	err = place.Fetch(ctx, l.Digest, indexstore.Digests, maxDigests(), &digests)
	if err == nil {
		got.Digests, err = DecodeDigests(digests.Bytes(), l.Digest)
	}
	own := place.Trust == index.Verified
	switch {
	case err != nil && (own || !errors.Is(err, fs.ErrNotExist)):
		return nil, err
	case got.Digests.DiffID != "" && got.Digests.DiffID != l.DiffID:
		return nil, fmt.Errorf("it is that of a layer with diff ID %s, the image states %s: %w", got.Digests.DiffID, l.DiffID, index.ErrInvalid)
	}
	file, err := f.Temp()
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // it has no name
	sum := digest.SHA256.Digester()
	if err := place.Fetch(ctx, l.Digest, indexstore.ZTOC, soci.MaxBytes, io.MultiWriter(file, sum.Hash())); err != nil {
		return nil, err
	}
	if want := got.Digests.ZTOC; want != "" && want != sum.Digest() {
		return nil, fmt.Errorf("its zTOC has digest %s, not %s: %w", sum.Digest(), want, index.ErrInvalid)
	}
	if got.File, err = soci.Open(file, l.Size); err != nil {
		return nil, err
	}
	return got, nil
}

// once reports, the first time only, that a place is of no use for something.
func (f *Finder) once(use string, p index.Place, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if key := use + " " + string(p); !f.said[key] {
		f.said[key] = true
		f.Logger.Warn("place of indexes cannot be used", "place", string(p), "for", use, "err", err)
	}
}
