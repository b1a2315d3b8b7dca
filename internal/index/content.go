// SPDX-License-Identifier: Apache-2.0

package index

import (
	"fmt"
	"math"
	"slices"
)

// ToNext as the BlobSize of a chunk means: up to the next larger BlobOffset of
// the index, or to the end of the blob. [Builder.Finish] puts the size in.
const ToNext int64 = -1

// openFile is the regular file whose chunks are being added.
type openFile struct {
	name    string
	offset  int64 // in the device
	size    int64
	covered int64 // bytes from its start that chunks account for
}

func (f openFile) checkCovered() error {
	if f.covered != f.size {
		return fmt.Errorf("entry %.256q: chunks cover %d of %d bytes: %w", f.name, f.covered, f.size, ErrInvalid)
	}
	return nil
}

// place gives a regular file its place in the device.
func (b *Builder) place(n *node, name string) error {
	if n.Size < 0 || n.Size > b.limits.FileBytes-b.bytes {
		return fmt.Errorf("file of %d bytes after %d of other files: %w", n.Size, b.bytes, ErrTooLarge)
	}
	b.bytes += n.Size
	if n.Size == 0 {
		return nil
	}
	n.Offset = b.device
	b.device += (n.Size + BlockSize - 1) / BlockSize * BlockSize
	b.file = openFile{name: name, offset: n.Offset, size: n.Size}
	return nil
}

// Content returns where in the device the content of the entry added last lies,
// and its size: 0 if it has no content, whatever its tar entry holds (a
// whiteout).
func (b *Builder) Content() (offset, size int64) {
	return b.file.offset, b.file.size
}

// AddChunk adds the next chunk of the regular file that was added last. Its
// Offset is relative to the file. A chunk with BlobSize 0 is a hole and reads
// as zeros; for [ToNext] see there.
func (b *Builder) AddChunk(c Chunk) error {
	if c.BlobSize == inSpan {
		return fmt.Errorf("entry %.256q: chunk of %d bytes in the blob: %w", b.file.name, c.BlobSize, ErrInvalid)
	}
	if err := b.addChunk(c); err != nil {
		return fmt.Errorf("entry %.256q: %w", b.file.name, err)
	}
	return nil
}

func (b *Builder) addChunk(c Chunk) error {
	f := &b.file
	if c.Offset != f.covered || c.Size <= 0 || c.Size > f.size-f.covered {
		return fmt.Errorf("chunk %d+%d does not follow %d in a file of %d bytes: %w", c.Offset, c.Size, f.covered, f.size, ErrInvalid)
	}
	f.covered += c.Size
	if c.BlobSize == 0 {
		return nil // a hole
	}
	switch {
	case c.BlobSize == inSpan:
	case c.BlobSize == ToNext:
		if c.BlobOffset < 0 || c.BlobOffset >= b.blob {
			return fmt.Errorf("chunk at %d of a blob of %d bytes: %w", c.BlobOffset, b.blob, ErrInvalid)
		}
	case c.BlobOffset < 0 || c.BlobSize < 0 || c.BlobOffset > b.blob || c.BlobSize > b.blob-c.BlobOffset:
		return fmt.Errorf("chunk at %d+%d of a blob of %d bytes: %w", c.BlobOffset, c.BlobSize, b.blob, ErrInvalid)
	}
	if c.InnerOffset < 0 || c.InnerOffset > math.MaxInt64-c.Size {
		return fmt.Errorf("chunk at %d inside its frame: %w", c.InnerOffset, ErrInvalid)
	}
	if c.Size > b.limits.ChunkBytes && c.BlobSize != inSpan { // that is cut later
		return fmt.Errorf("chunk of %d bytes: %w", c.Size, ErrTooLarge)
	}
	if len(b.chunks) >= b.limits.Chunks {
		return fmt.Errorf("more than %d chunks: %w", b.limits.Chunks, ErrTooLarge)
	}
	c.Offset += f.offset
	b.chunks = append(b.chunks, c)
	return nil
}

// resolveSizes gives chunks with ToNext their size.
func (b *Builder) resolveSizes() error {
	bounds := make([]int64, 0, len(b.chunks)+1)
	for i := range b.chunks {
		if i == 0 || b.chunks[i].BlobOffset != b.chunks[i-1].BlobOffset {
			bounds = append(bounds, b.chunks[i].BlobOffset)
		}
	}
	bounds = append(bounds, b.blob)
	slices.Sort(bounds)
	for i := range b.chunks {
		c := &b.chunks[i]
		if c.BlobSize != ToNext {
			continue
		}
		at, _ := slices.BinarySearch(bounds, c.BlobOffset+1)
		if at == len(bounds) { // excluded by addChunk: offsets lie before the end of the blob
			return fmt.Errorf("chunk at %d of a blob of %d bytes: %w", c.BlobOffset, b.blob, ErrInvalid)
		}
		c.BlobSize = bounds[at] - c.BlobOffset
	}
	return nil
}
