// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/docker/go-units"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/indexstore"
	"github.com/holdfast/holdfast/internal/sources"
)

// resolved is an image of this platform, and where it can be read from.
type resolved struct {
	*image.Image
	ref     reference.Named
	indexes *indexes.Image
	origins []sources.Origin // in the order in which to ask them
	trusted bool             // believed before it has been verified whole
	private bool             // the registry wanted credentials
	profile *found           // what to fetch first
}

// sources are the places a blob of the image is read from, best first.
func (r *resolved) sources() []blob.Source { return sources.Sources(r.origins) }

// resolve asks the origins of a reference, in their order, for its manifest and
// its configuration.
func (p *Preparer) resolve(ctx context.Context, ref reference.Named, req Request) (*resolved, error) {
	origins, err := p.sources.Origins(ref, req.Credentials, req.Offline)
	if err != nil {
		return nil, err
	}
	var failed error
	tried := map[int]bool{}
	for _, i := range order(ref, origins, req.FromRegistry) {
		o := origins[i]
		tried[i] = true
		img, err := p.sources.Load(ctx, o, ref, image.Machine())
		if err == nil && req.Offline {
			err = p.missing(ctx, img, origins)
		}
		if err == nil {
			r := p.resolved(img, req, ref, origins, i, tried)
			r.trusted = p.sources.Believes(ctx, o, ref, p.policy.Trusted)
			return r, nil
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", o, err))
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return nil, failed
}

// order is the order in which the origins are asked what a reference names. Who got the
// manifest from a registry wants that very image: a tag may name another one elsewhere.
func order(ref reference.Named, origins []sources.Origin, fromRegistry bool) []int {
	var first, then []int
	_, byDigest := ref.(reference.Digested)
	for i, o := range origins {
		if o.Repository != nil || !fromRegistry || byDigest {
			first = append(first, i)
		} else {
			then = append(then, i)
		}
	}
	return append(first, then...)
}

// resolved is the image that the i-th origin has, after others that were tried had not.
func (p *Preparer) resolved(img *image.Image, req Request, ref reference.Named, origins []sources.Origin, i int, tried map[int]bool) *resolved {
	from := origins[i]
	r := &resolved{Image: img, ref: ref}
	if from.Repository != nil {
		r.private = from.Repository.Authenticated()
	}
	// Layouts keep their place, whatever they lack; a registry that failed is asked last.
	var failed []sources.Origin
	var readers []indexstore.Reader
	for n, o := range origins {
		if o.Repository != nil && n != i && tried[n] {
			failed = append(failed, o)
			continue
		}
		r.origins = append(r.origins, o)
		if n == i || o.Layout != nil && o.Trusted {
			readers = append(readers, o.Reader())
		}
	}
	r.origins = slices.Concat(r.origins, failed)
	finder := p.indexes
	if req.Offline {
		finder = finder.Offline()
	}
	r.indexes = finder.Image(img, readers...)
	return r
}

// missing says which layers of an image are neither on this node nor in an attached
// layout.
func (p *Preparer) missing(ctx context.Context, img *image.Image, origins []sources.Origin) error {
	var lacking error
	for _, l := range img.Layers {
		if have, ok := p.layers.Get(l.Digest); ok && have.Complete() {
			continue
		}
		there := slices.ContainsFunc(origins, func(o sources.Origin) bool {
			size, err := o.Layout.Stat(ctx, l.Digest)
			return err == nil && size == l.Size
		})
		if !there {
			lacking = errors.Join(lacking, fmt.Errorf("layer %s (%s) is missing: it is in none of the attached sources", l.Digest, units.BytesSize(float64(l.Size))))
		}
	}
	return lacking
}
