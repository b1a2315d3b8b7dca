// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/indexstore"
)

func newReader(body []byte) io.Reader { return bytes.NewReader(body) }

// referrers packs what refers to a manifest, and what refers to that.
func (p *Packer) referrers(ctx context.Context, o Origin, d digest.Digest, packed *Packed, depth int) error {
	list, err := o.Reader.Referrers(ctx, d)
	if errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrUnauthorized) {
		return nil // some registries refuse what they do not have
	}
	if err != nil {
		return err
	}
	var idx v1.Index
	if err := json.Unmarshal(list.Body, &idx); err != nil {
		return fmt.Errorf("parsing referrers of %s: %w", d, err)
	}
	for _, r := range idx.Manifests {
		if packed.Referrers == maxReferrers {
			return fmt.Errorf("more than %d manifests refer to it: leave them out with --no-referrers", maxReferrers)
		}
		m, err := o.Reader.Manifest(ctx, r.Digest.String())
		if errors.Is(err, blob.ErrNotFound) {
			continue // it has gone since
		}
		if err != nil {
			return err
		}
		if err := p.manifest(ctx, o, m, packed); err != nil {
			return err
		}
		packed.Referrers++
		p.list(unnamed(m))
		if depth < maxDepth {
			if err := p.referrers(ctx, o, m.Digest, packed, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// unnamed is how index.json lists what refers to something else.
func unnamed(m blob.Manifest) v1.Descriptor {
	desc := descriptor(m)
	var doc v1.Manifest
	if json.Unmarshal(m.Body, &doc) == nil {
		desc.ArtifactType = ocidir.ArtifactType(doc)
	}
	return desc
}

// cosign packs what cosign keeps under tags that are made of an image's digest:
// github.com/sigstore/cosign, pkg/oci/remote, SignatureTag and the like.
func (p *Packer) cosign(ctx context.Context, o Origin, ref reference.Named, d digest.Digest, packed *Packed) error {
	for _, suffix := range []string{"sig", "att", "sbom"} {
		tag := d.Algorithm().String() + "-" + d.Encoded() + "." + suffix
		tagged, err := reference.WithTag(reference.TrimNamed(ref), tag)
		if err != nil {
			return err
		}
		asked := tag
		if _, local := o.Reader.(*ocidir.Layout); local {
			asked = tagged.String()
		}
		m, err := o.Reader.Manifest(ctx, asked)
		if errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrUnauthorized) {
			continue
		}
		if err == nil {
			err = p.manifest(ctx, o, m, packed)
		}
		if err != nil {
			return err
		}
		packed.Referrers++
		desc := descriptor(m)
		desc.Annotations = map[string]string{v1.AnnotationRefName: tagged.String()}
		p.list(desc)
	}
	return nil
}

// Publisher takes documents about an image that is packed, as a registry would: package
// indexstore publishes indexes and profiles there.
func (p *Packer) Publisher(reader indexstore.Reader) indexstore.Pusher {
	return &publisher{reader, p}
}

type publisher struct {
	indexstore.Reader
	p *Packer
}

// PushBlob packs a document.
func (u *publisher) PushBlob(ctx context.Context, desc blob.Descriptor, content func() (io.ReadCloser, error)) error {
	have, err := u.p.sink.Has(ctx, desc)
	if have || err != nil {
		return err
	}
	rc, err := content()
	if err != nil {
		return err
	}
	return errors.Join(u.p.sink.Put(ctx, desc, rc), rc.Close())
}

// PushManifest packs a manifest that refers to an image.
func (u *publisher) PushManifest(ctx context.Context, mediaType string, body []byte, _ string) (digest.Digest, error) {
	m := blob.Manifest{MediaType: mediaType, Digest: digest.FromBytes(body), Body: body}
	if err := u.p.put(ctx, blob.Descriptor{Digest: m.Digest, Size: int64(len(body))}, body); err != nil {
		return "", err
	}
	u.p.list(unnamed(m))
	return m.Digest, nil
}
