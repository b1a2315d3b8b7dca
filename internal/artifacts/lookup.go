// SPDX-License-Identifier: Apache-2.0

package artifacts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexstore"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/sources"
)

const (
	// lookTimeout is how long looking up one artifact may take.
	lookTimeout = time.Minute
	// retryAfter is after how long what failed is tried again.
	retryAfter = time.Minute
)

// lookUp looks artifacts and patterns up, now and then, until ctx ends.
func (m *Manager) lookUp(ctx context.Context) {
	for ctx.Err() == nil {
		failed := m.expand(ctx)
		for _, l := range m.outdated() {
			looking, cancel := context.WithTimeout(ctx, lookTimeout)
			err := m.resolve(looking, l)
			cancel()
			if ctx.Err() != nil {
				return
			}
			if err != nil && !errors.Is(err, artifactstore.ErrImage) {
				failed = true
				m.config.Logger.Warn("looking up a lazy artifact", "artifact", l.ref.String(), "err", err)
			}
			m.Changed()
		}
		m.mu.Lock()
		err := m.save()
		m.mu.Unlock()
		if err != nil {
			m.config.Logger.Error("keeping which artifacts are lazy", "err", err)
		}
		next := m.config.Interval
		if failed {
			next = min(next, retryAfter)
		}
		select {
		case <-time.After(next):
		case <-ctx.Done():
		}
	}
}

// outdated returns what has not been looked up lately, and forgets what nobody names.
func (m *Manager) outdated() []*lazy {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []*lazy
	for name, l := range m.lazy {
		if !l.configured && !l.prepared && l.pattern == "" {
			delete(m.lazy, name)
			continue
		}
		_, fixed := l.ref.(reference.Digested)
		stale := time.Since(l.checked) >= m.config.Interval && !fixed
		if l.artifact == nil || l.err != nil || stale || m.lost(l) {
			list = append(list, l)
		}
	}
	slices.SortFunc(list, func(a, b *lazy) int { return cmp.Compare(a.ref.String(), b.ref.String()) })
	return list
}

// lost reports whether the disk has lost a file of an artifact, or another disk is used
// now. The caller holds m.mu.
func (m *Manager) lost(l *lazy) bool {
	return slices.ContainsFunc(l.artifact.Blobs(), func(d blob.Descriptor) bool {
		_, ok := m.config.Blobs.Get(d.Digest)
		return !ok && (d.Digest != l.artifact.Config.Digest || l.config == nil)
	})
}

// resolve asks the sources what the name names, and makes its files readable. If they
// do not say, it stays what it was.
func (m *Manager) resolve(ctx context.Context, l *lazy) error {
	f, err := m.find(ctx, l)
	if err == nil {
		err = m.open(ctx, l.ref, f)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	l.checked, l.err = time.Now(), err
	if err != nil {
		return err
	}
	if l.manifest.Digest != f.manifest.Digest {
		m.config.Logger.Info("artifact is offered", "artifact", l.ref.String(), "digest", f.manifest.Digest.String(), "from", f.origin.String())
	}
	l.manifest, l.artifact, l.config, l.from = f.manifest, f.artifact, f.config, f.origin.String()
	return nil
}

// found is what sources say that a name names.
type found struct {
	origin   sources.Origin
	origins  []sources.Origin // all there are to read from, the one that said so first
	manifest blob.Manifest
	artifact *artifactstore.Artifact
	config   []byte
}

func (m *Manager) find(ctx context.Context, l *lazy) (*found, error) {
	m.mu.Lock()
	creds := l.creds
	m.mu.Unlock()
	all, err := m.config.Sources.Origins(l.ref, creds, false)
	if err != nil {
		return nil, err
	}
	failed := error(nil)
	for i, o := range all {
		f, err := m.findIn(ctx, o, l.ref)
		if err == nil {
			f.origins = slices.Concat(all[i:], all[:i])
			return f, nil
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", o, err))
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return nil, failed
}

func (m *Manager) findIn(ctx context.Context, o sources.Origin, ref reference.Named) (*found, error) {
	name := image.TagOrDigest(ref)
	if o.Layout != nil {
		d, err := ask(ctx, func(ctx context.Context) (digest.Digest, error) { return o.Layout.Resolve(ctx, ref) })
		if err != nil {
			return nil, err
		}
		name = d.String()
	}
	got, err := image.Manifest(ctx, o.Reader(), name, image.Machine())
	if err != nil {
		return nil, err
	}
	f := &found{origin: o, manifest: got}
	if f.artifact, err = artifactstore.Parse(got); err != nil {
		return nil, err
	}
	if c := f.artifact.Config; c.Size <= smallBlob {
		if f.config, err = o.Reader().Blob(ctx, blob.Descriptor{Digest: c.Digest, Size: c.Size}, smallBlob); err != nil {
			return nil, fmt.Errorf("reading its configuration: %w", err)
		}
	}
	return f, nil
}

// open makes the files of an artifact readable, with chunk lists as far as there are any
// that may be believed.
func (m *Manager) open(ctx context.Context, ref reference.Named, f *found) error {
	least := index.Verified
	if m.config.Sources.Believes(ctx, f.origin, ref, m.config.Registries) {
		least = m.config.IndexTrust
	}
	var readers []indexstore.Reader
	for _, o := range f.origins {
		readers = append(readers, o.Reader())
	}
	places := m.config.Indexes.Artifact(f.manifest, readers...)
	from := sources.Sources(f.origins)
	for _, d := range f.artifact.Blobs() {
		if d.Digest == f.artifact.Config.Digest && f.config != nil {
			continue
		}
		var listing *lazyblob.Listing
		list, trust, err := places.Chunks(ctx, d, least)
		if err == nil {
			listing = &lazyblob.Listing{List: list, Trust: trust}
		} else if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := m.config.Blobs.Add(ctx, d, listing, from); err != nil {
			return err
		}
	}
	return nil
}
