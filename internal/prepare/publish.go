// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
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
	if err := p.images.add(res); err != nil {
		return err
	}
	if err := p.store.Publish(ctx, chain); err != nil {
		return err
	}
	p.log.Info("published image", "image", res.Reference, "digest", img.digest.String(), "layers", len(chain), "of", len(res.Layers))
	return nil
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

// Remove forgets a name of a prepared image; with its last name go its records,
// and the layers that no other prepared image has. It refuses with [ErrInUse]
// while a runtime refers to any of those: a record that disappears under an
// image makes the runtime's whole image list fail.
func (p *Preparer) Remove(ctx context.Context, name string) error {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return err
	}
	defer done()
	img, err := p.Find(name)
	if err != nil {
		return err
	}
	if ref, err := reference.ParseNormalizedNamed(name); err == nil && len(img.References) > 1 && img.Digest.String() != name {
		full := reference.TagNameOnly(ref).String()
		img.References = slices.DeleteFunc(img.References, func(r string) bool { return r == full })
		return p.images.write(img)
	}
	if err := p.removeImage(ctx, img); err != nil {
		return fmt.Errorf("removing %s: %w", name, err)
	}
	return nil
}

func (p *Preparer) removeImage(ctx context.Context, img Image) error {
	all, err := p.images.all()
	if err != nil {
		return err
	}
	keepRecord, keepLayer := map[string]bool{}, map[digest.Digest]bool{}
	for _, other := range all {
		if other.Digest == img.Digest {
			continue
		}
		for _, id := range other.chain() {
			keepRecord[id] = true
		}
		for _, l := range other.Layers {
			keepLayer[l.Digest] = true
		}
	}
	ids := slices.DeleteFunc(img.chain(), func(id string) bool { return keepRecord[id] })
	if err := p.refuseUsed(ids); err != nil {
		return err
	}
	if err := p.store.Withdraw(ctx, ids...); err != nil {
		return err
	}
	if err := p.images.remove(img.Digest); err != nil {
		return err
	}
	for _, l := range img.Layers {
		if !keepLayer[l.Digest] {
			if err := p.layers.Remove(l.Digest); err != nil {
				return err
			}
		}
	}
	return nil
}

// Used returns the ids of the records that a runtime refers to. An error means
// that it is not known, and nothing may be removed.
func (p *Preparer) Used() (map[string]bool, error) {
	records, err := p.store.Layers()
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, root := range p.policy.RuntimeRoots {
		in, err := imagestore.References(root, records)
		if err != nil {
			return nil, err
		}
		for id := range in {
			used[id] = true
		}
	}
	return used, nil
}

func (p *Preparer) refuseUsed(ids []string) error {
	used, err := p.Used()
	if err != nil {
		return err
	}
	var held []string
	for _, id := range ids {
		if used[id] {
			held = append(held, id)
		}
	}
	if len(held) > 0 {
		return fmt.Errorf("a runtime refers to layer %s: remove its image and containers there first (podman rmi, crictl rmi): %w",
			strings.Join(held, ", "), ErrInUse)
	}
	return nil
}
