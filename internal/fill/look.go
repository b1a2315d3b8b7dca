// SPDX-License-Identifier: Apache-2.0

package fill

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/verify"
)

// errLie means that a source sent other bytes than the blob's digest says.
var errLie = errors.New("the source does not have the blob that its digest names")

// look streams the blob of a layer from one source. An error says nothing about
// the layer.
func (f *Filler) look(ctx context.Context, l *layer.Layer, src blob.Source) (layer.Verdict, error) {
	desc := blob.Descriptor{Digest: l.Digest, Size: l.Size}
	filling, err := l.Device().Filling()
	if err != nil {
		return layer.Verdict{}, err
	}
	defer filling.Close()
	body, err := src.Open(ctx, desc, 0, desc.Size)
	if err != nil {
		return layer.Verdict{}, err
	}
	defer body.Close() //nolint:errcheck // read only; a broken stream shows in Read
	r := f.polite(ctx, body, filling.Priority)
	res, mismatch, err := verify.Content(ctx, r, desc.Size, filling, l.Chunks())
	switch {
	case errors.Is(err, index.ErrTooLarge):
		return layer.Verdict{}, err // verified it will never be; but it is what it is
	case errors.Is(err, index.ErrInvalid):
		// The layer's fault only if these are its bytes.
		filling.Close()
		if lie := f.check(ctx, src, desc); lie != nil {
			return layer.Verdict{}, lie
		}
		return layer.Verdict{Quarantined: fmt.Sprintf("a normal pull could not extract it: %v", err)}, nil
	case errors.Is(err, blob.ErrCorrupt):
		return layer.Verdict{}, fmt.Errorf("%w: %w", errLie, err)
	case err != nil:
		return layer.Verdict{}, err
	}
	return judge(l, res, mismatch)
}

// judge compares what came with what the layer is said to be.
func judge(l *layer.Layer, res *stream.Result, mismatch error) (layer.Verdict, error) {
	if res.Blob != l.Digest {
		return layer.Verdict{}, fmt.Errorf("%w: it has %s", errLie, res.Blob)
	}
	if res.DiffID != l.DiffID {
		return layer.Verdict{Quarantined: fmt.Sprintf("its diff ID is %s, the image states %s", res.DiffID, l.DiffID)}, nil
	}
	if mismatch != nil {
		return layer.Verdict{Quarantined: fmt.Sprintf("its index does not fit its content: %v", mismatch)}, nil
	}
	err := l.CompareTree(res.Index)
	if errors.Is(err, erofs.ErrTreeDiffers) {
		return layer.Verdict{Quarantined: err.Error()}, nil
	}
	if err != nil {
		return layer.Verdict{}, err
	}
	return layer.Verdict{Verified: true}, nil
}

// check reads a blob only to see if it has its digest.
func (f *Filler) check(ctx context.Context, src blob.Source, desc blob.Descriptor) error {
	body, err := src.Open(ctx, desc, 0, desc.Size)
	if err != nil {
		return err
	}
	defer body.Close() //nolint:errcheck // read only; a broken stream shows in Read
	h := sha256.New()
	fills := func() device.Priority { return device.Fill }
	if _, err := io.Copy(h, f.polite(ctx, body, fills)); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, h); got != desc.Digest {
		return fmt.Errorf("%w: it has %s", errLie, got)
	}
	return nil
}

// polite lets everybody else go first, and keeps to the rate.
func (f *Filler) polite(ctx context.Context, r io.Reader, priority func() device.Priority) io.Reader {
	return &polite{f: f, ctx: ctx, r: r, priority: priority}
}

type polite struct {
	f        *Filler
	ctx      context.Context //nolint:containedctx // of one stream
	r        io.Reader
	priority func() device.Priority
}

func (p *polite) Read(b []byte) (int, error) {
	if err := p.f.Scheduler.Yield(p.ctx, p.priority); err != nil {
		return 0, err
	}
	n, err := p.r.Read(b[:min(len(b), burst)])
	if p.f.limit != nil && n > 0 {
		if waitErr := p.f.limit.WaitN(p.ctx, n); waitErr != nil && err == nil {
			err = waitErr
		}
	}
	return n, err
}
