// SPDX-License-Identifier: Apache-2.0

package sharedstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/image"
)

// Bounds of signatures.
const (
	maxSignatures = 64
	maxSignature  = 4 << 20 // bytes
)

// signatures reads the signatures that cosign has put beside an image, under the tag
// sha256-<hex>.sig, as containers/storage keeps them: go.podman.io/image/v5,
// internal/signature, Blob. A layout has them under the full name.
func signatures(ctx context.Context, r image.Reader, name string, d digest.Digest) ([][]byte, error) {
	ref, err := reference.ParseNamed(name)
	if err != nil {
		return nil, err
	}
	tag := d.Algorithm().String() + "-" + d.Encoded() + ".sig"
	m, err := r.Manifest(ctx, tag)
	if errors.Is(err, blob.ErrNotFound) {
		if tagged, terr := reference.WithTag(reference.TrimNamed(ref), tag); terr == nil {
			if m2, err2 := r.Manifest(ctx, tagged.String()); err2 == nil {
				m, err = m2, nil
			}
		}
	}
	if errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrUnauthorized) {
		return nil, nil // some registries refuse what they do not have
	}
	if err != nil {
		return nil, err
	}
	var doc v1.Manifest
	if err := json.Unmarshal(m.Body, &doc); err != nil {
		return nil, fmt.Errorf("parsing manifest %s: %w", m.Digest, err)
	}
	if len(doc.Layers) > maxSignatures {
		return nil, fmt.Errorf("manifest %s has %d signatures, more than %d", m.Digest, len(doc.Layers), maxSignatures)
	}
	var all [][]byte
	for _, l := range doc.Layers {
		payload, err := r.Blob(ctx, blob.Descriptor{Digest: l.Digest, Size: l.Size}, maxSignature)
		if err != nil {
			return nil, err
		}
		chunk, err := json.Marshal(struct {
			MIMEType    string            `json:"mimeType"`
			Payload     []byte            `json:"payload"`
			Annotations map[string]string `json:"annotations"`
		}{l.MediaType, payload, l.Annotations})
		if err != nil {
			return nil, err
		}
		all = append(all, append([]byte("\x00sigstore-json\n"), chunk...))
	}
	return all, nil
}
