// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/indexes"
)

// resolved is an image of this platform, and where it can be read from.
type resolved struct {
	*image.Image
	ref       reference.Named
	indexes   *indexes.Image
	endpoints []*registry.Repository // the one that had the manifest first
	private   bool                   // the registry wanted credentials
	profile   *found                 // what to fetch first
}

// sources are the places a blob of the image is read from, best first.
func (r *resolved) sources() []blob.Source { return image.Sources(r.endpoints) }

// resolve asks the endpoints of a reference, mirrors first, for its manifest and
// its configuration.
func (p *Preparer) resolve(ctx context.Context, ref reference.Named, creds *registry.Credentials) (*resolved, error) {
	endpoints, err := p.registry.Endpoints(ref, creds)
	if err != nil {
		return nil, fmt.Errorf("finding registries: %w", err)
	}
	var failed error
	for i, e := range endpoints {
		img, err := image.Load(ctx, e, image.TagOrDigest(ref), image.Machine())
		if err == nil {
			return &resolved{
				Image: img, ref: ref, indexes: p.indexes.Image(e, img),
				endpoints: slices.Concat(endpoints[i:], endpoints[:i]), private: e.Authenticated(),
			}, nil
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", e, err))
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return nil, failed
}
