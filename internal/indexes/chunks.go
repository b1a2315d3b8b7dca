// SPDX-License-Identifier: Apache-2.0

package indexes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/chunklist"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexstore"
)

// Artifact returns the places for an artifact, by its manifest: see [Finder.Image].
func (f *Finder) Artifact(m blob.Manifest, readers ...indexstore.Reader) *Image {
	return f.Image(&image.Image{Manifest: v1.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Body))}}, readers...)
}

// Chunks looks for the chunk list of one of the artifact's blobs that is worth at
// least that much, and tells what it is worth. It wraps [index.ErrNoIndex] if there is
// none; what is wrong with one is logged, and does not keep it from others.
func (i *Image) Chunks(ctx context.Context, desc blob.Descriptor, least index.Trust) (*chunklist.List, index.Trust, error) {
	for _, place := range i.Places() {
		if place.Trust < least {
			continue
		}
		var doc bytes.Buffer
		err := place.Fetch(ctx, desc.Digest, indexstore.Chunks, chunklist.MaxBytes, &doc)
		var list *chunklist.List
		if err == nil {
			list, err = chunklist.Decode(doc.Bytes(), desc.Digest, desc.Size)
		}
		switch {
		case err == nil:
			return list, place.Trust, nil
		case ctx.Err() != nil:
			return nil, 0, context.Cause(ctx)
		case errors.Is(err, fs.ErrNotExist):
		default:
			i.f.Logger.Warn("chunk list is of no use", "blob", desc.Digest.String(), "from", place.String(), "err", err)
		}
	}
	return nil, 0, fmt.Errorf("blob %s: %w", desc.Digest, index.ErrNoIndex)
}

// KeepChunks keeps a chunk list that was made here, of all of a blob with its digest.
func (f *Finder) KeepChunks(ctx context.Context, l *chunklist.List) error {
	docs, err := chunkDocuments(l)
	if err == nil {
		err = f.own.Publish(ctx, indexstore.Publication{Layers: []indexstore.LayerDocuments{docs}})
	}
	if err == nil && f.Limit > 0 {
		err = f.own.Trim(f.Limit)
	}
	if err != nil {
		return fmt.Errorf("keeping chunk list of %s: %w", l.Blob, err)
	}
	return nil
}

func chunkDocuments(l *chunklist.List) (indexstore.LayerDocuments, error) {
	var doc bytes.Buffer
	err := l.Encode(&doc)
	return indexstore.LayerDocuments{Layer: indexstore.Subject{Digest: l.Blob, Size: l.Size}, Chunks: bytes.NewReader(doc.Bytes())}, err
}

// PublishChunks publishes chunk lists that were made here to a place.
func (i *Image) PublishChunks(ctx context.Context, to indexstore.Place, lists []*chunklist.List) error {
	p := indexstore.Publication{Image: i.subject}
	for _, l := range lists {
		docs, err := chunkDocuments(l)
		if err != nil {
			return fmt.Errorf("publishing chunk lists: %w", err)
		}
		p.Layers = append(p.Layers, docs)
	}
	return to.Publish(ctx, p)
}
