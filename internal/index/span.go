// SPDX-License-Identifier: Apache-2.0

package index

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
)

// WindowSize is how many of the decompressed bytes before it the decompression of
// a gzip span refers to: RFC 1951, section 2.
const WindowSize = 32 << 10

// Span is a part of a blob that is verified as a whole. A layer that was not made
// to be read in parts has them: the chunks of all files that lie in a span are
// fetched, decompressed and verified together, and have no digests of their own.
type Span struct {
	// BlobOffset and BlobSize are its bytes in the blob.
	BlobOffset int64
	BlobSize   int64
	// Start is where its first byte lies in the decompressed blob.
	Start int64
	// Bits is how many bits of its first byte, the highest ones, belong to it: that
	// byte is the last one of the span before, too. 0: all of it does.
	Bits uint8
	// Window is where Index.Windows holds the WindowSize bytes that precede the
	// span in the decompressed blob; negative if it does not need them.
	Window int64
	// Digest is the sha256 of its bytes in the blob.
	Digest [sha256.Size]byte
}

// inSpan is the BlobSize of content that [Builder.FinishSpans] has yet to cut.
const inSpan int64 = -2

// AddContent says where the next piece of the regular file that was added last
// lies in the decompressed blob: c.InnerOffset is its offset there, and what c says
// of the blob is ignored. It stands for [Builder.AddChunk] in an index that is ended
// with [Builder.FinishSpans] or [Builder.FinishWhole].
func (b *Builder) AddContent(c Chunk) error {
	c.BlobOffset, c.BlobSize = 0, inSpan
	if err := b.addChunk(c); err != nil {
		return fmt.Errorf("entry %.256q: %w", b.file.name, err)
	}
	return nil
}

// FinishWhole is Finish for an index whose content was added with AddContent, if
// the blob can only be decompressed from its start.
func (b *Builder) FinishWhole(kind Kind, c Compression) (*Index, error) {
	for i := range b.chunks {
		if b.chunks[i].BlobSize == inSpan {
			b.chunks[i].BlobSize = b.blob
		}
		if b.chunks[i].Size > b.limits.ChunkBytes {
			return nil, fmt.Errorf("chunk of %d bytes: %w", b.chunks[i].Size, ErrTooLarge)
		}
	}
	return b.Finish(kind, c)
}

// FinishSpans is Finish for an index whose content was added with AddContent. The
// spans follow each other and cover the decompressed blob of plain bytes.
func (b *Builder) FinishSpans(kind Kind, c Compression, spans []Span, plain int64) (*Index, error) {
	if err := b.checkSpans(spans, plain); err != nil {
		return nil, err
	}
	cut := make([]Chunk, 0, len(b.chunks)+len(spans))
	for _, content := range b.chunks {
		if content.BlobSize != inSpan {
			return nil, fmt.Errorf("chunk at %d is in no span: %w", content.Offset, ErrInvalid)
		}
		if content.InnerOffset > plain-content.Size {
			return nil, fmt.Errorf("content at %d+%d of a decompressed blob of %d bytes: %w", content.InnerOffset, content.Size, plain, ErrInvalid)
		}
		i, found := slices.BinarySearchFunc(spans, content.InnerOffset, func(s Span, at int64) int { return cmp.Compare(s.Start, at) })
		if !found {
			i--
		}
		for at, end := content.InnerOffset, content.InnerOffset+content.Size; at < end; i++ {
			next := plain
			if i+1 < len(spans) {
				next = spans[i+1].Start
			}
			n := min(end, next) - at
			if len(cut) >= b.limits.Chunks {
				return nil, fmt.Errorf("more than %d chunks: %w", b.limits.Chunks, ErrTooLarge)
			}
			cut = append(cut, Chunk{
				Offset: content.Offset + at - content.InnerOffset, Size: n,
				BlobOffset: spans[i].BlobOffset, BlobSize: spans[i].BlobSize, InnerOffset: at - spans[i].Start,
			})
			at += n
		}
	}
	b.chunks = cut
	idx, err := b.Finish(kind, c)
	if err != nil {
		return nil, err
	}
	idx.Spans = spans
	return idx, nil
}

// checkSpans checks that spans can be read one by one, in bounded time and memory.
func (b *Builder) checkSpans(spans []Span, plain int64) error {
	if plain < 0 || len(spans) == 0 && len(b.chunks) > 0 || len(spans) > b.limits.Chunks {
		return fmt.Errorf("%d spans for %d bytes: %w", len(spans), plain, ErrInvalid)
	}
	for i, s := range spans {
		next := plain
		if i+1 < len(spans) {
			next = spans[i+1].Start
			if spans[i+1].BlobOffset <= s.BlobOffset {
				return fmt.Errorf("span %d at %d does not follow the one at %d: %w", i+1, spans[i+1].BlobOffset, s.BlobOffset, ErrInvalid)
			}
		}
		switch {
		case i == 0 && s.Start != 0, next < s.Start, next == s.Start && i+1 < len(spans), s.Bits > 7:
			return fmt.Errorf("span %d starts at %d, bit %d, and ends at %d: %w", i, s.Start, s.Bits, next, ErrInvalid)
		case s.BlobOffset < 0 || s.BlobSize <= 0 || s.BlobOffset > b.blob || s.BlobSize > b.blob-s.BlobOffset:
			return fmt.Errorf("span %d at %d+%d of a blob of %d bytes: %w", i, s.BlobOffset, s.BlobSize, b.blob, ErrInvalid)
		case s.BlobSize > b.limits.ChunkBytes || next-s.Start > b.limits.ChunkBytes:
			return fmt.Errorf("span %d of %d bytes, %d compressed: %w", i, next-s.Start, s.BlobSize, ErrTooLarge)
		}
	}
	return nil
}
