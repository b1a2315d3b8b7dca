// SPDX-License-Identifier: Apache-2.0

// Package ocidir reads OCI image layouts, directories and uncompressed archives of
// them, and writes the former: github.com/opencontainers/image-spec, image-layout.md.
//
// A [Layout] is a blob.Source that any part of a blob can be read from: an archive
// is not unpacked. It may lie on a stick that is pulled or on a server that is
// gone. So nothing is kept open between calls, what is not attached is a temporary
// error, and a call that hangs in the kernel is left behind when its context ends.
//
// What a layout holds is hostile: sizes and counts are bounded, no link leads out
// of its directory. Manifests and small blobs are verified here, ranges of blobs
// by whoever reads them.
package ocidir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
)

// Bounds of what is read.
const (
	maxIndex    = 64 << 20 // bytes of index.json
	MaxManifest = 8 << 20  // bytes of a manifest, as in package registry
	maxHanging  = 16       // calls that hang in the kernel
)

// ErrNoLayout means that a path is there and is no OCI layout.
var ErrNoLayout = errors.New("not an OCI layout, nor an archive of one")

// Layout is an OCI layout that is read: a directory, or an archive. Its methods may
// be called concurrently.
type Layout struct {
	path, name string
	calls      calls

	mu    sync.Mutex // protects the fields below
	table *table     // of the archive, as it was last seen
	index *index     // as it was last seen
}

var _ blob.Source = (*Layout)(nil)

// New returns the layout at a path, which need not be there yet.
func New(path string) *Layout {
	return &Layout{path: path, name: path, calls: make(calls, maxHanging)}
}

// Path is where the layout is.
func (l *Layout) Path() string { return l.path }

func (l *Layout) String() string { return l.name }

// index is what index.json said.
type index struct {
	id      identity
	content v1.Index
	named   map[string]v1.Descriptor
	// referrers are the manifests about others, by what they are about; nil until
	// somebody asks.
	referrers map[digest.Digest][]v1.Descriptor
}

// Index reads what the layout lists. Callers do not change it.
func (l *Layout) Index(ctx context.Context) (v1.Index, error) {
	idx, err := l.readIndex(ctx)
	if err != nil {
		return v1.Index{}, fmt.Errorf("reading %s: %w", l, err)
	}
	return idx.content, nil
}

func (l *Layout) readIndex(ctx context.Context) (*index, error) {
	return await(ctx, l.calls, func() (*index, error) {
		files, err := l.files()
		if err != nil {
			return nil, err
		}
		f, err := files.open(v1.ImageIndexFile)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: it has no %s", ErrNoLayout, v1.ImageIndexFile)
		}
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // read only
		l.mu.Lock()
		have := l.index
		l.mu.Unlock()
		if have != nil && have.id == f.id {
			return have, nil
		}
		body, err := f.whole(maxIndex)
		if err != nil {
			return nil, err
		}
		idx := &index{id: f.id}
		if err := json.Unmarshal(body, &idx.content); err != nil {
			return nil, fmt.Errorf("parsing %s: %w", v1.ImageIndexFile, err)
		}
		idx.named = named(idx.content)
		l.mu.Lock()
		l.index = idx
		l.mu.Unlock()
		return idx, nil
	}, nil)
}

// CheckVersion reads which version of the layout it is: an error if it is one that this
// program does not know.
func (l *Layout) CheckVersion(ctx context.Context) error {
	body, err := await(ctx, l.calls, func() ([]byte, error) {
		f, err := l.open(v1.ImageLayoutFile)
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // read only
		return f.whole(1 << 16)
	}, nil)
	if err != nil {
		return fmt.Errorf("reading %s of %s: %w", v1.ImageLayoutFile, l, err)
	}
	var doc v1.ImageLayout
	if err := json.Unmarshal(body, &doc); err != nil {
		return fmt.Errorf("parsing %s of %s: %w", v1.ImageLayoutFile, l, err)
	}
	if doc.Version != v1.ImageLayoutVersion {
		return fmt.Errorf("%s is an OCI layout of version %q; only %s is known", l, doc.Version, v1.ImageLayoutVersion)
	}
	return nil
}

