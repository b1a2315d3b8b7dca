// SPDX-License-Identifier: Apache-2.0

// Package blobtest holds what tests of blob sources share: the conformance
// suite that every [blob.Source] passes ([Run]), a source that keeps its blobs
// in memory ([Memory]) and a decorator that misbehaves on request ([Inject]).
//
// It is for tests only and imports testing; production code must not import it.
package blobtest

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
)

// Memory is a [blob.Source] over blobs held in memory. It must not be changed
// while it is read from.
type Memory map[digest.Digest][]byte

var _ blob.Source = Memory(nil)

// NewMemory returns a Memory that holds the given blobs under their SHA-256 digests.
func NewMemory(blobs ...[]byte) Memory {
	m := make(Memory, len(blobs))
	for _, b := range blobs {
		m.Add(b)
	}
	return m
}

// Add stores a blob and returns the descriptor to read it with.
func (m Memory) Add(b []byte) blob.Descriptor {
	d := digest.FromBytes(b)
	m[d] = b
	return blob.Descriptor{Digest: d, Size: int64(len(b))}
}

// Open reads a range of a blob, as [blob.Source] tells.
func (m Memory) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if err := desc.CheckRange(offset, length); err != nil {
		return nil, err
	}
	if length == 0 {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	b, ok := m[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("opening blob %s: %w", desc.Digest, blob.ErrNotFound)
	}
	if offset+length > int64(len(b)) {
		return nil, fmt.Errorf("opening blob %s: it has %d bytes, not %d", desc.Digest, len(b), desc.Size)
	}
	return &memoryReader{ctx: ctx, r: bytes.NewReader(b[offset : offset+length])}, nil
}

func (m Memory) String() string { return "memory" }

// memoryReader ends with its context, as the contract asks.
type memoryReader struct {
	ctx context.Context
	r   *bytes.Reader
}

func (r *memoryReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

func (r *memoryReader) Close() error { return nil }
