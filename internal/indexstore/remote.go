// SPDX-License-Identifier: Apache-2.0

package indexstore

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
)

// copyBlob copies a blob of at most limit bytes to w, and verifies it.
func copyBlob(ctx context.Context, repo blob.Source, desc blob.Descriptor, limit int64, w io.Writer) error {
	if desc.Size > limit {
		return fmt.Errorf("blob %s in %s has %d bytes, more than %d", desc.Digest, repo, desc.Size, limit)
	}
	rc, err := repo.Open(ctx, desc, 0, desc.Size)
	if err != nil {
		return err
	}
	defer rc.Close() //nolint:errcheck // read only; a broken stream shows in Read
	verifier := desc.Digest.Verifier()
	if _, err := io.Copy(io.MultiWriter(verifier, w), rc); err != nil {
		return fmt.Errorf("copying blob %s from %s: %w", desc.Digest, repo, err)
	}
	if !verifier.Verified() {
		return fmt.Errorf("blob %s from %s: %w", desc.Digest, repo, blob.ErrCorrupt)
	}
	return nil
}

// Pusher is where documents are uploaded to.
type Pusher interface {
	Reader
	PushBlob(ctx context.Context, desc blob.Descriptor, content func() (io.ReadCloser, error)) error
	PushManifest(ctx context.Context, mediaType string, body []byte, tagOrDigest string) (digest.Digest, error)
}

var _ Pusher = (*registry.Repository)(nil)

// pushContent uploads a document.
func pushContent(ctx context.Context, repo Pusher, c Content) (blob.Descriptor, error) {
	digester := digest.Canonical.Digester()
	n, err := io.Copy(digester.Hash(), contextReader{ctx, reader(c)})
	if err == nil && n < c.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return blob.Descriptor{}, fmt.Errorf("reading what is to be published: %w", err)
	}
	desc := blob.Descriptor{Digest: digester.Digest(), Size: n}
	return desc, repo.PushBlob(ctx, desc, func() (io.ReadCloser, error) { return io.NopCloser(reader(c)), nil })
}

// pushLayers uploads the documents about layers, and returns what a manifest says
// of them: the ZTOCs, in the order of the layers, then what goes with them.
func pushLayers(ctx context.Context, repo Pusher, layers []LayerDocuments) ([]v1.Descriptor, error) {
	var ztocs, beside []v1.Descriptor
	for _, l := range layers {
		if _, err := encoded(l.Layer.Digest); err != nil {
			return nil, err
		}
		if l.ZTOC != nil {
			desc, err := pushContent(ctx, repo, l.ZTOC)
			if err != nil {
				return nil, err
			}
			ztocs = append(ztocs, ztocDescriptor(l, desc))
		}
		for _, d := range []struct {
			mediaType string
			content   Content
		}{{digestsType, l.Digests}, {chunksType, l.Chunks}} {
			if d.content == nil {
				continue
			}
			desc, err := pushContent(ctx, repo, d.content)
			if err != nil {
				return nil, err
			}
			beside = append(beside, besideDescriptor(d.mediaType, l, desc))
		}
	}
	all := append(ztocs, beside...)
	if len(all) > maxDocuments {
		return nil, fmt.Errorf("%d documents are more than %d", len(all), maxDocuments)
	}
	return all, nil
}

// pushIndex uploads the documents about layers and the manifest that lists them,
// under a tag. It does nothing if there are none.
func pushIndex(ctx context.Context, repo Pusher, created time.Time, layers []LayerDocuments, tag string) error {
	list, err := pushLayers(ctx, repo, layers)
	if err != nil || len(list) == 0 {
		return err
	}
	body, err := encodeIndex(list, nil, created)
	if err != nil {
		return err
	}
	_, err = pushManifest(ctx, repo, body, tag)
	return err
}

// pushProfile uploads the profile and its manifest, if there is one.
func pushProfile(ctx context.Context, repo Pusher, p Publication, subject *v1.Descriptor, tag string) error {
	if p.Profile == nil {
		return nil
	}
	desc, err := pushContent(ctx, repo, bytes.NewReader(p.Profile))
	if err != nil {
		return err
	}
	profile := v1.Descriptor{MediaType: profileType, Digest: desc.Digest, Size: desc.Size}
	body, err := encodeProfile(profile, subject, p.Created)
	if err != nil {
		return err
	}
	_, err = pushManifest(ctx, repo, body, tag)
	return err
}

// pushManifest uploads a manifest whose config is an empty object, and returns its
// digest.
func pushManifest(ctx context.Context, repo Pusher, body []byte, tag string) (digest.Digest, error) {
	if _, err := pushContent(ctx, repo, bytes.NewReader(v1.DescriptorEmptyJSON.Data)); err != nil {
		return "", err
	}
	return repo.PushManifest(ctx, v1.MediaTypeImageManifest, body, tag)
}
