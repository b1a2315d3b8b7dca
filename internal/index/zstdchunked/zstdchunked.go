// SPDX-License-Identifier: Apache-2.0

// Package zstdchunked reads the index of a zstd:chunked layer: a zstd layer with a
// frame of its own for every chunk and a table of contents in a skippable frame.
//
// There are two dialects, that of containers/storage and that of
// stargz-snapshotter. They differ in the names of the annotations that tell where
// the TOC is and what its digest is; the footer in the blob is not needed. The
// digest covers the compressed TOC and is checked before anything is decompressed.
package zstdchunked

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/toc"
)

// The annotations of a layer that tell where its TOC is, by dialect.
const (
	PositionAnnotation       = "io.github.containers.zstd-chunked.manifest-position"
	StargzPositionAnnotation = "io.containers.zstd-chunked.manifest-position"
)

const (
	skippableHeader = 8        // magic and length
	maxCompressed   = 64 << 20 // TOC, held in memory until its digest matched
	maxWindow       = 32 << 20 // of the zstd decoder
	typeCRFS        = 1        // the only type of TOC there is
)

// Open reads the index of the layer desc, whose descriptor in the manifest has
// these annotations, with one range request.
//
// It returns [index.ErrNoIndex] if the layer is no zstd:chunked,
// [blob.ErrCorrupt] if the TOC does not match its digest (another source may have
// the right one), [index.ErrInvalid] or [index.ErrTooLarge] if the TOC is not
// sound, or the error of src. Besides the index itself it holds the compressed
// TOC and the decoder's window.
func Open(ctx context.Context, src blob.Source, desc blob.Descriptor, annotations map[string]string) (*index.Index, error) {
	idx, err := open(ctx, src, desc, annotations)
	if err != nil {
		return nil, fmt.Errorf("reading zstd:chunked index of %s: %w", desc.Digest, err)
	}
	return idx, nil
}

func open(ctx context.Context, src blob.Source, desc blob.Descriptor, annotations map[string]string) (*index.Index, error) {
	pos, want, err := parseAnnotations(annotations)
	if err != nil {
		return nil, err
	}
	if err := pos.check(desc.Size); err != nil {
		return nil, err
	}
	compressed, err := fetch(ctx, src, desc, pos)
	if err != nil {
		return nil, fmt.Errorf("table of contents at %d: %w", pos.offset, err)
	}
	if got := sha256.Sum256(compressed); got != want {
		return nil, fmt.Errorf("table of contents at %d: digest is %x, not %x: %w", pos.offset, got, want, blob.ErrCorrupt)
	}
	b := index.NewBuilder(pos.offset-skippableHeader, index.DefaultLimits())
	facts, err := decode(compressed, pos.uncompressed, b)
	if err != nil {
		return nil, err
	}
	idx, err := b.Finish(index.ZstdChunked, index.Zstd)
	if err != nil {
		return nil, err
	}
	idx.Landmark = facts.Prefetch
	return idx, nil
}

// position is where the TOC lies in the blob: the payload of a skippable frame.
type position struct {
	offset, compressed, uncompressed int64
}

func (p position) check(blobSize int64) error {
	if p.offset < skippableHeader || p.offset > blobSize || p.compressed > blobSize-p.offset {
		return fmt.Errorf("table of contents at %d+%d of %d bytes: %w", p.offset, p.compressed, blobSize, index.ErrInvalid)
	}
	if p.compressed > maxCompressed || p.uncompressed > toc.MaxBytes {
		return fmt.Errorf("table of contents of %d bytes, %d compressed: %w", p.uncompressed, p.compressed, index.ErrTooLarge)
	}
	return nil
}

// parseAnnotations returns the position of the TOC and its digest. The dialect of
// containers/storage comes first, as no layer has reason to carry both.
func parseAnnotations(annotations map[string]string) (position, [sha256.Size]byte, error) {
	for _, keys := range [][2]string{
		{index.AnnotationZstdChunked, PositionAnnotation},
		{index.AnnotationZstdChunkedStargz, StargzPositionAnnotation},
	} {
		checksum, ok := annotations[keys[0]]
		if !ok {
			continue
		}
		sum, err := toc.Sum(checksum)
		if err != nil {
			return position{}, sum, fmt.Errorf("annotation %s: %w", keys[0], err)
		}
		pos, err := parsePosition(annotations[keys[1]])
		if err != nil {
			return position{}, sum, fmt.Errorf("annotation %s: %w", keys[1], err)
		}
		return pos, sum, nil
	}
	return position{}, [sha256.Size]byte{}, fmt.Errorf("no annotation %s: %w", index.AnnotationZstdChunked, index.ErrNoIndex)
}

// parsePosition reads "offset:compressed length:length:type".
func parsePosition(text string) (position, error) {
	fields := strings.Split(text, ":")
	var n [4]uint64
	if len(fields) != len(n) {
		return position{}, fmt.Errorf("position %.128q: %w", text, index.ErrInvalid)
	}
	for i, f := range fields {
		var err error
		if n[i], err = strconv.ParseUint(f, 10, 63); err != nil {
			return position{}, fmt.Errorf("position %.128q: %w", text, index.ErrInvalid)
		}
	}
	if n[3] != typeCRFS {
		return position{}, fmt.Errorf("table of contents of type %d: %w", n[3], index.ErrInvalid)
	}
	return position{int64(n[0]), int64(n[1]), int64(n[2])}, nil //nolint:gosec // 63 bits
}

func fetch(ctx context.Context, src blob.Source, desc blob.Descriptor, pos position) ([]byte, error) {
	r, err := src.Open(ctx, desc, pos.offset, pos.compressed)
	if err != nil {
		return nil, err
	}
	defer r.Close() //nolint:errcheck // read only
	p := make([]byte, pos.compressed)
	if _, err := io.ReadFull(r, p); err != nil {
		return nil, err
	}
	return p, nil
}

// decode adds the entries of the TOC to b.
func decode(compressed []byte, size int64, b *index.Builder) (toc.Facts, error) {
	z, err := zstd.NewReader(bytes.NewReader(compressed),
		zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return toc.Facts{}, fmt.Errorf("decompressing: %w", err)
	}
	defer z.Close()
	plain := &counter{r: z}
	facts, err := toc.Decode(plain, b)
	switch {
	case plain.err != nil && !errors.Is(plain.err, io.EOF):
		return toc.Facts{}, fmt.Errorf("decompressing: %w: %w", index.ErrInvalid, plain.err)
	case err != nil:
		return toc.Facts{}, err
	case plain.n != size:
		return toc.Facts{}, fmt.Errorf("table of contents of %d bytes, not %d: %w", plain.n, size, index.ErrInvalid)
	}
	return facts, nil
}

// counter counts what it reads and keeps the error.
type counter struct {
	r   io.Reader
	n   int64
	err error
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.err = err
	return n, err
}
