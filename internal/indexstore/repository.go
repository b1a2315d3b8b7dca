// SPDX-License-Identifier: Apache-2.0

package indexstore

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
)

// Repository is a repository of its own as a place for documents about all
// images and layers: manifests under tags made of what they are about.
type Repository struct {
	repo *registry.Repository
}

var _ Place = (*Repository)(nil)

// NewRepository returns the place that a repository is.
func NewRepository(repo *registry.Repository) *Repository { return &Repository{repo: repo} }

func (r *Repository) String() string { return "repository " + r.repo.Name() }

// tagOf returns the tag for a kind of document about subject.
func tagOf(subject digest.Digest, kind Kind) (string, error) {
	name, err := encoded(subject)
	switch {
	case err != nil:
		return "", err
	case !kind.known():
		return "", fmt.Errorf("%q is no kind of document", kind)
	case kind == Profile:
		return "profile-sha256-" + name, nil
	default:
		return "layer-sha256-" + name, nil
	}
}

// Fetch copies a document, as Place tells.
func (r *Repository) Fetch(ctx context.Context, subject digest.Digest, kind Kind, limit int64, w io.Writer) error {
	tag, err := tagOf(subject, kind)
	if err != nil {
		return err
	}
	read, err := r.repo.Manifest(ctx, tag)
	if errors.Is(err, blob.ErrNotFound) {
		return notExist(r, subject, kind, nil)
	}
	if err != nil {
		return err
	}
	m, err := decodeManifest(read.Body)
	if err != nil {
		return fmt.Errorf("tag %s of %s: %w", tag, r.repo, err)
	}
	is, key := sociIndexV1, document{kind, subject}
	if kind == Profile {
		is, key = profileType, document{Profile, ""}
	}
	if m.is != is {
		return fmt.Errorf("tag %s of %s: %w", tag, r.repo, errMalformed)
	}
	desc, ok := m.documents[key]
	if !ok {
		return notExist(r, subject, kind, nil)
	}
	err = copyBlob(ctx, r.repo, desc, limit, w)
	if errors.Is(err, blob.ErrNotFound) {
		return notExist(r, subject, kind, err)
	}
	return err
}

// Publish uploads documents. Those about a layer replace all that there were
// about it.
func (r *Repository) Publish(ctx context.Context, p Publication) error {
	for i, l := range p.Layers {
		tag, err := tagOf(l.Layer.Digest, ZTOC)
		if err != nil {
			return err
		}
		if err := pushIndex(ctx, r.repo, p.Created, p.Layers[i:i+1], tag); err != nil {
			return fmt.Errorf("publishing the index of layer %s: %w", l.Layer.Digest, err)
		}
	}
	if p.Profile == nil {
		return nil
	}
	tag, err := tagOf(p.Image.Digest, Profile)
	if err != nil {
		return err
	}
	if err := pushProfile(ctx, r.repo, p, nil, tag); err != nil {
		return fmt.Errorf("publishing the profile of %s: %w", p.Image.Digest, err)
	}
	return nil
}
