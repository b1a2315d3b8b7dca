// SPDX-License-Identifier: Apache-2.0

// Package artifactstore keeps artifact stores: what CRI-O and Podman read artifacts from,
// such as the weights of models. A store is an OCI layout with rules of its own, which
// its readers (go.podman.io/common, pkg/libartifact) do not tell:
//
//   - An index, or a manifest that they cannot parse, makes them fail for everything else
//     in the store.
//   - Artifacts are found by their full names, in index.json, or by the digests of their
//     manifests, of which no two entries may have the same: see [Alias].
//   - Readers open the lock file for writing, and parse index.json once an artifact.
//   - Files are mounted as they are, with the names that the manifest gives them.
package artifactstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/bundle"
	"github.com/holdfast/holdfast/internal/filelock"
	"github.com/holdfast/holdfast/internal/image"
)

// Where a store is below what additional_artifact_stores names, and the lock that its
// readers open for writing.
const (
	Subdirectory = "artifacts"
	LockName     = "index.lock"
)

// Errors of a store.
var (
	ErrUnknown = errors.New("it is not in the store")
	ErrNoRoom  = errors.New("there is no room for it")
)

// Store is a store that is open for writing; there is one writer at a time. Its methods
// are called one at a time. It is an ocidir.Sink.
type Store struct {
	*ocidir.Writer
	path string
}

var _ ocidir.Sink = (*Store)(nil)

// Layout is the store at a path, for reading.
func Layout(path string) *ocidir.Layout { return ocidir.New(filepath.Join(path, Subdirectory)) }

// Exists reports whether there is a store at a path.
func Exists(path string) bool {
	_, err := os.Stat(filepath.Join(path, Subdirectory, v1.ImageIndexFile))
	return err == nil
}

// Open opens a store for writing, and makes what is missing of it. The error is
// [ocidir.ErrBusy] while another process writes to it.
func Open(path string) (*Store, error) {
	dir := filepath.Join(path, Subdirectory)
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // runtimes read stores as any user
		return nil, fmt.Errorf("opening artifact store: %w", err)
	}
	w, err := ocidir.Create(dir)
	if err != nil {
		return nil, fmt.Errorf("opening artifact store: %w", err)
	}
	w.Compact = true
	f, err := os.OpenFile(filepath.Join(dir, LockName), os.O_CREATE|os.O_RDWR, 0o644) //nolint:gosec // as its readers make it
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening artifact store: %w", err), w.Close())
	}
	return &Store{w, path}, f.Close()
}

// List changes what the store lists, while no reader looks. Only what readers understand
// may be listed; further names of a digest get manifests of their own.
func (s *Store) List(ctx context.Context, change func([]v1.Descriptor) ([]v1.Descriptor, error)) error {
	f, err := os.OpenFile(filepath.Join(s.Path(), LockName), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("locking artifact store: %w", err)
	}
	defer f.Close() //nolint:errcheck // ends the lock
	if err := filelock.Wait(ctx, f); err != nil {
		return fmt.Errorf("locking artifact store: %w", err)
	}
	return s.Writer.List(ctx, func(have []v1.Descriptor) ([]v1.Descriptor, error) {
		list, err := change(have)
		if err != nil {
			return nil, err
		}
		at := map[digest.Digest]int{}
		for i, d := range list {
			// Readers go by what is said here, and know nothing without it.
			list[i].MediaType = v1.MediaTypeImageManifest
			if _, taken := at[d.Digest]; taken {
				if list[i], err = s.alias(ctx, list[i]); err != nil {
					return nil, err
				}
			}
			if other, taken := at[list[i].Digest]; taken {
				// It came here under another name than it was made for: now it gets its own.
				if list[other], err = s.alias(ctx, list[other]); err != nil {
					return nil, err
				}
				at[list[other].Digest] = other
			}
			at[list[i].Digest] = i
		}
		return list, nil
	})
}

// alias stores a manifest for a further name of a digest.
func (s *Store) alias(ctx context.Context, d v1.Descriptor) (v1.Descriptor, error) {
	if ref, err := reference.ParseNamed(d.Annotations[v1.AnnotationRefName]); err == nil {
		if _, digested := ref.(reference.Digested); digested {
			return d, fmt.Errorf("%s is in the store under another name, and a second one with a digest is not found: %w", ref, ErrName)
		}
	}
	m, err := s.Manifest(ctx, d.Digest.String())
	if err == nil {
		m, err = Alias(m, d.Annotations[v1.AnnotationRefName])
	}
	if err != nil {
		return d, err
	}
	d.Digest, d.Size = m.Digest, int64(len(m.Body))
	return d, s.Put(ctx, blob.Descriptor{Digest: d.Digest, Size: d.Size}, bytes.NewReader(m.Body))
}

// Summary is an artifact of a store.
type Summary struct {
	Name   string        `json:"name"`
	Digest digest.Digest `json:"digest"`
	// Listed is the digest that readers see, if it is another: see [Alias].
	Listed digest.Digest `json:"listed,omitempty"`
	Type   string        `json:"type"`
	Size   int64         `json:"size"` // of its files, in bytes
	Files  []File        `json:"files"`
	// Error is why readers cannot use it.
	Error string `json:"error,omitempty"`
}

