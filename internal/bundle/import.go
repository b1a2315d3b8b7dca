// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/go-containerregistry/pkg/v1/types"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/filelock"
)

// ErrNotThere means that a bundle has nothing of a name.
var ErrNotThere = errors.New("it is not in the bundle")

// Names returns the full names in a bundle, or those of them that are asked for, without
// what cosign keeps beside them.
func Names(ctx context.Context, l *ocidir.Layout, wanted []string) ([]string, error) {
	all, err := l.Names(ctx)
	if err != nil {
		return nil, err
	}
	if wanted == nil {
		return slices.DeleteFunc(all, isBeside), nil
	}
	var some []string
	for _, w := range wanted {
		full, ok := ocidir.FullName(w)
		if !ok || !slices.Contains(all, full) {
			return nil, fmt.Errorf("%s: %w", w, ErrNotThere)
		}
		some = append(some, full)
	}
	return some, nil
}

// isBeside reports whether a name is one of those that cosign makes of a digest.
func isBeside(name string) bool {
	_, tag, ok := ocidir.SplitTag(name)
	const prefix, hexLen = "sha256-", 64
	return ok && len(tag) > len(prefix)+hexLen && tag[:len(prefix)] == prefix && tag[len(prefix)+hexLen] == '.'
}

// Import copies images and artifacts of a bundle, with what refers to them, to another
// layout. Names that are there move.
func Import(ctx context.Context, l *ocidir.Layout, names []string, to ocidir.Sink, o Options) ([]*Packed, error) {
	if err := l.CheckVersion(ctx); err != nil {
		return nil, err
	}
	p := New(to, o)
	all := []*Packed{}
	for _, name := range names {
		got, err := p.Pack(ctx, Origin{Name: name, Asked: name, Reader: l, Sources: []blob.Source{l}})
		if err != nil {
			return all, err
		}
		all = append(all, got)
	}
	return all, p.Finish(ctx)
}

// ErrNoArtifact means that something is an image, which artifact stores do not hold.
var ErrNoArtifact = errors.New("it is an image: import it into an image store (--image-store) or a source (--to)")

// ArtifactStore is an artifact store of CRI-O: the layout in the subdirectory artifacts
// of what additional_artifact_stores names (go.podman.io/common, pkg/libartifact/store).
// Its readers take a lock; they know no image indexes, and find artifacts by their full
// names only.
type ArtifactStore struct{ *ocidir.Writer }

// artifactLock is the lock file of such a store, which its readers open for writing.
const artifactLock = "index.lock"

// OpenArtifactStore opens an artifact store, and makes what is missing of it.
func OpenArtifactStore(path string) (*ArtifactStore, error) {
	dir := filepath.Join(path, "artifacts")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening artifact store: %w", err)
	}
	w, err := ocidir.Create(dir)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, artifactLock), os.O_CREATE|os.O_RDWR, 0o644) //nolint:gosec // as CRI-O makes it
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening artifact store: %w", err), w.Close())
	}
	return &ArtifactStore{w}, f.Close()
}

// List changes what the store lists, while no reader looks: only artifacts, each digest
// with one name.
func (a *ArtifactStore) List(ctx context.Context, change func([]v1.Descriptor) ([]v1.Descriptor, error)) error {
	f, err := os.OpenFile(filepath.Join(a.Path(), artifactLock), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("locking artifact store: %w", err)
	}
	defer f.Close() //nolint:errcheck // ends the lock
	if err := filelock.Wait(ctx, f); err != nil {
		return fmt.Errorf("locking artifact store: %w", err)
	}
	return a.Writer.List(ctx, func(have []v1.Descriptor) ([]v1.Descriptor, error) {
		list, err := change(have)
		if err != nil {
			return nil, err
		}
		seen := map[string]string{}
		for _, d := range list {
			name := d.Annotations[v1.AnnotationRefName]
			if other, ok := seen[d.Digest.String()]; ok && name != other {
				return nil, fmt.Errorf("%s is the same artifact as %s: CRI-O finds neither if an artifact store has both", name, other)
			}
			seen[d.Digest.String()] = name
		}
		return list, nil
	})
}

// ImportArtifacts copies artifacts of a bundle to an artifact store: [ErrNoArtifact] if
// one is an image.
func ImportArtifacts(ctx context.Context, l *ocidir.Layout, names []string, to *ArtifactStore, o Options) ([]*Packed, error) {
	for _, name := range names {
		m, err := l.Manifest(ctx, name)
		if err != nil {
			return nil, err
		}
		var doc v1.Manifest
		if err := json.Unmarshal(m.Body, &doc); err != nil {
			return nil, fmt.Errorf("parsing manifest %s: %w", m.Digest, err)
		}
		if types.MediaType(m.MediaType).IsIndex() || types.MediaType(doc.Config.MediaType).IsConfig() {
			return nil, fmt.Errorf("%s: %w", name, ErrNoArtifact)
		}
	}
	o.NoReferrers = true // readers would take them for artifacts without a name
	return Import(ctx, l, names, to, o)
}

// Exists reports whether there is anything at a path.
func Exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// List returns what is in a bundle, without reading its blobs.
func List(ctx context.Context, l *ocidir.Layout) ([]*Packed, error) {
	names, err := Names(ctx, l, nil)
	if err != nil {
		return nil, err
	}
	all := []*Packed{}
	for _, name := range names {
		p := New(counting{}, Options{})
		got, err := p.Pack(ctx, Origin{Name: name, Asked: name, Reader: l})
		if err != nil {
			return nil, err
		}
		all = append(all, got)
	}
	return all, nil
}

// counting is a sink that has everything.
type counting struct{}

func (counting) Has(context.Context, blob.Descriptor) (bool, error) { return true, nil }

func (counting) Put(context.Context, blob.Descriptor, io.Reader) error { return nil }

func (counting) List(context.Context, func([]v1.Descriptor) ([]v1.Descriptor, error)) error {
	return nil
}
