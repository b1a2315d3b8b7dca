// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"go.podman.io/image/v5/docker/reference"
)

// errBeingPrepared means that a preparation needs what would go.
var errBeingPrepared = fmt.Errorf("%w: an image with it is being prepared", ErrInUse)

// Remove forgets a name of a prepared image; with its last name go its records,
// and the layers that no other prepared image has. It refuses with [ErrInUse]
// while a runtime refers to any of those, and names who: a record that
// disappears under an image makes the runtime's whole image list fail.
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
		p.forget(full)
		return p.images.write(img)
	}
	s, err := p.takeStock()
	if err == nil {
		err = s.held(img)
	}
	if err == nil {
		err = p.remove(ctx, s.goingWith(img))
	}
	if err != nil {
		return fmt.Errorf("removing %s: %w", name, err)
	}
	return nil
}

// going is what goes together: nothing else needs it, and nobody refers to it.
type going struct {
	ids    []string // of records
	image  *Image   // nil for what no image has
	layers []stored
}

func (g going) bytes() int64 {
	var n int64
	for _, l := range g.layers {
		n += l.bytes
	}
	return n
}

// remove removes things in the one order that is safe: a runtime that finds a
// record needs all the rest, a start restores records from an image's file, and
// a cache is what a mount reads. The caller has the turn, and in it found out
// what goes.
func (p *Preparer) remove(ctx context.Context, g going) error {
	if err := p.store.Withdraw(ctx, g.ids...); err != nil { // the records, then the links that they lead through
		return err
	}
	if g.image != nil {
		// A runtime that found a record before may have stored its image since.
		if err := p.stillUnused(g.ids); err != nil {
			return errors.Join(err, p.restoreImage(context.WithoutCancel(ctx), *g.image))
		}
		if err := p.images.remove(g.image.Digest); err != nil {
			return err
		}
		p.forget(g.image.References...)
		p.recordings.end(g.image.Digest)
	}
	for _, l := range g.layers {
		if err := p.layers.Remove(l.digest); err != nil { // its mount, then its cache
			return err
		}
	}
	return nil
}

func (p *Preparer) stillUnused(ids []string) error {
	used, err := p.Used()
	if err != nil {
		return err
	}
	return Refusal(used, ids)
}
