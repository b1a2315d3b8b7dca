// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/parts"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/soci"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/layer"
)

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
	body, err := parts.Open(ctx, src, desc)
	if err != nil {
		return nil, fmt.Errorf("fetching layer: %w", err)
	}
	defer body.Close() //nolint:errcheck // read only; a broken stream shows in Build
	st, err := p.layers.Stage(l.Digest)
	if err != nil {
		return nil, err
	}
	windows, err := p.indexes.Temp()
	defer func() {
		err = errors.Join(err, st.Abort())
		if windows != nil {
			err = errors.Join(err, windows.Close())
		}
	}()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	res, err := stream.Build(ctx, &reporting{r: body, event: Event{Layer: l.Digest, Total: l.Size}, progress: progress}, desc.Size, st, windows)
	if err != nil {
		return nil, fmt.Errorf("reading layer: %w", err)
	}
	if err := res.Check(l.Digest, l.DiffID); err != nil {
		return nil, err
	}
	read := time.Since(begin)
	var keeping sync.WaitGroup // it writes as much again as the layer's own files
	defer keeping.Wait()
	keeping.Go(func() {
		if _, err := p.indexes.Keep(ctx, l.described(), res); err != nil && !errors.Is(err, soci.ErrNotExpressible) {
			p.log.Warn("keeping index", "err", err)
		}
	})
	if err := l.inheritRoot(ctx, res.Index); err != nil {
		return nil, err
	}
	got, err := st.Commit(ctx, layer.Meta{
		Digest: l.Digest, Size: l.Size, DiffID: l.DiffID, DiffSize: res.Size, Trust: index.Verified,
		BlobCompression: l.compression, Verdict: layer.Verdict{Verified: true},
	}, res.Index, true)
	l.built = err == nil
	p.log.Debug("read layer whole", "layer", l.Digest.String(), "read", read.String(), "then", (time.Since(begin) - read).String())
	return got, err
}

// publishIndexes publishes, in the background, the indexes that were made for an
// image.
func (p *Preparer) publishIndexes(img *resolved, plans []*plan) {
	built := false
	for _, l := range plans {
		built = built || l.built
	}
	if !built {
		return
	}
	p.background.Go(func() error {
		img.indexes.Publish(p.ctx, img.Layers)
		return nil
	})
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
