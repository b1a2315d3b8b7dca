// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
)

// PushBlob uploads a blob, unless the registry has it. content opens its bytes,
// once for each time that they are sent; after PushBlob has returned they are not
// read any more. What does not match desc is refused, by the registry at the
// latest.
//
// Without credentials that may push, or if the registry takes nothing at all, the
// error is [blob.ErrUnauthorized]. Others are those of [blob.Source].
// See https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-a-blob-monolithically.
func (r *Repository) PushBlob(ctx context.Context, desc blob.Descriptor, content func() (io.ReadCloser, error)) error {
	err := desc.Digest.Validate()
	if err == nil {
		err = r.pushBlob(ctx, desc, content)
	}
	if err != nil {
		return fmt.Errorf("pushing blob %q to %s: %w", desc.Digest, r.name, err)
	}
	return nil
}

func (r *Repository) pushBlob(ctx context.Context, desc blob.Descriptor, content func() (io.ReadCloser, error)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if there, err := r.hasBlob(ctx, desc.Digest); there || err != nil {
		return err
	}
	begin := request{method: http.MethodPost, resource: "blobs/uploads/", push: true}
	resp, err := r.send(ctx, begin)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusAccepted {
		return r.pushError(resp)
	}
	location, err := resp.Location()
	drain(resp)
	if err != nil {
		return errors.New("the registry began an upload without a usable location")
	}
	query := location.Query()
	query.Set("digest", desc.Digest.String())
	location.RawQuery = query.Encode()
	_, err = r.put(ctx, request{
		url:    location,
		header: http.Header{"Content-Type": {"application/octet-stream"}},
		body:   r.upload(cancel, desc.Size, content),
	})
	return err
}

// hasBlob reports whether the registry has a blob.
func (r *Repository) hasBlob(ctx context.Context, d digest.Digest) (bool, error) {
	ask := request{method: http.MethodHead, resource: "blobs/" + d.String(), push: true}
	resp, err := r.send(ctx, ask)
	if err != nil {
		return false, err
	}
	defer drain(resp)
	switch {
	case isSuccess(resp.StatusCode):
		return true, nil
	case resp.StatusCode == http.StatusNotFound, !r.isRegistry(resp.Request.URL):
		// Signed URLs may be good for GET alone; to send it once more does no harm.
		return false, nil
	default:
		return false, r.pushError(resp)
	}
}

// PushManifest uploads a manifest or an index under a tag or its digest; "" is
// the digest. It returns the digest. If the manifest has a subject, it is among
// the subject's referrers afterwards: where the registry does not see to that,
// the tag that stands in for the list is updated. Who does so at the same time as
// somebody else may undo the other's update, as the specification has it.
//
// The errors are those of PushBlob.
// See https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-manifests.
func (r *Repository) PushManifest(ctx context.Context, mediaType string, body []byte, tagOrDigest string) (digest.Digest, error) {
	d, err := r.pushManifest(ctx, mediaType, body, tagOrDigest)
	if err != nil {
		return "", fmt.Errorf("pushing manifest %q to %s: %w", tagOrDigest, r.name, err)
	}
	return d, nil
}

