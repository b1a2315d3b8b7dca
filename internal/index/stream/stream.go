// SPDX-License-Identifier: Apache-2.0

// Package stream makes the index of a layer that carries none, by reading the
// whole layer once.
//
// While it reads it computes the digest of the blob and its diff ID, for the
// caller to compare, and hands the content of files to the caller at the very
// offsets that the device of the index has. It holds buffers of fixed size and
// the index, whatever the layer is.
//
// The chunks of such an index cannot be fetched one by one unless the layer is not
// compressed: their frame is the whole blob.
package stream

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
)

const (
	// chunkSize is how the content of files is cut.
	chunkSize  = 4 << 20
	bufferSize = 256 << 10
	// maxWindow bounds the memory of the zstd decoder.
	maxWindow = 32 << 20
)

// Result is what reading a layer yields.
type Result struct {
	Index *index.Index
	// Blob is the digest of the bytes that were read.
	Blob digest.Digest
	// DiffID is the digest of the decompressed bytes, to the very end.
	DiffID digest.Digest
}

// Read reads a layer of size bytes from r, to its end, and writes the content of
// its files to device, at offsets of the resulting index's device and in
// ascending order. What it does not write there reads as zeros.
//
// Nothing that was written may be used before the caller has compared the digests.
//
// It returns [index.ErrInvalid] or [index.ErrTooLarge] if the layer is none that a
// normal pull would extract or if it is too large, [blob.ErrCorrupt] if r does not
// have size bytes, the error of r or device, or that of ctx.
func Read(ctx context.Context, r io.Reader, size int64, device io.WriterAt) (*Result, error) {
	return read(ctx, r, size, device, true)
}

// ReadTree is Read for those who check the content themselves: the chunks of its
// index have no digests.
func ReadTree(ctx context.Context, r io.Reader, size int64, device io.WriterAt) (*Result, error) {
	return read(ctx, r, size, device, false)
}

func read(ctx context.Context, r io.Reader, size int64, device io.WriterAt, digests bool) (*Result, error) {
	s, err := newReader(ctx, r, size)
	if err != nil {
		return nil, fmt.Errorf("reading layer of %d bytes: %w", size, err)
	}
	defer s.close()
	s.device, s.digests = device, digests
	if err := s.run(); err != nil {
		return nil, fmt.Errorf("reading layer of %d bytes, at %d: %w", size, s.blob.n, s.explain(err))
	}
	idx, err := s.builder.Finish(index.Stream, s.compression)
	if err != nil {
		return nil, fmt.Errorf("reading layer of %d bytes: %w", size, err)
	}
	return &Result{
		Index:  idx,
		Blob:   digest.NewDigest(digest.SHA256, s.blob.hash),
		DiffID: digest.NewDigest(digest.SHA256, s.diff.hash),
	}, nil
}

// reader is the state of one Read.
type reader struct {
	size        int64
	blob        *meter        // compressed
	diff        *meter        // decompressed
	plain       *position     // decompressed, as the tar reader sees it
	compressed  *bufio.Reader // what the decompressor reads
	compression index.Compression
	close       func()
	builder     *index.Builder
	device      io.WriterAt
	digests     bool // of chunks are wanted
	buf         []byte
}

// meter hashes and counts what is read through it.
type meter struct {
	ctx  context.Context //nolint:containedctx // of one Read
	r    io.Reader
	hash hash.Hash
	n    int64
	err  error
}

func (m *meter) Read(p []byte) (int, error) {
	if err := m.ctx.Err(); err != nil {
		m.err = err
		return 0, err
	}
	n, err := m.r.Read(p)
	m.hash.Write(p[:n])
	m.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		m.err = err
	}
	return n, err
}

// position counts what a reader that takes no more than it needs has taken.
type position struct {
	r *bufio.Reader
	n int64
}

func (p *position) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.n += int64(n)
	return n, err
}

func newReader(ctx context.Context, r io.Reader, size int64) (*reader, error) {
	if size < 0 {
		return nil, fmt.Errorf("negative size: %w", index.ErrInvalid)
	}
	s := &reader{
		size:    size,
		blob:    &meter{ctx: ctx, r: io.LimitReader(r, size+1), hash: sha256.New()},
		builder: index.NewBuilder(size, index.DefaultLimits()),
		buf:     make([]byte, bufferSize),
		close:   func() {},
	}
	s.compressed = bufio.NewReaderSize(s.blob, bufferSize)
	plain, err := s.decompress()
	if err != nil {
		return nil, s.explain(err)
	}
	s.diff = &meter{ctx: ctx, r: plain, hash: sha256.New()}
	s.plain = &position{r: bufio.NewReaderSize(s.diff, bufferSize)}
	return s, nil
}

// decompress detects the compression as containers/storage does, by magic number.
func (s *reader) decompress() (io.Reader, error) {
	head, err := s.compressed.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch magic := string(head); {
	case strings.HasPrefix(magic, "\x1f\x8b\x08"):
		s.compression = index.Gzip
		return gzip.NewReader(s.compressed)
	case strings.HasPrefix(magic, "\x28\xb5\x2f\xfd"):
		s.compression = index.Zstd
		z, err := zstd.NewReader(s.compressed,
			zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		s.close = z.Close
		return z, nil
	case strings.HasPrefix(magic, "BZh"), strings.HasPrefix(magic, "\xfd7zXZ\x00"):
		return nil, fmt.Errorf("compression %q is not supported: %w", magic, index.ErrInvalid)
	}
	s.compression = index.None
	return s.compressed, nil
}

// explain returns the error of the source or of ctx if there is one; any other is
// the layer's fault.
func (s *reader) explain(err error) error {
	var write *writeError
	switch {
	case s.blob.err != nil:
		return s.blob.err
	case errors.As(err, &write), errors.Is(err, index.ErrInvalid), errors.Is(err, index.ErrTooLarge), errors.Is(err, blob.ErrCorrupt):
		return err
	}
	return fmt.Errorf("%w: %w", index.ErrInvalid, err)
}

// writeError is an error of the device.
type writeError struct{ err error }

func (e *writeError) Error() string { return "writing content: " + e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// run reads the tar, and what follows it: both digests cover that as well.
func (s *reader) run() error {
	tr := tar.NewReader(s.plain)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // extraction ignores it
		}
		if err := s.entry(tr, h); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, s.plain); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, s.compressed); err != nil {
		return err
	}
	if s.blob.n != s.size {
		return fmt.Errorf("blob of another size: %w", blob.ErrCorrupt)
	}
	return nil
}
