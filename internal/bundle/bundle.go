// SPDX-License-Identifier: Apache-2.0

// Package bundle packs images and artifacts, with all that belongs to them, into one
// directory or file: for a stick, for a site without a network. A bundle is an OCI
// layout, which other tools read, too; an archive is not compressed, so that layers can
// be mounted from it lazily.
//
// Manifests and blobs are what they were, byte for byte, so an image from a bundle has
// the same digest and id. What refers to it goes along: indexes, profiles, signatures of
// cosign, attestations. index.json lists images under their full names, and what refers
// to others without one.
//
// What a bundle holds is hostile to who verifies or imports it: see package ocidir.
package bundle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/indexstore"
)

const (
	maxBlobsAtOnce = 3
	maxReferrers   = 1000 // of an image
	maxDepth       = 3    // of what refers to what refers to an image
)

// Origin is where an image or an artifact is packed from.
type Origin struct {
	// Name is its full name.
	Name string
	// Asked is what its reader calls it.
	Asked  string
	Reader indexstore.Reader
	// Sources are where blobs are read from, best first.
	Sources []blob.Source
}

// Options says what is packed.
type Options struct {
	// Platforms are those of an image that has several; nil: all.
	Platforms []image.Platform
	// NoReferrers leaves out what refers to an image.
	NoReferrers bool
	// Progress, if it is not nil, is told how many bytes of a blob have been read, by one
	// goroutine at a time.
	Progress func(blob digest.Digest, done, total int64)
}

// Packer packs into one bundle. Its methods are called one at a time.
type Packer struct {
	sink    ocidir.Sink
	options Options
	listed  []v1.Descriptor

	telling sync.Mutex // held while Progress is called
}

// New returns a Packer. [Packer.Finish] completes the bundle.
func New(sink ocidir.Sink, o Options) *Packer {
	if o.Progress == nil {
		o.Progress = func(digest.Digest, int64, int64) {}
	}
	return &Packer{sink: sink, options: o}
}

// Packed is what was packed.
type Packed struct {
	Name      string        `json:"name"`
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
	Platforms int           `json:"platforms,omitempty"` // of an index
	Referrers int           `json:"referrers"`
	Bytes     int64         `json:"bytes"` // of all blobs, of which others may have some as well
}

// Pack packs an image or an artifact.
func (p *Packer) Pack(ctx context.Context, o Origin) (*Packed, error) {
	got, err := p.pack(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("packing %s: %w", o.Name, err)
	}
	return got, nil
}

func (p *Packer) pack(ctx context.Context, o Origin) (*Packed, error) {
	ref, err := reference.ParseNamed(o.Name)
	if err != nil {
		return nil, fmt.Errorf("want a name with a registry, such as registry.example.com/team/app:v1: %w", err)
	}
	root, err := o.Reader.Manifest(ctx, o.Asked)
	if err != nil {
		return nil, err
	}
	packed := &Packed{Name: o.Name, Digest: root.Digest, MediaType: root.MediaType}
	all := []blob.Manifest{root}
	if types.MediaType(root.MediaType).IsIndex() {
		some, err := p.platforms(ctx, o, root)
		if err != nil {
			return nil, err
		}
		packed.Platforms = len(some)
		all = append(some, root)
	}
	for _, m := range all {
		if err := p.manifest(ctx, o, m, packed); err != nil {
			return nil, err
		}
	}
	desc := descriptor(root)
	desc.Annotations = map[string]string{v1.AnnotationRefName: o.Name}
	if isImage(root) {
		desc.Annotations[ocidir.ContainerdName] = o.Name
	}
	p.list(desc)
	if p.options.NoReferrers {
		return packed, nil
	}
	for _, m := range all {
		if err := p.referrers(ctx, o, m.Digest, packed, 1); err != nil {
			return nil, err
		}
		if err := p.cosign(ctx, o, ref, m.Digest, packed); err != nil {
			return nil, err
		}
	}
	return packed, nil
}

// isImage reports whether a manifest is that of an image, or an index.
func isImage(m blob.Manifest) bool {
	var doc v1.Manifest
	return types.MediaType(m.MediaType).IsIndex() || json.Unmarshal(m.Body, &doc) == nil && types.MediaType(doc.Config.MediaType).IsConfig()
}

func descriptor(m blob.Manifest) v1.Descriptor {
	return v1.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Body))}
}

