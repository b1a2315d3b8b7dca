// SPDX-License-Identifier: Apache-2.0

package pins

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/sources"
)

// maxBlobsAtOnce bounds connections.
const maxBlobsAtOnce = 3

const (
	fromAnnotation    = sources.FromAnnotation
	privateAnnotation = sources.PrivateAnnotation
)

// found is what a name names, and who says so.
type found struct {
	origin   sources.Origin
	origins  []sources.Origin // all there are to read from
	manifest blob.Manifest
}

// lookUp asks the sources what a name names, in their order, but for the layout of
// pinned images itself.
func (p *Pinner) lookUp(ctx context.Context, ref reference.Named) (*found, error) {
	all, err := p.config.Sources.Origins(ref, nil, false)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, sources.Origin.Pinned)
	failed := error(nil)
	for _, o := range all {
		name := image.TagOrDigest(ref)
		if o.Layout != nil {
			name = ref.String()
			if d, ok := ref.(reference.Digested); ok {
				name = d.Digest().String()
			}
		}
		m, err := o.Reader().Manifest(ctx, name)
		if err == nil {
			return &found{origin: o, origins: all, manifest: m}, nil
		}
		failed = errors.Join(failed, err)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	if failed == nil {
		failed = sources.ErrOffline
	}
	return nil, failed
}

// fetch copies what was found to the layout, whole, and then gives it its name.
func (p *Pinner) fetch(ctx context.Context, w *ocidir.Writer, ref reference.Named, f *found) (v1.Descriptor, error) {
	manifests := []blob.Manifest{f.manifest}
	if types.MediaType(f.manifest.MediaType).IsIndex() {
		mine, err := image.Machine().Choose(f.manifest.Body)
		if err != nil {
			return v1.Descriptor{}, err
		}
		m, err := f.origin.Reader().Manifest(ctx, mine.String())
		if err != nil {
			return v1.Descriptor{}, err
		}
		manifests = []blob.Manifest{m, f.manifest}
	}
	_, blobs, err := ocidir.Children(manifests[0])
	if err != nil {
		return v1.Descriptor{}, err
	}
	if err := p.fetchBlobs(ctx, w, ref.String(), f, blobs); err != nil {
		return v1.Descriptor{}, err
	}
	for _, m := range manifests {
		desc := blob.Descriptor{Digest: m.Digest, Size: int64(len(m.Body))}
		if err := w.Put(ctx, desc, bytes.NewReader(m.Body)); err != nil {
			return v1.Descriptor{}, err
		}
	}
	desc := v1.Descriptor{
		MediaType: f.manifest.MediaType, Digest: f.manifest.Digest, Size: int64(len(f.manifest.Body)),
		Annotations: map[string]string{v1.AnnotationRefName: ref.String(), fromAnnotation: string(f.origin.Place)},
	}
	if r := f.origin.Repository; r != nil && r.Authenticated() {
		desc.Annotations[privateAnnotation] = "true"
	}
	return desc, w.List(ctx, func(all []v1.Descriptor) ([]v1.Descriptor, error) {
		for i, d := range all {
			if nameOf(d) == ref.String() {
				all[i].Annotations = maps.Clone(d.Annotations)
				delete(all[i].Annotations, v1.AnnotationRefName)
			}
		}
		return append(all, desc), nil
	})
}

func (p *Pinner) fetchBlobs(ctx context.Context, w *ocidir.Writer, name string, f *found, blobs []v1.Descriptor) error {
	var total int64
	var todo []blob.Descriptor
	for _, b := range blobs {
		d := blob.Descriptor{Digest: b.Digest, Size: b.Size}
		if slices.Contains(todo, d) {
			continue
		}
		have, err := w.Has(ctx, d)
		if err != nil {
			return err
		}
		if !have {
			todo = append(todo, d)
			total += d.Size
		}
	}
	var done atomic.Int64
	tell := func() {
		p.update(name, func(pin *Pin) { pin.State, pin.Error, pin.Done, pin.Total = Fetching, "", done.Load(), total })
	}
	tell()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxBlobsAtOnce)
	for _, d := range todo {
		g.Go(func() error {
			return p.fetchBlob(ctx, w, d, sources.Sources(f.origins), func(n int64) {
				if before := done.Add(n) - n; before>>23 != (before+n)>>23 { // every 8 MiB
					tell()
				}
			})
		})
	}
	return g.Wait()
}

// fetchBlob copies a blob from the first source that has it as it should be.
func (p *Pinner) fetchBlob(ctx context.Context, w *ocidir.Writer, d blob.Descriptor, from []blob.Source, tell func(int64)) error {
	var failed error
	for _, src := range from {
		rc, err := src.Open(ctx, d, 0, d.Size)
		if err == nil {
			r := &yielding{ctx: ctx, r: rc, yield: p.config.Yield, tell: tell}
			err = errors.Join(w.Put(ctx, d, r), rc.Close())
			if err == nil {
				return nil
			}
			tell(-r.done)
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", src, err))
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return failed
}

// yielding reads when nothing more urgent is going on.
type yielding struct {
	ctx   context.Context //nolint:containedctx // of one stream
	r     io.Reader
	yield func(context.Context) error
	tell  func(int64)
	done  int64
}

func (y *yielding) Read(b []byte) (int, error) {
	if err := y.yield(y.ctx); err != nil {
		return 0, err
	}
	n, err := y.r.Read(b)
	y.done += int64(n)
	y.tell(int64(n))
	return n, err
}

// machine is the digest of the manifest for this machine in what an entry lists.
func (p *Pinner) machine(ctx context.Context, l *ocidir.Layout, d v1.Descriptor) digest.Digest {
	if !types.MediaType(d.MediaType).IsIndex() {
		return d.Digest
	}
	m, err := l.Manifest(ctx, d.Digest.String())
	if err != nil {
		return d.Digest
	}
	mine, err := image.Machine().Choose(m.Body)
	if err != nil {
		return d.Digest
	}
	return mine
}

// whole reports what is missing of an entry for this machine.
func (p *Pinner) whole(ctx context.Context, w *ocidir.Writer, desc v1.Descriptor) error {
	m, err := w.Manifest(ctx, p.machine(ctx, w.Layout, desc).String())
	if err != nil {
		return err
	}
	_, blobs, err := ocidir.Children(m)
	if err != nil {
		return err
	}
	for _, b := range blobs {
		have, err := w.Has(ctx, blob.Descriptor{Digest: b.Digest, Size: b.Size})
		if err != nil || !have {
			return fmt.Errorf("blob %s is missing: %w", b.Digest, errors.Join(blob.ErrNotFound, err))
		}
	}
	return nil
}

// prepare has an image prepared, if it is one and is not. Nothing else runs.
func (p *Pinner) prepare(ctx context.Context, w *ocidir.Writer, ref reference.Named, desc v1.Descriptor) error {
	d := p.machine(ctx, w.Layout, desc)
	if p.config.IsPrepared(d) {
		return nil
	}
	m, err := w.Manifest(ctx, d.String())
	if err != nil {
		return err
	}
	var doc v1.Manifest
	if err := json.Unmarshal(m.Body, &doc); err != nil {
		return fmt.Errorf("parsing manifest %s: %w", d, err)
	}
	if t := types.MediaType(doc.Config.MediaType); !t.IsConfig() {
		return nil
	}
	return p.config.Prepare(ctx, ref)
}
