// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Hide takes the digests out of the records of a blob: runtimes do not find them
// any more when they look for a layer to reuse, while images that refer to them
// by their ids stay whole. It cannot be undone, but by withdrawing the records.
func (s *Store) Hide(ctx context.Context, blob digest.Digest) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	layers, err := s.Layers()
	if err != nil {
		return err
	}
	changed := false
	for i := range layers {
		if l := &layers[i]; l.BlobDigest == blob && !l.Hidden {
			l.Hidden, changed = true, true
		}
	}
	if !changed {
		return nil
	}
	return s.writeLayers(layers)
}

// plainLayer is a Layer without its methods.
type plainLayer Layer

// hiddenLayer is what is written of a layer that is hidden. A record without any
// digest would make listing images fail (go.podman.io/image, storage, getSize), so
// it gets one that no image names. What it was is in the metadata, a field that
// containers/storage leaves to those who make layers.
type hiddenLayer struct {
	plainLayer
	BlobDigest digest.Digest `json:"compressed-diff-digest,omitempty"`
	DiffID     digest.Digest `json:"diff-digest,omitempty"`
	Metadata   string        `json:"metadata,omitempty"`
}

// hiddenMetadata is the metadata of a hidden layer.
type hiddenMetadata struct {
	BlobDigest digest.Digest `json:"holdfast-hidden-blob"`
	DiffID     digest.Digest `json:"holdfast-hidden-diff-id"`
}

// MarshalJSON writes the layer as containers/storage does.
func (l Layer) MarshalJSON() ([]byte, error) {
	if !l.Hidden {
		return json.Marshal(plainLayer(l))
	}
	metadata, err := json.Marshal(hiddenMetadata{l.BlobDigest, l.DiffID})
	if err != nil {
		return nil, err
	}
	return json.Marshal(hiddenLayer{
		plainLayer: plainLayer(l), DiffID: digest.FromString("hidden layer " + l.ID), Metadata: string(metadata),
	})
}

// UnmarshalJSON reads a layer.
func (l *Layer) UnmarshalJSON(data []byte) error {
	var raw hiddenLayer
	if err := json.Unmarshal(data, &raw); err != nil {
		return fmt.Errorf("decoding record: %w", err)
	}
	*l = Layer(raw.plainLayer)
	l.BlobDigest, l.DiffID = raw.BlobDigest, raw.DiffID
	var m hiddenMetadata
	if json.Unmarshal([]byte(raw.Metadata), &m) == nil && m.BlobDigest != "" {
		l.Hidden, l.BlobDigest, l.DiffID = true, m.BlobDigest, m.DiffID
	}
	return nil
}