// list lists something, in the place of what had its name before.
func (p *Packer) list(d v1.Descriptor) {
	name := d.Annotations[v1.AnnotationRefName]
	p.listed = slices.DeleteFunc(p.listed, func(have v1.Descriptor) bool {
		other := have.Annotations[v1.AnnotationRefName]
		return other == name && (name != "" || have.Digest == d.Digest)
	})
	p.listed = append(p.listed, d)
}

// platforms reads the manifests of an index that are wanted.
func (p *Packer) platforms(ctx context.Context, o Origin, root blob.Manifest) (all []blob.Manifest, err error) {
	var wanted []digest.Digest
	if p.options.Platforms == nil {
		manifests, _, err := ocidir.Children(root)
		if err != nil {
			return nil, err
		}
		for _, m := range manifests {
			wanted = append(wanted, m.Digest)
		}
	}
	for _, platform := range p.options.Platforms {
		d, err := platform.Choose(root.Body)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(wanted, d) {
			wanted = append(wanted, d)
		}
	}
	for _, d := range wanted {
		m, err := o.Reader.Manifest(ctx, d.String())
		if _, local := o.Reader.(*ocidir.Layout); local && p.options.Platforms == nil && errors.Is(err, blob.ErrNotFound) {
			continue // a bundle has those that were asked for
		}
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, nil
}

// manifest packs a manifest, after all that it names.
func (p *Packer) manifest(ctx context.Context, o Origin, m blob.Manifest, packed *Packed) error {
	if !types.MediaType(m.MediaType).IsIndex() {
		_, blobs, err := ocidir.Children(m)
		if err != nil {
			return err
		}
		if err := p.blobs(ctx, o, blobs, packed); err != nil {
			return err
		}
	}
	desc := blob.Descriptor{Digest: m.Digest, Size: int64(len(m.Body))}
	packed.Bytes += desc.Size
	return p.put(ctx, desc, m.Body)
}

func (p *Packer) put(ctx context.Context, desc blob.Descriptor, body []byte) error {
	have, err := p.sink.Has(ctx, desc)
	if have || err != nil {
		return err
	}
	return p.sink.Put(ctx, desc, newReader(body))
}

func (p *Packer) blobs(ctx context.Context, o Origin, blobs []v1.Descriptor, packed *Packed) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxBlobsAtOnce)
	if _, oneByOne := p.sink.(*ocidir.ArchiveWriter); oneByOne {
		g.SetLimit(1) // in the same order every time
	}
	var seen []digest.Digest
	for _, b := range blobs {
		d := blob.Descriptor{Digest: b.Digest, Size: b.Size}
		if slices.Contains(seen, d.Digest) {
			continue
		}
		seen = append(seen, d.Digest)
		packed.Bytes += d.Size
		have, err := p.sink.Has(ctx, d)
		if err != nil {
			return errors.Join(err, g.Wait())
		}
		if !have {
			g.Go(func() error { return p.blob(ctx, o, d) })
		}
	}
	return g.Wait()
}

// blob packs a blob from the first source that has it as it should be.
func (p *Packer) blob(ctx context.Context, o Origin, d blob.Descriptor) error {
	var failed error
	for _, src := range o.Sources {
		rc, err := src.Open(ctx, d, 0, d.Size)
		if err == nil {
			err = errors.Join(p.sink.Put(ctx, d, &reporting{r: rc, p: p, desc: d}), rc.Close())
			if err == nil {
				return nil
			}
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", src, err))
		if ctx.Err() != nil {
			break
		}
	}
	return failed
}

// reporting reports what is read through it.
type reporting struct {
	r    io.Reader
	p    *Packer
	desc blob.Descriptor
	done int64
}

func (r *reporting) Read(b []byte) (int, error) {
	n, err := r.r.Read(b)
	r.done += int64(n)
	r.p.telling.Lock()
	defer r.p.telling.Unlock()
	r.p.options.Progress(r.desc.Digest, r.done, r.desc.Size)
	return n, err
}

// Finish completes the bundle. In a directory, what is there of the same names gives
// way, and all else stays.
func (p *Packer) Finish(ctx context.Context) error {
	err := p.sink.List(ctx, func(have []v1.Descriptor) ([]v1.Descriptor, error) {
		before := p.listed
		p.listed = have
		for _, d := range before {
			p.list(d)
		}
		return p.listed, nil
	})
	if err != nil {
		return fmt.Errorf("completing the bundle: %w", err)
	}
	return nil
}