// File is a file of an artifact.
type File struct {
	Name   string        `json:"name"` // "" if it cannot be mounted
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

func summarize(name string, m blob.Manifest) Summary {
	s := Summary{Name: name, Digest: m.Digest, Files: []File{}}
	a, err := Parse(m)
	if err != nil {
		s.Error = err.Error()
		return s
	}
	s.Digest, s.Type, s.Size = a.Original, a.Type(), a.Size()
	if s.Digest != m.Digest {
		s.Listed = m.Digest
	}
	for _, d := range a.Layers {
		s.Files = append(s.Files, File{Name: FileName(d), Digest: d.Digest, Size: d.Size})
	}
	return s
}

// List returns what a store lists, in its order.
func List(ctx context.Context, l *ocidir.Layout) ([]Summary, error) {
	idx, err := l.Index(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing artifact store: %w", err)
	}
	all := []Summary{}
	for _, d := range idx.Manifests {
		name := d.Annotations[v1.AnnotationRefName]
		m, err := l.Manifest(ctx, d.Digest.String())
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			all = append(all, Summary{Name: name, Digest: d.Digest, Files: []File{}, Error: err.Error()})
			continue
		}
		all = append(all, summarize(name, m))
	}
	return all, nil
}

// Add copies an artifact to the store, for one platform if it has several. A name that
// is there moves.
func (s *Store) Add(ctx context.Context, o bundle.Origin, p image.Platform, options bundle.Options) (*Summary, error) {
	added, err := s.add(ctx, o, p, options)
	if err != nil {
		return nil, fmt.Errorf("adding artifact %s to %s: %w", o.Name, s.path, err)
	}
	return added, nil
}

func (s *Store) add(ctx context.Context, o bundle.Origin, p image.Platform, options bundle.Options) (*Summary, error) {
	if _, err := CheckName(o.Name); err != nil {
		return nil, err
	}
	m, err := image.Manifest(ctx, o.Reader, o.Asked, p)
	if err != nil {
		return nil, err
	}
	a, err := Parse(m)
	if err == nil {
		err = checkDigest(o.Name, m.Digest)
	}
	if err != nil {
		return nil, err
	}
	if err := s.room(ctx, a.Blobs()); err != nil {
		return nil, err
	}
	o.Asked = m.Digest.String()
	options.NoReferrers = true // readers would take them for artifacts without a name
	packer := bundle.New(s, options)
	if _, err := packer.Pack(ctx, o); err != nil {
		return nil, err
	}
	if err := s.need(append(a.Blobs(), blob.Descriptor{Digest: m.Digest})); err != nil {
		return nil, err
	}
	return s.finish(ctx, packer, o.Name)
}

// Has reports whether a blob is there, and is what its digest says: adding an artifact
// again is how a store that was harmed is mended.
func (s *Store) Has(ctx context.Context, desc blob.Descriptor) (bool, error) {
	have, err := s.Writer.Has(ctx, desc)
	if !have || err != nil {
		return false, err
	}
	err = ocidir.Check(ctx, s.Layout, desc, func(int64) {})
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	return err == nil, nil
}

// finish lists what was packed.
func (s *Store) finish(ctx context.Context, p *bundle.Packer, name string) (*Summary, error) {
	if err := p.Finish(ctx); err != nil {
		return nil, err
	}
	if err := s.note(ctx); err != nil {
		return nil, err
	}
	return s.find(ctx, name)
}

// find returns an artifact as it is listed.
func (s *Store) find(ctx context.Context, name string) (*Summary, error) {
	all, err := List(ctx, s.Layout)
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(all, func(a Summary) bool { return a.Name == name }); i >= 0 {
		return &all[i], nil
	}
	return nil, ErrUnknown
}

// room checks that there is room on the disk for the blobs that are not there.
func (s *Store) room(ctx context.Context, blobs []blob.Descriptor) error {
	var needs int64
	for _, d := range blobs {
		have, err := s.Writer.Has(ctx, d)
		if err != nil {
			return err
		}
		if !have {
			needs += d.Size
		}
	}
	return s.roomFor(needs)
}

func (s *Store) roomFor(needs int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.Path(), &st); err != nil {
		return fmt.Errorf("measuring the disk of %s: %w", s.path, err)
	}
	if free := int64(st.Bavail) * st.Bsize; needs > free { //nolint:gosec // disks are smaller
		return fmt.Errorf("%w: it needs %s, the disk of %s has %s free", ErrNoRoom, units.BytesSize(float64(needs)), s.path, units.BytesSize(float64(free)))
	}
	return nil
}

// Remove takes artifacts out of the store, by name or digest: all, or none. Their files
// stay, since containers may read them: see [Store.Prune].
func (s *Store) Remove(ctx context.Context, names ...string) error {
	all, err := List(ctx, s.Layout)
	if err != nil {
		return err
	}
	type entry struct { // a name alone is none: several may lack one
		name   string
		digest digest.Digest
	}
	gone := map[entry]bool{}
	for _, n := range names {
		found := false
		for _, a := range all {
			listed := a.Digest
			if a.Listed != "" {
				listed = a.Listed
			}
			if a.Name == n || a.Digest.String() == n || listed.String() == n {
				gone[entry{a.Name, listed}], found = true, true
			}
		}
		if !found {
			return fmt.Errorf("artifact %s: %w", n, ErrUnknown)
		}
	}
	err = s.List(ctx, func(list []v1.Descriptor) ([]v1.Descriptor, error) {
		return slices.DeleteFunc(list, func(d v1.Descriptor) bool { return gone[entry{d.Annotations[v1.AnnotationRefName], d.Digest}] }), nil
	})
	if err != nil {
		return fmt.Errorf("removing from %s: %w", s.path, err)
	}
	return s.note(ctx)
}
