// SPDX-License-Identifier: Apache-2.0

package indexstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/shared"
)

// maxTried bounds how many manifests are looked at until one can be used.
const maxTried = 4

// Image is where an image is, its repository or an OCI layout, as the place of what is known about it: in
// manifests that refer to the image's, as SOCI has it.
//
// It is for one image at one time: it asks once, and keeps what it has found or
// not found, whatever is published afterwards.
type Image struct {
	from      Reader
	subject   Subject
	bound     digest.Digest
	referrers memo[[]descriptor]
	manifests memo[*manifest] // by artifact type; nil: there is none
}

var _ Place = (*Image)(nil)

// Reader is where manifests and blobs are read from: a repository, an OCI layout.
type Reader interface {
	blob.Source
	Manifest(ctx context.Context, tagOrDigest string) (blob.Manifest, error)
	Referrers(ctx context.Context, d digest.Digest) (blob.Manifest, error)
}

// NewImage returns the place of the image with the given manifest, which is read
// from there. bound, if it is
// not empty, is the digest of a SOCI index that the manifest itself names (SOCI
// calls that version 2): documents about layers then come from there alone, and
// are as good as the manifest.
func NewImage(from Reader, subject Subject, bound digest.Digest) *Image {
	return &Image{from: from, subject: subject, bound: bound}
}

func (i *Image) String() string {
	if r, ok := i.from.(*registry.Repository); ok {
		return "registry " + r.Name()
	}
	return i.from.String()
}

// Fetch copies a document about the image or one of its layers, as Place tells.
func (i *Image) Fetch(ctx context.Context, subject digest.Digest, kind Kind, limit int64, w io.Writer) error {
	artifactType, key := sociIndexV1, document{kind, subject}
	switch {
	case !kind.known():
		return fmt.Errorf("%q is no kind of document", kind)
	case kind == Profile && subject != i.subject.Digest:
		return notExist(i, subject, kind, nil)
	case kind == Profile:
		artifactType, key = profileType, document{Profile, ""}
	}
	m, err := i.manifests.get(ctx, artifactType, func(ctx context.Context) (*manifest, error) {
		if artifactType == sociIndexV1 && i.bound != "" {
			return i.readBound(ctx)
		}
		return i.look(ctx, artifactType)
	})
	if err != nil {
		return fmt.Errorf("looking for %s of %s in %s: %w", kind, subject, i, err)
	}
	if m == nil {
		return notExist(i, subject, kind, nil)
	}
	desc, ok := m.documents[key]
	if !ok {
		return notExist(i, subject, kind, nil)
	}
	err = copyBlob(ctx, i.from, desc, limit, w)
	if errors.Is(err, blob.ErrNotFound) {
		return notExist(i, subject, kind, err)
	}
	return err
}

// readBound reads the index that the image's manifest names; nil if it is gone.
func (i *Image) readBound(ctx context.Context) (*manifest, error) {
	m, err := i.read(ctx, i.bound)
	switch {
	case errors.Is(err, blob.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	case m.is != sociIndexV2:
		return nil, fmt.Errorf("manifest %s: %w", i.bound, errMalformed)
	}
	return m, nil
}

// look looks for the newest manifest of a type that refers to the image's; nil if
// there is none. One that is not what the list says does not keep it from others.
func (i *Image) look(ctx context.Context, artifactType string) (*manifest, error) {
	all, err := i.referrers.get(ctx, "", i.list)
	if err != nil {
		return nil, err
	}
	var broken error
	for _, d := range newest(all, artifactType) {
		m, err := i.read(ctx, d.Digest)
		switch {
		case errors.Is(err, blob.ErrNotFound):
		case errors.Is(err, errMalformed), errors.Is(err, blob.ErrCorrupt):
			broken = err
		case err != nil:
			return nil, err
		case m.is == artifactType && m.subject == i.subject.Digest:
			return m, nil
		case d.ArtifactType != "":
			broken = fmt.Errorf("manifest %s: %w", d.Digest, errMalformed)
		}
	}
	return nil, broken
}

// list returns what refers to the image and may be of use.
func (i *Image) list(ctx context.Context) ([]descriptor, error) {
	index, err := i.from.Referrers(ctx, i.subject.Digest)
	if errors.Is(err, blob.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return decodeReferrers(index.Body)
}

func (i *Image) read(ctx context.Context, d digest.Digest) (*manifest, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("manifest %q: %w", shorten(d), err)
	}
	m, err := i.from.Manifest(ctx, d.String())
	if err != nil {
		return nil, err
	}
	decoded, err := decodeManifest(m.Body)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d, err)
	}
	decoded.digest = d
	return decoded, nil
}

