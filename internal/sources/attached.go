// SPDX-License-Identifier: Apache-2.0

package sources

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/image"
)

// attached returns the layouts in their order, without those that did not answer
// lately.
func (s *Set) attached() []Origin {
	var all []Origin
	for _, p := range s.config.Places {
		if l := s.layouts[p]; l != nil && !s.resting(p) {
			all = append(all, Origin{Place: p, Layout: l})
		}
	}
	return all
}

// shows reports whether a layout's blob may be shown to every user of the node: all
// but those of pinned images that needed credentials.
func (s *Set) shows(ctx context.Context, l *ocidir.Layout, d digest.Digest) bool {
	if l != s.pins {
		return true
	}
	public, err := l.Reachable(ctx, func(m v1.Descriptor) bool { return m.Annotations[PrivateAnnotation] == "" })
	return err == nil && public[d]
}

// Attached is a repository that has images in an attached layout.
type Attached struct {
	Name string // full name
	// AfterRegistry means that the image's own registry is asked before all layouts that
	// have the repository.
	AfterRegistry bool
}

// Repositories returns the repositories that have images in the attached layouts, sorted
// by name. Layouts that are not there have none.
func (s *Set) Repositories(ctx context.Context) []Attached {
	after := map[string]bool{}
	registry := false
	for _, p := range s.config.Places {
		registry = registry || p == Registry && !s.config.Offline
		l := s.layouts[p]
		if l == nil || s.resting(p) {
			continue
		}
		for _, name := range s.shown(ctx, p, l) {
			if _, known := after[name]; !known {
				after[name] = registry
			}
		}
	}
	all := make([]Attached, 0, len(after))
	for _, name := range slices.Sorted(maps.Keys(after)) {
		all = append(all, Attached{name, after[name]})
	}
	return all
}

// shown returns the repositories in a layout that may be shown.
func (s *Set) shown(ctx context.Context, p Place, l *ocidir.Layout) (names []string) {
	asking, cancel := context.WithTimeoutCause(ctx, patience, errSlow)
	defer cancel()
	all, err := l.Names(asking)
	if s.judge(ctx, p, err) != nil {
		return nil
	}
	for _, name := range all {
		ref, err := reference.ParseNamed(name)
		if err != nil {
			continue
		}
		if d, err := l.Resolve(asking, ref); err == nil && s.shows(asking, l, d) {
			names = append(names, ref.Name())
		}
	}
	return names
}

// Manifest reads a manifest by tag or digest out of the attached layouts. Whoever
// has a manifest from here will ask for all else here, too. So one of an image that
// is not whole is not found, nor is an index without a whole image for this machine:
// the caller then turns to the registry.
func (s *Set) Manifest(ctx context.Context, repository, tagOrDigest string) (blob.Manifest, error) {
	ref, err := named(repository, tagOrDigest)
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("%w: %w", err, blob.ErrNotFound)
	}
	for _, o := range s.attached() {
		m, err := s.manifest(ctx, o.Layout, ref)
		if s.judge(ctx, o.Place, err) == nil {
			return m, nil
		}
		if ctx.Err() != nil {
			return blob.Manifest{}, context.Cause(ctx)
		}
	}
	return blob.Manifest{}, fmt.Errorf("%s is in none of the attached layouts: %w", ref, blob.ErrNotFound)
}

func (s *Set) manifest(ctx context.Context, l *ocidir.Layout, ref reference.Named) (blob.Manifest, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errSlow)
	defer cancel()
	d, err := l.Resolve(ctx, ref)
	if err == nil && !s.shows(ctx, l, d) {
		err = blob.ErrNotFound
	}
	if err != nil {
		return blob.Manifest{}, err
	}
	m, err := l.Manifest(ctx, d.String())
	if err != nil {
		return blob.Manifest{}, err
	}
	whole := m
	if types.MediaType(m.MediaType).IsIndex() {
		mine, err := image.Machine().Choose(m.Body)
		if err != nil {
			return blob.Manifest{}, err
		}
		if whole, err = l.Manifest(ctx, mine.String()); err != nil {
			return blob.Manifest{}, err
		}
	}
	_, blobs, err := ocidir.Children(whole)
	if err != nil {
		return blob.Manifest{}, err
	}
	for _, b := range blobs {
		if _, _, err := s.Blob(ctx, ref.Name(), b.Digest); err != nil {
			return blob.Manifest{}, err
		}
	}
	return m, nil
}

func named(repository, tagOrDigest string) (reference.Named, error) {
	name, err := reference.ParseNamed(repository)
	if err != nil {
		return nil, fmt.Errorf("repository %q: %w", repository, err)
	}
	if d, err := digest.Parse(tagOrDigest); err == nil {
		return reference.WithDigest(name, d)
	}
	return reference.WithTag(name, tagOrDigest)
}

// Blob finds a blob in the attached layouts.
func (s *Set) Blob(ctx context.Context, _ string, d digest.Digest) (blob.Descriptor, blob.Source, error) {
	for _, o := range s.attached() {
		asking, cancel := context.WithTimeoutCause(ctx, patience, errSlow)
		size, err := o.Layout.Stat(asking, d)
		if err == nil && !s.shows(asking, o.Layout, d) {
			err = blob.ErrNotFound
		}
		cancel()
		if s.judge(ctx, o.Place, err) == nil {
			return blob.Descriptor{Digest: d, Size: size}, o.Layout, nil
		}
		if ctx.Err() != nil {
			return blob.Descriptor{}, nil, context.Cause(ctx)
		}
	}
	return blob.Descriptor{}, nil, fmt.Errorf("blob %s is in none of the attached layouts: %w", d, blob.ErrNotFound)
}

// Tags returns the tags of a repository in the attached layouts, sorted.
func (s *Set) Tags(ctx context.Context, repository string) ([]string, error) {
	var all []string
	for _, o := range s.attached() {
		asking, cancel := context.WithTimeoutCause(ctx, patience, errSlow)
		tags, err := o.Layout.Tags(asking, repository)
		cancel()
		if s.judge(ctx, o.Place, err) == nil {
			all = append(all, tags...)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s is in none of the attached layouts: %w", repository, blob.ErrNotFound)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// Referrers returns the manifests in the attached layouts that refer to another.
func (s *Set) Referrers(ctx context.Context, _ string, subject digest.Digest) ([]v1.Descriptor, error) {
	var all []v1.Descriptor
	for _, o := range s.attached() {
		asking, cancel := context.WithTimeoutCause(ctx, patience, errSlow)
		m, err := o.Layout.Referrers(asking, subject)
		cancel()
		var idx v1.Index
		if err = s.judge(ctx, o.Place, err); err == nil {
			err = json.Unmarshal(m.Body, &idx)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil && !errors.Is(err, blob.ErrNotFound) {
			continue
		}
		for _, d := range idx.Manifests {
			if !slices.ContainsFunc(all, func(have v1.Descriptor) bool { return have.Digest == d.Digest }) {
				all = append(all, d)
			}
		}
	}
	return all, nil
}
