// SPDX-License-Identifier: Apache-2.0

package artifacts

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

const (
	// patience is how long a store may take to tell what it lists.
	patience = 3 * time.Second
	// again is how often it is looked whether blobs that were there still are.
	again = 30 * time.Second
	// often is how often it is looked what a store lists.
	often = 2 * time.Second
	// smallBlob is up to which size a configuration is copied.
	smallBlob = 1 << 20
	// maxProblems bounds what is told of a store.
	maxProblems = 20
	maxListed   = 10_000
)

// Store is a store of the configuration.
type Store struct {
	// Path is what additional_artifact_stores would name: the store is in the
	// directory artifacts below it.
	Path   string
	Filter Filter
	// Verify means that files are compared with their digests before they are offered.
	Verify bool
}

// entry is an artifact that may be offered.
type entry struct {
	name     string
	manifest blob.Manifest
	artifact *artifactstore.Artifact
	from     string
	// files are where its blobs are; those in small are there themselves.
	files map[digest.Digest]string
	small map[digest.Digest][]byte
	lazy  *lazy // nil if it is whole in a store
}

// attached is what is known of a store. One goroutine of its own looks at it, so that
// one that hangs holds up no other.
type attached struct {
	Store
	layout   *ocidir.Layout
	listed   []v1.Descriptor // what it listed when entries were made
	looked   time.Time       // when that was
	verified map[digest.Digest]bool

	mu      sync.Mutex // protects the fields below, which only that goroutine changes
	entries []*entry
	status  StoreStatus
}

func newAttached(s Store) *attached {
	return &attached{
		Store: s, layout: ocidir.New(filepath.Join(s.Path, artifactstore.Subdirectory)),
		status: StoreStatus{Path: s.Path, Error: "not looked at yet"}, verified: map[digest.Digest]bool{},
	}
}

// run looks at the store until ctx ends, and tells when it has changed.
func (a *attached) run(ctx context.Context, changed func()) {
	for ctx.Err() == nil {
		if a.look(ctx) {
			changed()
		}
		pause := often
		if a.slow() {
			pause = again
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

func (a *attached) slow() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status.slow
}

// offers is what the store has to offer, and how it is.
func (a *attached) offers() ([]*entry, StoreStatus) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.entries, a.status
}

// ask bounds how long the store may take to answer.
func ask[T any](ctx context.Context, get func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errSlow)
	defer cancel()
	return get(ctx)
}

// look looks what the store has now, and reports whether that has changed. What cannot
// be read has nothing to offer.
func (a *attached) look(ctx context.Context) bool {
	idx, err := ask(ctx, a.layout.Index)
	before, was := a.offers()
	if err == nil && was.Error == "" && same(idx.Manifests, a.listed) && time.Since(a.looked) < again {
		return false
	}
	var entries []*entry
	status := StoreStatus{Path: a.Path}
	if err == nil {
		entries, err = a.scan(ctx, idx.Manifests, &status)
	}
	if ctx.Err() != nil {
		return false
	}
	a.listed, a.looked = append([]v1.Descriptor{}, idx.Manifests...), time.Now()
	if err != nil {
		entries, status = nil, StoreStatus{Path: a.Path, Error: err.Error(), slow: errors.Is(err, errSlow)}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.entries, a.status = entries, status
	return len(entries) > 0 || len(before) > 0 || was.Error != status.Error
}

// errSlow means that a store did not answer in time.
var errSlow = errors.New("it does not answer")

func same(a, b []v1.Descriptor) bool {
	if len(a) != len(b) || b == nil {
		return false
	}
	for i := range a {
		if a[i].Digest != b[i].Digest || a[i].Annotations[v1.AnnotationRefName] != b[i].Annotations[v1.AnnotationRefName] {
			return false
		}
	}
	return true
}

// scan looks at everything that is listed.
func (a *attached) scan(ctx context.Context, list []v1.Descriptor, status *StoreStatus) (entries []*entry, err error) {
	if len(list) > maxListed {
		return nil, fmt.Errorf("it lists more than %d artifacts", maxListed)
	}
	known := map[digest.Digest]blob.Manifest{}
	before, _ := a.offers()
	for _, e := range before {
		known[e.manifest.Digest] = e.manifest
	}
	for _, d := range list {
		e, why, err := a.entry(ctx, d, known)
		switch {
		case errors.Is(err, errSlow), ctx.Err() != nil:
			return nil, err
		case err != nil:
			if len(status.Problems) < maxProblems {
				status.Problems = append(status.Problems, err.Error())
			}
		case why != "":
			status.Filtered++
		default:
			entries = append(entries, e)
		}
	}
	status.Artifacts = len(entries)
	return entries, nil
}

// entry looks at one thing that is listed: it is offered only if it is whole.
func (a *attached) entry(ctx context.Context, d v1.Descriptor, known map[digest.Digest]blob.Manifest) (_ *entry, why string, err error) {
	name := d.Annotations[v1.AnnotationRefName]
	ref, err := artifactstore.CheckName(name)
	if err != nil {
		return nil, "", err
	}
	m, ok := known[d.Digest]
	if !ok {
		m, err = ask(ctx, func(ctx context.Context) (blob.Manifest, error) { return a.layout.Manifest(ctx, d.Digest.String()) })
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", name, err)
		}
	}
	artifact, err := artifactstore.Parse(m)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", name, err)
	}
	if why := a.Filter.refuses(ref, artifact); why != "" {
		return nil, why, nil
	}
	e := &entry{name: name, manifest: m, artifact: artifact, from: a.Path, files: map[digest.Digest]string{}, small: map[digest.Digest][]byte{}}
	for _, b := range artifact.Blobs() {
		if b.Digest == artifact.Config.Digest && b.Size <= smallBlob {
			e.small[b.Digest], err = ask(ctx, func(ctx context.Context) ([]byte, error) { return a.layout.Blob(ctx, b, smallBlob) })
			if err != nil {
				return nil, "", fmt.Errorf("%s: %w", name, err)
			}
			continue
		}
		if err := a.check(ctx, b); err != nil {
			return nil, "", fmt.Errorf("%s: blob %s: %w", name, b.Digest, err)
		}
		e.files[b.Digest] = filepath.Join(a.layout.Path(), v1.ImageBlobsDir, b.Digest.Algorithm().String(), b.Digest.Encoded())
	}
	return e, "", nil
}

// check looks whether a blob is there, with its size, and, if the configuration says
// so, has its digest.
func (a *attached) check(ctx context.Context, b blob.Descriptor) error {
	size, err := ask(ctx, func(ctx context.Context) (int64, error) { return a.layout.Stat(ctx, b.Digest) })
	if err != nil {
		return err
	}
	if size != b.Size {
		return fmt.Errorf("it has %d bytes, not %d: %w", size, b.Size, blob.ErrCorrupt)
	}
	if !a.Verify || a.verified[b.Digest] {
		return nil
	}
	// As long as it takes: only what this store offers waits for it.
	if err := ocidir.Check(ctx, a.layout, b, func(int64) {}); err != nil {
		return err
	}
	a.verified[b.Digest] = true
	return nil
}