func (r *Repository) pushManifest(ctx context.Context, mediaType string, body []byte, ref string) (digest.Digest, error) {
	d := digest.FromBytes(body)
	if ref == "" {
		ref = d.String()
	}
	if want, err := digest.Parse(ref); err == nil {
		if d = want.Algorithm().FromBytes(body); d != want {
			return "", fmt.Errorf("it has digest %s: %w", d, blob.ErrCorrupt)
		}
	} else if _, err := reference.WithTag(r.named, ref); err != nil {
		return "", err
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(body, &manifest); err != nil {
		return "", fmt.Errorf("decoding it: %w", err)
	}
	answer, err := r.putManifest(ctx, mediaType, body, ref)
	if err != nil {
		return "", err
	}
	if manifest.Subject == nil || answer.Get("OCI-Subject") != "" {
		return d, nil
	}
	err = r.addReferrer(ctx, manifest.Subject.Digest, v1.Descriptor{
		MediaType:    mediaType,
		Digest:       d,
		Size:         int64(len(body)),
		ArtifactType: artifactType(manifest),
		Annotations:  manifest.Annotations,
	})
	if err != nil {
		return "", fmt.Errorf("adding it to the referrers of %s: %w", manifest.Subject.Digest, err)
	}
	return d, nil
}

// artifactType is what lists of referrers say a manifest is.
func artifactType(m v1.Manifest) string {
	if m.ArtifactType != "" {
		return m.ArtifactType
	}
	return m.Config.MediaType
}

// putManifest uploads a manifest, and returns the headers of the answer.
func (r *Repository) putManifest(ctx context.Context, mediaType string, body []byte, ref string) (http.Header, error) {
	if len(body) > MaxManifestSize {
		return nil, fmt.Errorf("it is larger than %d bytes", MaxManifestSize)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	return r.put(ctx, request{
		resource: "manifests/" + ref,
		header:   http.Header{"Content-Type": {mediaType}},
		body: r.upload(cancel, int64(len(body)), func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(body)), nil
		}),
	})
}

// put completes what is asked to a PUT that pushes, and sends it. It returns the
// headers of the answer.
func (r *Repository) put(ctx context.Context, req request) (http.Header, error) {
	req.method, req.push = http.MethodPut, true
	resp, err := r.send(ctx, req)
	if err != nil {
		return nil, err
	}
	if !isSuccess(resp.StatusCode) {
		return nil, r.pushError(resp)
	}
	drain(resp)
	return resp.Header, nil
}

// pushError is what statusError is, for pushes: a registry that is read-only
// answers them with status 405, whoever pushes.
func (r *Repository) pushError(resp *http.Response) error {
	err := r.statusError(resp)
	if resp.StatusCode == http.StatusMethodNotAllowed {
		return fmt.Errorf("%w: %w", err, blob.ErrUnauthorized)
	}
	return err
}

// referrersTag is the tag that stands in for the list of a manifest's referrers.
// See https://github.com/opencontainers/distribution-spec/blob/main/spec.md#referrers-tag-schema.
func referrersTag(d digest.Digest) string {
	const longest = 64 // of the encoded part
	return d.Algorithm().String() + "-" + d.Encoded()[:min(longest, len(d.Encoded()))]
}

// addReferrer adds desc to the list that the referrers tag of a subject names.
func (r *Repository) addReferrer(ctx context.Context, subject digest.Digest, desc v1.Descriptor) error {
	if err := subject.Validate(); err != nil {
		return fmt.Errorf("subject %q: %w", subject, err)
	}
	tag := referrersTag(subject)
	var index v1.Index
	old, err := r.manifest(ctx, tag)
	switch {
	case errors.Is(err, blob.ErrNotFound):
	case err != nil:
		return fmt.Errorf("reading tag %s: %w", tag, err)
	default:
		if err := json.Unmarshal(old.Body, &index); err != nil {
			return fmt.Errorf("decoding tag %s: %w", tag, err)
		}
		if is := cmp.Or(index.MediaType, old.MediaType); is != v1.MediaTypeImageIndex {
			return fmt.Errorf("tag %s is no image index but %q", tag, shorten(is))
		}
	}
	index.SchemaVersion, index.MediaType = 2, v1.MediaTypeImageIndex
	if slices.ContainsFunc(index.Manifests, func(m v1.Descriptor) bool { return m.Digest == desc.Digest }) {
		return nil
	}
	index.Manifests = append(index.Manifests, desc)
	body, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if _, err := r.putManifest(ctx, v1.MediaTypeImageIndex, body, tag); err != nil {
		return fmt.Errorf("updating tag %s: %w", tag, err)
	}
	return nil
}