// Files returns the names of all files of the layout, with their sizes in bytes, at
// most a million.
func (l *Layout) Files(ctx context.Context) (map[string]int64, error) {
	all, err := await(ctx, l.calls, func() (map[string]int64, error) {
		files, err := l.files()
		if err != nil {
			return nil, err
		}
		return files.all()
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", l, err)
	}
	return all, nil
}

// ContainerdName is how tools of containerd and Docker note the full name of an
// image: github.com/containerd/containerd, core/images/annotations.go.
const ContainerdName = "io.containerd.image.name"

// named finds the manifests that have a full name. Of two with the same name the
// first counts.
func named(content v1.Index) map[string]v1.Descriptor {
	all := map[string]v1.Descriptor{}
	for _, m := range content.Manifests {
		for _, key := range []string{ContainerdName, v1.AnnotationRefName} {
			if name, ok := FullName(m.Annotations[key]); ok {
				if _, taken := all[name]; !taken {
					all[name] = m
				}
			}
		}
	}
	return all
}

// FullName returns a name as references are written, if it says which registry it
// belongs to: a bare tag, as tools put into layouts, does not.
func FullName(name string) (string, bool) {
	ref, err := reference.ParseNamed(name) // fails for what it would have to complete
	if err != nil {
		return "", false
	}
	return reference.TagNameOnly(ref).String(), true
}

// Names returns the full names of the images and artifacts in the layout, sorted.
func (l *Layout) Names(ctx context.Context) ([]string, error) {
	idx, err := l.readIndex(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", l, err)
	}
	names := make([]string, 0, len(idx.named))
	for name := range idx.named {
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// Resolve returns the digest of the manifest that a reference names here:
// [blob.ErrNotFound] if there is none. Of a digest it is not known whether there is
// anything behind it.
func (l *Layout) Resolve(ctx context.Context, ref reference.Named) (digest.Digest, error) {
	if d, ok := ref.(reference.Digested); ok {
		return d.Digest(), nil
	}
	m, err := l.Listed(ctx, ref)
	return m.Digest, err
}

// Listed returns what index.json lists for a reference: [blob.ErrNotFound] if there
// is nothing.
func (l *Layout) Listed(ctx context.Context, ref reference.Named) (v1.Descriptor, error) {
	idx, err := l.readIndex(ctx)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("looking for %s in %s: %w", ref, l, err)
	}
	if m, ok := idx.named[reference.TagNameOnly(ref).String()]; ok {
		return m, nil
	}
	if d, ok := ref.(reference.Digested); ok {
		for _, m := range idx.content.Manifests {
			if m.Digest == d.Digest() {
				return m, nil
			}
		}
	}
	return v1.Descriptor{}, fmt.Errorf("looking for %s in %s: %w", ref, l, blob.ErrNotFound)
}

// Manifest reads a manifest or an index: by its digest; by its name, a full one or
// the bare tag that stands for it in this layout; by "" if there is just one.
func (l *Layout) Manifest(ctx context.Context, name string) (blob.Manifest, error) {
	d, err := digest.Parse(name)
	if err != nil {
		d, err = l.find(ctx, name)
	}
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("reading manifest %q of %s: %w", name, l, err)
	}
	body, err := l.whole(ctx, d, MaxManifest)
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("reading manifest %s of %s: %w", d, l, err)
	}
	return blob.Manifest{MediaType: mediaType(body), Digest: d, Body: body}, nil
}

// find finds the manifest with a name of this layout.
func (l *Layout) find(ctx context.Context, name string) (digest.Digest, error) {
	idx, err := l.readIndex(ctx)
	if err != nil {
		return "", err
	}
	if full, ok := FullName(name); ok {
		if m, ok := idx.named[full]; ok {
			return m.Digest, nil
		}
	}
	var some []v1.Descriptor
	for _, m := range idx.content.Manifests {
		if name != "" && m.Annotations[v1.AnnotationRefName] == name {
			return m.Digest, nil
		}
		if m.Annotations[v1.AnnotationRefName] != "" || m.ArtifactType == "" {
			some = append(some, m)
		}
	}
	switch {
	case name != "":
		return "", blob.ErrNotFound
	case len(some) != 1:
		return "", fmt.Errorf("it holds %d images; say which one", len(some))
	}
	return some[0].Digest, nil
}

// mediaType is what a manifest says it is, or what it must be by the fields that it
// has: the field is optional in images of OCI.
func mediaType(body []byte) string {
	var m struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Config    json.RawMessage `json:"config"`
	}
	switch err := json.Unmarshal(body, &m); {
	case err != nil:
		return ""
	case m.MediaType != "":
		return m.MediaType
	case m.Manifests != nil:
		return v1.MediaTypeImageIndex
	case m.Config != nil:
		return v1.MediaTypeImageManifest
	}
	return ""
}

// SplitTag splits a full name into repository and tag; not ok if it has a digest
// instead.
func SplitTag(name string) (repository, tag string, ok bool) {
	ref, err := reference.ParseNamed(name)
	if err != nil {
		return "", "", false
	}
	tagged, ok := ref.(reference.NamedTagged)
	if !ok {
		return "", "", false
	}
	return tagged.Name(), tagged.Tag(), true
}
