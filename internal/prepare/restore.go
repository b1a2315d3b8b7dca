// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/sources"
)

// RestoreSources gives the layers of prepared images the places that the images
// were read from, and tells where those came from. It uses no network.
func (p *Preparer) RestoreSources() {
	all, err := p.images.all()
	if err != nil {
		p.log.Error("restoring sources", "err", err)
		return
	}
	for _, img := range all {
		p.restoreSources(img)
	}
}

// Restore puts the prepared images back in place after a start: records that
// are missing or damaged. It uses no network. What cannot be restored is logged; its records go if no
// runtime refers to them, so that the next pull is a normal one.
func (p *Preparer) Restore(ctx context.Context) error {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return err
	}
	defer done()
	broken, err := p.store.Recover(ctx, func(d digest.Digest) (string, bool) {
		_, served := p.layers.Get(d)
		return p.layers.MountDirectory(d), served
	})
	if err != nil {
		return err
	}
	for _, id := range broken {
		p.log.Error("record cannot be restored", "layer", id)
	}
	for _, l := range p.layers.All() {
		if l.Verdict().Err() == nil {
			continue
		}
		// A kill may have come between the verdict and this.
		if err := p.store.Hide(ctx, l.Digest); err != nil {
			return fmt.Errorf("hiding layer %s: %w", l.Digest, err)
		}
	}
	all, err := p.images.all()
	if err != nil {
		return err
	}
	for _, img := range all {
		if err := p.restoreImage(ctx, img); err != nil {
			p.log.Error("restoring image", "image", img.Digest.String(), "err", err)
		}
	}
	return p.withdraw(ctx, func(d digest.Digest) bool {
		_, served := p.layers.Get(d)
		return !served
	})
}

func (p *Preparer) restoreImage(ctx context.Context, img Image) error {
	var available []LayerResult
	for _, l := range img.Layers {
		if have, ok := p.layers.Get(l.Digest); !ok || have.Verdict().Err() != nil {
			break
		}
		available = append(available, l)
	}
	chain, err := p.chain(available)
	if err != nil || len(chain) == 0 {
		return err
	}
	return p.store.Publish(ctx, chain)
}

// restoreSources gives layers the places that their image was read from, with the
// credentials of the pull if they are kept. After a boot they are not: then the
// node's own are used.
func (p *Preparer) restoreSources(img Image) {
	p.restoreOrigins(img)
	for _, name := range img.References {
		ref, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			p.log.Error("restoring sources", "image", name, "err", err)
			continue
		}
		var creds *registry.Credentials
		if c, ok := p.kept.Get(name); ok {
			creds = &c
		}
		origins, err := p.sources.Origins(ref, creds, false)
		if err != nil {
			p.log.Warn("restoring sources", "image", name, "err", err)
			continue
		}
		for _, l := range img.Layers {
			if have, ok := p.layers.Get(l.Digest); ok {
				have.Device().AddSources(sources.Sources(origins))
			}
		}
	}
}

// Suspend withdraws, before the daemon stops, the records that no runtime refers
// to and that cannot be served without it: a pull while it is down is a normal
// one. [Preparer.Restore] brings them back.
func (p *Preparer) Suspend(ctx context.Context) error {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return err
	}
	defer done()
	err = p.withdraw(ctx, func(digest.Digest) bool { return true })
	return errors.Join(err, p.store.Detach())
}

// withdraw removes the records of layers for which unserved is true, and those
// built on them, as far as no runtime refers to them.
func (p *Preparer) withdraw(ctx context.Context, unserved func(digest.Digest) bool) error {
	used, err := p.Used()
	if err != nil {
		return fmt.Errorf("keeping all records: %w", err)
	}
	records, err := p.store.Layers()
	if err != nil {
		return err
	}
	gone := map[string]bool{}
	for changed := true; changed; {
		changed = false
		for _, l := range records {
			if !gone[l.ID] && (unserved(l.BlobDigest) || gone[l.Parent]) {
				gone[l.ID], changed = true, true
			}
		}
	}
	var ids []string
	for _, l := range records {
		switch {
		case !gone[l.ID]:
		case len(used[l.ID]) > 0: // and so are its parents
			if !servedBy(p, l.BlobDigest) {
				p.log.Error("a layer that a runtime refers to cannot be served", "layer", l.BlobDigest.String())
			}
		default:
			ids = append(ids, l.ID)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	return p.store.Withdraw(ctx, ids...)
}

func servedBy(p *Preparer, d digest.Digest) bool {
	_, ok := p.layers.Get(d)
	return ok
}