// Publish uploads a SOCI index of version 1 with the documents about layers, and
// the profile, which refer to the image.
func (i *Image) Publish(ctx context.Context, p Publication) error {
	if _, err := i.PublishIndex(ctx, p); err != nil {
		return err
	}
	repo, err := i.repository()
	if err == nil {
		err = pushProfile(ctx, repo, p, i.descriptor(), "")
	}
	if err != nil {
		return fmt.Errorf("publishing the profile of %s: %w", i.subject.Digest, err)
	}
	return nil
}

// PublishIndex uploads the documents about layers alone, and returns the digest of
// the index that lists them, "" if there are none. If the newest one that refers to
// the image lists just these, there is nothing to do.
func (i *Image) PublishIndex(ctx context.Context, p Publication) (digest.Digest, error) {
	if p.Image != (Subject{}) && p.Image.Digest != i.subject.Digest {
		return "", fmt.Errorf("publishing what belongs to %s as if to %s", p.Image.Digest, i.subject.Digest)
	}
	d, err := i.publishIndex(ctx, p)
	if err != nil {
		return "", fmt.Errorf("publishing the index of %s: %w", i.subject.Digest, err)
	}
	return d, nil
}

func (i *Image) publishIndex(ctx context.Context, p Publication) (digest.Digest, error) {
	repo, err := i.repository()
	if err != nil {
		return "", err
	}
	list, err := pushLayers(ctx, repo, p.Layers)
	if err != nil || len(list) == 0 {
		return "", err
	}
	body, err := encodeIndex(list, i.descriptor(), p.Created)
	if err != nil {
		return "", err
	}
	ours, err := decodeManifest(body)
	if err != nil {
		return "", err
	}
	// Not from what is kept: it may have been published since. An error is no reason
	// not to publish.
	have, err := NewImage(i.from, i.subject, "").look(ctx, sociIndexV1)
	if err == nil && have != nil && maps.Equal(have.documents, ours.documents) {
		return have.digest, nil
	}
	return pushManifest(ctx, repo, body, "")
}

// repository is where to publish to.
func (i *Image) repository() (Pusher, error) {
	if r, ok := i.from.(Pusher); ok {
		return r, nil
	}
	return nil, fmt.Errorf("%s takes no documents", i.from)
}

// descriptor is what refers to the image.
func (i *Image) descriptor() *v1.Descriptor {
	return &v1.Descriptor{MediaType: i.subject.MediaType, Digest: i.subject.Digest, Size: i.subject.Size}
}

// memo keeps what was found out without an error. Those who want the same at the
// same time share the work.
type memo[T any] struct {
	calls shared.Calls[T]

	mu   sync.Mutex // protects the fields below
	kept map[string]T
}

// get returns what is kept under a key, or what find finds.
func (m *memo[T]) get(ctx context.Context, key string, find func(context.Context) (T, error)) (T, error) {
	return m.calls.Do(ctx, key, func(ctx context.Context) (T, error) {
		m.mu.Lock()
		value, ok := m.kept[key]
		m.mu.Unlock()
		if ok {
			return value, nil
		}
		value, err := find(ctx)
		if err != nil {
			return value, err
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.kept == nil {
			m.kept = map[string]T{}
		}
		m.kept[key] = value
		return value, nil
	})
}
