// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
)

// Bounds of what is looked at for referrers.
const (
	maxLooked   = 10_000
	maxReferrer = 1 << 20 // bytes of a manifest that refers to another
)

// Referrers returns an index of the manifests that refer to the one with the given
// digest, as a registry would: those that index.json lists and whose subject it is.
// It is [blob.ErrNotFound] if there is none.
func (l *Layout) Referrers(ctx context.Context, d digest.Digest) (blob.Manifest, error) {
	idx, err := l.readIndex(ctx)
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("reading referrers of %s in %s: %w", d, l, err)
	}
	l.mu.Lock()
	all := idx.referrers
	l.mu.Unlock()
	if all == nil {
		if all, err = l.subjects(ctx, idx.content.Manifests); err != nil {
			return blob.Manifest{}, fmt.Errorf("reading referrers of %s in %s: %w", d, l, err)
		}
		l.mu.Lock()
		idx.referrers = all
		l.mu.Unlock()
	}
	if len(all[d]) == 0 {
		return blob.Manifest{}, fmt.Errorf("reading referrers of %s in %s: %w", d, l, blob.ErrNotFound)
	}
	body, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: all[d]})
	return blob.Manifest{MediaType: v1.MediaTypeImageIndex, Digest: digest.FromBytes(body), Body: body}, err
}

// subjects finds out what the listed manifests refer to. What is damaged refers to
// nothing.
func (l *Layout) subjects(ctx context.Context, list []v1.Descriptor) (map[digest.Digest][]v1.Descriptor, error) {
	all := map[digest.Digest][]v1.Descriptor{}
	seen := map[digest.Digest]bool{}
	for _, desc := range list[:min(len(list), maxLooked)] {
		if seen[desc.Digest] || desc.Size > maxReferrer {
			continue
		}
		seen[desc.Digest] = true
		body, err := l.whole(ctx, desc.Digest, maxReferrer)
		if ctx.Err() != nil || blob.IsTemporary(err) {
			return nil, err
		}
		var m v1.Manifest
		if err != nil || json.Unmarshal(body, &m) != nil || m.Subject == nil || m.Subject.Digest == "" {
			continue
		}
		all[m.Subject.Digest] = append(all[m.Subject.Digest], v1.Descriptor{
			MediaType: mediaType(body), Digest: desc.Digest, Size: int64(len(body)),
			ArtifactType: ArtifactType(m), Annotations: m.Annotations,
		})
	}
	return all, nil
}

// ArtifactType is the type of an artifact by its manifest: see
// github.com/opencontainers/image-spec, manifest.md.
func ArtifactType(m v1.Manifest) string {
	if m.ArtifactType != "" {
		return m.ArtifactType
	}
	return m.Config.MediaType
}

// Tags returns the tags of a repository, by its full name, in the layout.
// [blob.ErrNotFound] means that it has none of its images.
func (l *Layout) Tags(ctx context.Context, repository string) ([]string, error) {
	names, err := l.Names(ctx)
	if err != nil {
		return nil, err
	}
	var tags []string
	for _, name := range names {
		if repo, tag, ok := SplitTag(name); ok && repo == repository {
			tags = append(tags, tag)
		}
	}
	if tags == nil {
		return nil, errors.Join(fmt.Errorf("looking for tags of %s in %s", repository, l), blob.ErrNotFound)
	}
	return tags, nil
}
