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

// ownLimit is the disk space of the node's own indexes, in bytes.
const ownLimit = 2 << 30

// Config is what a Finder works with.
type Config struct {
	// Own is the node's own directory, on local disk.
	Own string
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
	if err := os.MkdirAll(c.Own, 0o700); err != nil {
		return nil, fmt.Errorf("creating directory for indexes: %w", err)
	}
	return &Finder{Config: c, own: indexstore.NewDir(c.Own), said: map[string]bool{}}, nil
}

// Looks reports whether indexes are looked for anywhere but on this node.
func (f *Finder) Looks() bool { return len(f.Look) > 0 }

// Publishes reports whether there is any place to publish to.
func (f *Finder) Publishes() bool { return len(f.Config.Publish) > 0 }

// Own is the place of what was made here.
func (f *Finder) Own() *indexstore.Dir { return f.own }

// Temp returns a file without a name for what is on its way to an index.
func (f *Finder) Temp() (*os.File, error) {
	file, err := os.OpenFile(f.Config.Own, os.O_RDWR|unix.O_TMPFILE, 0o600)
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
	look    []found
}

// found is a place, and what indexes from there are worth.
type found struct {
	indexstore.Place
	trust index.Trust
}

// Image returns the places for an image that was read from repo; nil is one that is
// in no registry.
func (f *Finder) Image(repo *registry.Repository, img *image.Image) *Image {
	subject := indexstore.Subject{MediaType: img.Manifest.MediaType, Digest: img.Manifest.Digest, Size: img.Manifest.Size}
	i := &Image{f: f, repo: repo, subject: subject}
	if img.Bound != "" && repo != nil {
		i.look = append(i.look, found{indexstore.NewImage(repo, subject, img.Bound), index.Bound})
	}
	for _, p := range f.Look {
		if place := i.place(p); place != nil {
			i.look = append(i.look, found{place, index.Found})
		}
	}
	return i
}

// place opens a place of the configuration; nil if that is impossible.
func (i *Image) place(p index.Place) indexstore.Place {
	name, ok := strings.CutPrefix(string(p), index.RepositoryPlace)
	switch {
	case p == index.RegistryPlace:
		return indexstore.NewImage(i.repo, i.subject, "")
	case !ok:
		return indexstore.NewDir(string(p))
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err == nil {
		var all []*registry.Repository
		if all, err = i.f.Registry.Endpoints(named, nil); err == nil && len(all) > 0 {
			return indexstore.NewRepository(all[len(all)-1]) // not a mirror
		}
	}
	i.f.once("index place cannot be used", string(p), err)
	return nil
}

// Layer is a layer that needs an index.
type Layer struct {
	Digest digest.Digest
	Size   int64 // of the blob, in bytes
	DiffID digest.Digest
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
func (i *Image) Find(ctx context.Context, l Layer, least index.Trust) (*Index, error) {
	for _, place := range append([]found{{i.f.own, index.Verified}}, i.look...) {
		if place.trust < least {
			continue
		}
		got, err := i.f.fetch(ctx, place, l)
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

// fetch reads the index of a layer from a place.
func (f *Finder) fetch(ctx context.Context, place found, l Layer) (_ *Index, err error) {
	got := &Index{Trust: place.trust, From: place.String()}
	var digests bytes.Buffer
	err = place.Fetch(ctx, l.Digest, indexstore.Digests, maxDigests(), &digests)
	if err == nil {
		got.Digests, err = DecodeDigests(digests.Bytes(), l.Digest)
	}
	own := place.trust == index.Verified
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
	if err := place.Fetch(ctx, l.Digest, indexstore.ZTOC, soci.MaxBytes, file); err != nil {
		return nil, err
	}
	got.File, err = soci.Open(file, l.Size)
	return got, err
}

// once logs a warning the first time that it concerns the object.
func (f *Finder) once(message, object string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if key := message + " " + object; !f.said[key] {
		f.said[key] = true
		f.Logger.Warn(message, "place", object, "err", err)
	}
}
