// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/imagestore"
)

// Errors that callers of a Preparer tell apart.
var (
	// ErrUnknown means that no such image has been prepared.
	ErrUnknown = errors.New("no such image has been prepared")
	// ErrInUse means that a runtime refers to a layer.
	ErrInUse = errors.New("in use")
)

// takeTurn waits for the right to change records and images.
func (p *Preparer) takeTurn(ctx context.Context) (done func(), err error) {
	select {
	case p.publishing <- struct{}{}:
		return func() { <-p.publishing }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// publish records the layers of an image that are available, base first, and
// the image among the prepared ones.
func (p *Preparer) publish(ctx context.Context, img *resolved, res *Result) error {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return err
	}
	defer done()
	chain, err := p.chain(res.Layers)
	if err != nil {
		return err
	}
	// First the image: its layers must not look unused.
	if err := p.images.add(res, img.ref.Name(), img.private); err != nil {
		return err
	}
	if err := p.store.Publish(ctx, chain); err != nil {
		return err
	}
	p.log.Info("published image", "image", res.Reference, "digest", img.Manifest.Digest.String(), "layers", len(chain), "of", len(res.Layers))
	return nil
}

// publishEarly publishes layers that were read whole while others are still being
// read: another image may have them too, and what was fetched is of use even if this
// preparation does not end well.
func (p *Preparer) publishEarly(ctx context.Context, img *resolved, plans []*plan) {
	res := &Result{Reference: img.ref.String(), Digest: img.Manifest.Digest}
	for i, l := range plans {
		select {
		case <-l.settled:
		case <-ctx.Done():
			return
		}
		if l.Action == Left || i == len(plans)-1 {
			return
		}
		res.Layers = append(res.Layers, l.LayerResult)
		if !l.built {
			continue
		}
		sofar := *res
		for _, rest := range plans[i+1:] {
			sofar.Layers = append(slices.Clip(sofar.Layers), LayerResult{
				Digest: rest.Digest, Size: rest.Size, DiffID: rest.DiffID, Action: Left, Reason: "it is still being read",
			})
		}
		if err := p.publish(ctx, img, &sofar); err != nil && ctx.Err() == nil {
			p.log.Warn("publishing a layer ahead of others", "layer", l.Digest.String(), "err", err)
		}
	}
}

// chain makes the records of the layers that are not left, base first.
func (p *Preparer) chain(layers []LayerResult) ([]imagestore.Layer, error) {
	var chain []imagestore.Layer
	parent := ""
	for _, l := range layers {
		if l.Action == Left {
			break
		}
		have, ok := p.layers.Get(l.Digest)
		if !ok {
			return nil, fmt.Errorf("layer %s was removed meanwhile", l.Digest)
		}
		chain = append(chain, imagestore.Layer{
			ID: l.ChainID, Parent: parent, Created: time.Now().UTC(),
			BlobDigest: have.Digest, BlobSize: have.Size,
			DiffID: have.DiffID, DiffSize: have.DiffSize,
			Compression:    recordCompression(have.BlobCompression),
			MountDirectory: have.MountDirectory(),
		})
		parent = l.ChainID
	}
	return chain, nil
}

// Images returns the prepared images, oldest first.
func (p *Preparer) Images() ([]Image, error) { return p.images.all() }

// Find returns the prepared image of that name, or of that manifest digest.
func (p *Preparer) Find(name string) (Image, error) {
	all, err := p.images.all()
	if err != nil {
		return Image{}, err
	}
	full := name
	if ref, err := reference.ParseNormalizedNamed(name); err == nil {
		full = reference.TagNameOnly(ref).String()
	}
	for _, i := range all {
		if slices.Contains(i.References, full) || i.Digest.String() == name {
			return i, nil
		}
	}
	return Image{}, fmt.Errorf("%s: %w", name, ErrUnknown)
}
