// SPDX-License-Identifier: Apache-2.0

package pins

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

// retry is after how long what failed is tried again, unless Interval is shorter.
const retry = time.Minute

// Run keeps what is pinned until ctx ends.
func (p *Pinner) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		next := p.config.Interval
		if err := p.round(ctx); err != nil {
			next = min(retry, next)
		}
		select {
		case <-time.After(next):
		case <-p.wake:
		case <-ctx.Done():
		}
	}
	return nil
}

// round looks up every name, fetches what is not here, and lets go of what nothing
// needs any more. The error is that something failed, which the pins tell.
func (p *Pinner) round(ctx context.Context) error {
	all := p.All()
	if len(all) == 0 && !p.exists() {
		return nil
	}
	w, err := p.open()
	if err != nil {
		for _, pin := range all {
			p.failed(ctx, pin.Name, err)
		}
		return err
	}
	defer w.Close() //nolint:errcheck // nothing is written any more
	if err := p.forget(ctx, w); err != nil {
		p.config.Logger.Warn("letting go of what is not pinned any more", "err", err)
	}
	var failed error
	for _, pin := range all {
		if err := p.keep(ctx, w, pin.Name); err != nil {
			failed = errors.Join(failed, err)
			p.failed(ctx, pin.Name, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return failed
}

// exists reports whether anything was ever pinned.
func (p *Pinner) exists() bool {
	_, err := ocidir.New(p.config.Dir).Index(context.Background())
	return err == nil
}

func (p *Pinner) failed(ctx context.Context, name string, err error) {
	if ctx.Err() != nil {
		return
	}
	p.config.Logger.Warn("pinned image is not as it should be", "image", name, "err", err)
	p.update(name, func(pin *Pin) { pin.State, pin.Error, pin.Checked = Failed, err.Error(), time.Now() })
}

// forget takes what is not pinned any more out of the layout. What is still prepared
// loses its name only.
func (p *Pinner) forget(ctx context.Context, w *ocidir.Writer) error {
	idx, err := w.Index(ctx)
	if err != nil {
		return err
	}
	var keep []v1.Descriptor
	changed := false
	for _, d := range idx.Manifests {
		if name := nameOf(d); name != "" && !p.Has(name) {
			d.Annotations = maps.Clone(d.Annotations)
			delete(d.Annotations, v1.AnnotationRefName)
			changed = true
		}
		if nameOf(d) != "" || p.config.IsPrepared(p.machine(ctx, w.Layout, d)) {
			keep = append(keep, d)
		}
	}
	if !changed && len(keep) == len(idx.Manifests) {
		return nil
	}
	if err := w.List(ctx, func([]v1.Descriptor) ([]v1.Descriptor, error) { return keep, nil }); err != nil {
		return err
	}
	freed, err := w.Sweep(ctx)
	if freed > 0 {
		p.config.Logger.Info("let go of what is not pinned any more", "bytes", freed)
	}
	return err
}

// keep looks a name up, and fetches and prepares what it names.
func (p *Pinner) keep(ctx context.Context, w *ocidir.Writer, name string) error {
	ref, err := Parse(name)
	if err != nil {
		return err
	}
	have, haveErr := w.Listed(ctx, ref)
	found, err := p.lookUp(ctx, ref)
	if err != nil && haveErr == nil && p.whole(ctx, w, have) == nil {
		// Nobody says anything else, so it stays what it was.
		p.config.Logger.Debug("looking up a pinned image", "image", name, "err", err)
		p.here(ctx, name, have)
		return p.prepare(ctx, w, ref, have)
	}
	if err != nil {
		return err
	}
	if haveErr == nil && have.Digest == found.manifest.Digest && p.whole(ctx, w, have) == nil {
		p.here(ctx, name, have)
		return p.prepare(ctx, w, ref, have)
	}
	desc, err := p.fetch(ctx, w, ref, found)
	if err != nil {
		return fmt.Errorf("from %s: %w", found.origin, err)
	}
	p.config.Logger.Info("pinned image was fetched", "image", name, "digest", desc.Digest.String(), "from", found.origin.String())
	p.here(ctx, name, desc)
	if err := p.prepare(ctx, w, ref, desc); err != nil {
		return err
	}
	return p.forget(ctx, w) // what had the name before
}

// here notes that what a name names is here.
func (p *Pinner) here(_ context.Context, name string, desc v1.Descriptor) {
	p.update(name, func(pin *Pin) {
		pin.State, pin.Error, pin.Checked = Pinned, "", time.Now()
		pin.Digest, pin.From, pin.Done = desc.Digest, desc.Annotations[fromAnnotation], pin.Total
	})
}
