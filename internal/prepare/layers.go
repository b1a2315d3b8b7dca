// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/layer"
)

// maxLayersAtOnce bounds memory and connections while an image is prepared.
const maxLayersAtOnce = 4

// prepareLayers makes each layer that is planned to be lazy available, or
// leaves it to the runtime with the reason. Layers are begun base first: one may
// wait for the one below it.
func (p *Preparer) prepareLayers(ctx context.Context, img *resolved, plans []*plan, progress func(Event)) {
	var g errgroup.Group
	g.SetLimit(maxLayersAtOnce)
	for _, l := range plans {
		if l.Action == Left {
			close(l.settled)
			continue
		}
		g.Go(func() error {
			defer close(l.settled)
			if err := p.prepareLayer(ctx, img, l, progress); err != nil {
				l.leave(err.Error())
				if !errors.Is(err, index.ErrNoIndex) {
					p.log.Warn("leaving layer to the runtime", "image", img.ref.String(), "layer", l.Digest.String(), "err", err)
				}
			}
			return nil
		})
	}
	_ = g.Wait() // errors end up in the plans
}

// prepareLayer takes a layer that is there already, or adds it. A layer that nobody
// vouches for is verified whole before anybody sees it: runtimes would reuse its
// record for any image that names its digest.
func (p *Preparer) prepareLayer(ctx context.Context, img *resolved, l *plan, progress func(Event)) error {
	key := l.Digest.String()
	trusted := img.trusted
	if !trusted {
		key += " verified" // not to be had by joining a caller who trusts
	}
	got, err := p.adding.Do(ctx, key, func(ctx context.Context) (*layer.Layer, error) {
		if have, ok := p.layers.Get(l.Digest); ok {
			return have, nil
		}
		return p.addLayer(ctx, img, l, trusted, progress)
	})
	if err != nil {
		return err
	}
	if err := got.Verdict().Err(); err != nil {
		return err
	}
	if got.DiffID != l.DiffID {
		return fmt.Errorf("the image states diff ID %s, the layer is known with %s", l.DiffID, got.DiffID)
	}
	if err := l.checkRoot(ctx, got.Root); err != nil {
		return err
	}
	l.root, l.layer = got.Root, got
	img.serve(got)
	l.Reason = string(got.Kind)
	if got.Complete() {
		l.Action = Fetched
	}
	return nil
}

// addLayer adds a layer by the best index there is: one that was made here serves
// for everybody; one that the blob or somebody else brings, for an image that is
// trusted. Without one the layer is read whole.
func (p *Preparer) addLayer(ctx context.Context, img *resolved, l *plan, trusted bool, progress func(Event)) (*layer.Layer, error) {
	least := p.policy.IndexTrust
	if !trusted {
		least = index.Verified
	}
	if least <= index.Bound && index.Annotated(l.desc.Annotations) {
		got, err := p.addAnnotated(ctx, img, l, progress)
		if !errors.Is(err, index.ErrNoIndex) {
			return got, err
		}
	}
	found, err := img.indexes.Find(ctx, l.described(), least)
	if err == nil {
		defer found.Close() //nolint:errcheck // unmaps
		p.log.Debug("found index", "layer", l.Digest.String(), "from", found.From, "trust", found.Trust.String())
		return p.addLazy(ctx, img, l, found.Index, found.Trust, progress)
	}
	// Before this there was no other way for an image that is not trusted.
	if ctx.Err() != nil || !p.policy.Build && !index.Annotated(l.desc.Annotations) {
		return nil, err
	}
	return p.addVerified(ctx, img, l, progress)
}

// addAnnotated adds a layer by the index that its blob carries.
func (p *Preparer) addAnnotated(ctx context.Context, img *resolved, l *plan, progress func(Event)) (*layer.Layer, error) {
	var idx *index.Index
	err := errors.New("no source")
	for _, src := range img.sources() {
		if idx, err = indexes.Carried(ctx, src, l.described()); err == nil || errors.Is(err, index.ErrNoIndex) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading the index of layer %s: %w", l.Digest, err)
	}
	return p.addLazy(ctx, img, l, idx, index.Bound, progress)
}

// addLazy adds a layer of which nothing but the index has been fetched.
func (p *Preparer) addLazy(ctx context.Context, img *resolved, l *plan, idx *index.Index, trust index.Trust, progress func(Event)) (*layer.Layer, error) {
	progress(Event{Layer: l.Digest, Total: l.Size})
	if err := l.inheritRoot(ctx, idx); err != nil {
		return nil, err
	}
	st, err := p.layers.Stage(l.Digest)
	if err != nil {
		return nil, err
	}
	got, err := st.Commit(ctx, layer.Meta{
		Digest: l.Digest, Size: l.Size, DiffID: l.DiffID, Trust: trust,
		DiffSize: diffSize(idx, l.desc.Annotations), BlobCompression: l.compression,
	}, idx, false)
	if err != nil {
		return nil, err
	}
	img.serve(got)
	if got.Landmark > 0 {
		p.background.Go(func() error {
			if img.profile.wait(p.ctx) != nil {
				return nil // that is exact
			}
			if err := got.Device().PrefetchBlob(p.ctx, got.Landmark, device.Profile); err != nil && p.ctx.Err() == nil {
				p.log.Warn("prefetching what the image asks for", "err", err)
			}
			return nil
		})
	}
	return got, nil
}
