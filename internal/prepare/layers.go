// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/estargz"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/index/zstdchunked"
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

// prepareLayer takes a layer that is there already, or adds it. A layer from a
// registry that is not trusted is verified whole before anybody sees it:
// runtimes would reuse its record for any image that names its digest.
func (p *Preparer) prepareLayer(ctx context.Context, img *resolved, l *plan, progress func(Event)) error {
	key := l.Digest.String()
	trusted := p.policy.Trusted.Match(img.ref)
	if !trusted {
		key += " verified" // not to be had by joining a caller who trusts
	}
	got, err := p.adding.Do(ctx, key, func(ctx context.Context) (*layer.Layer, error) {
		if have, ok := p.layers.Get(l.Digest); ok {
			return have, nil
		}
		if trusted {
			return p.addLazy(ctx, img, l, progress)
		}
		return p.addVerified(ctx, img, l, progress)
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
	got.Device().AddSources(img.sources())
	l.Reason = string(got.Kind)
	if got.Complete() {
		l.Action = Fetched
	}
	return nil
}

// openIndex reads the index that a layer brings along.
func openIndex(ctx context.Context, src blob.Source, l *plan) (*index.Index, error) {
	desc := blob.Descriptor{Digest: l.desc.Digest, Size: l.desc.Size}
	idx, err := estargz.Open(ctx, src, desc, l.desc.Annotations)
	if errors.Is(err, index.ErrNoIndex) {
		idx, err = zstdchunked.Open(ctx, src, desc, l.desc.Annotations)
	}
	return idx, err
}

// addLazy adds a layer of which nothing but the index has been fetched.
func (p *Preparer) addLazy(ctx context.Context, img *resolved, l *plan, progress func(Event)) (*layer.Layer, error) {
	sources := img.sources()
	var idx *index.Index
	err := errors.New("no source")
	for _, src := range sources {
		if idx, err = openIndex(ctx, src, l); err == nil || errors.Is(err, index.ErrNoIndex) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading the index of layer %s: %w", l.Digest, err)
	}
	progress(Event{Layer: l.Digest, Total: l.Size})
	if err := l.inheritRoot(ctx, idx); err != nil {
		return nil, err
	}
	st, err := p.layers.Stage(l.Digest)
	if err != nil {
		return nil, err
	}
	got, err := st.Commit(ctx, layer.Meta{
		Digest: l.Digest, Size: l.Size, DiffID: l.DiffID,
		DiffSize: diffSize(idx, l.desc.Annotations), BlobCompression: l.compression,
	}, idx, false)
	if err != nil {
		return nil, err
	}
	got.Device().AddSources(sources)
	if got.Landmark > 0 {
		p.background.Go(func() error {
			if err := got.Device().PrefetchBlob(p.ctx, got.Landmark, device.Profile); err != nil && p.ctx.Err() == nil {
				p.log.Warn("prefetching what the image asks for", "err", err)
			}
			return nil
		})
	}
	return got, nil
}

// addVerified adds a layer after all of it has been fetched and matched its blob
// digest and its diff ID. Its index is made from the verified tar: an index that
// the blob carries could show another tree.
func (p *Preparer) addVerified(ctx context.Context, img *resolved, l *plan, progress func(Event)) (*layer.Layer, error) {
	var failed error
	for _, src := range img.sources() {
		got, err := p.addVerifiedFrom(ctx, src, l, progress)
		if err == nil {
			return got, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", src, err))
	}
	return nil, failed
}

func (p *Preparer) addVerifiedFrom(ctx context.Context, src blob.Source, l *plan, progress func(Event)) (_ *layer.Layer, err error) {
	desc := blob.Descriptor{Digest: l.desc.Digest, Size: l.desc.Size}
	body, err := src.Open(ctx, desc, 0, desc.Size)
	if err != nil {
		return nil, fmt.Errorf("fetching layer: %w", err)
	}
	defer body.Close() //nolint:errcheck // read only; a broken stream shows in Read
	st, err := p.layers.Stage(l.Digest)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.Abort()) }()
	res, err := stream.Read(ctx, &reporting{r: body, event: Event{Layer: l.Digest, Total: l.Size}, progress: progress}, desc.Size, st)
	if err != nil {
		return nil, fmt.Errorf("reading layer: %w", err)
	}
	if res.Blob != l.Digest {
		return nil, fmt.Errorf("blob is %s, want %s: %w", res.Blob, l.Digest, blob.ErrCorrupt)
	}
	if res.DiffID != l.DiffID {
		return nil, fmt.Errorf("diff ID is %s, the image states %s: %w", res.DiffID, l.DiffID, blob.ErrCorrupt)
	}
	if err := l.inheritRoot(ctx, res.Index); err != nil {
		return nil, err
	}
	return st.Commit(ctx, layer.Meta{
		Digest: l.Digest, Size: l.Size, DiffID: l.DiffID, DiffSize: diffSize(res.Index, nil),
		BlobCompression: l.compression, Verdict: layer.Verdict{Verified: true},
	}, res.Index, true)
}

// reporting reports what is read through it.
type reporting struct {
	r        io.Reader
	event    Event
	progress func(Event)
}

func (r *reporting) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if n > 0 {
		r.event.Done += int64(n)
		r.progress(r.event)
	}
	return n, err
}
