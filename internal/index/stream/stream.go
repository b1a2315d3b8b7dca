// SPDX-License-Identifier: Apache-2.0

// Package stream makes the index of a layer that carries none, by reading the
// whole layer once.
//
// While it reads it computes the digest of the blob and its diff ID, for the
// caller to compare, and hands the content of files to the caller at the very
// offsets that the device of the index has. It holds buffers of fixed size and
// the index, whatever the layer is. Fetching, decompressing, and looking at what
// comes out of that go on side by side.
//
// [Build] also finds the places where the blob can be read from later (spans.go,
// frames.go), for an index whose content can be fetched in parts, and for the zTOC
// that tells others. The chunks of other indexes cannot be fetched one by one
// unless the layer is not compressed: their frame is the whole blob.
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

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/soci"
	"github.com/holdfast/holdfast/internal/inflate"
)

const (
	// chunkSize is how the content of files is cut.
	chunkSize  = 4 << 20
	bufferSize = 256 << 10
	// maxWindow bounds the memory of the zstd decoder.
	maxWindow = 32 << 20
	// zstdSpan is the least that the frames of a span decompress to.
	zstdSpan = 1 << 20
)

// Result is what reading a layer yields.
type Result struct {
	Index *index.Index
	// Blob is the digest of the bytes that were read.
	Blob digest.Digest
	// DiffID is the digest of the decompressed bytes, to the very end, and Size
	// their number.
	DiffID digest.Digest
	Size   int64
	// Files are the digests of the regular files with content, in order, if Build
	// has read them.
	Files [][sha256.Size]byte

	entries *soci.Writer // of Build
	spans   []index.Span
	blob    int64
}

// Read reads a layer of size bytes from r, to its end, and writes the content of
// its files to device, at offsets of the resulting index's device and in
// ascending order. What it does not write there reads as zeros.
//
// Nothing that was written may be used before the caller has compared the digests.
//
// It returns [index.ErrInvalid] or [index.ErrTooLarge] if the layer is none that a
// normal pull would extract or if it is too large, [blob.ErrCorrupt] if r does not
// have size bytes, the error of r or device, or that of ctx. When it returns it
// does not read r any more.
func Read(ctx context.Context, r io.Reader, size int64, device io.WriterAt) (*Result, error) {
	return read(ctx, r, size, &reader{device: device, digests: true})
}

// ReadTree is Read for those who check the content themselves: the chunks of its
// index have no digests. If points is not nil it is told each place where the
// decompression could begin: see [inflate.Reader.Points], and where frames of zstd
// begin.
func ReadTree(ctx context.Context, r io.Reader, size int64, device io.WriterAt, points func(inflate.Point, []byte) error) (*Result, error) {
	return read(ctx, r, size, &reader{device: device, points: points})
}

// Build is Read for an index that allows to read the blob in parts, as far as its
// compression does. What its windows refer to is written to windows, from which
// the index reads it again.
func Build(ctx context.Context, r io.Reader, size int64, device io.WriterAt, windows Windows) (*Result, error) {
	return read(ctx, r, size, &reader{device: device, digests: true, windows: windows, entries: soci.NewWriter()})
}

// Unpack is ReadTree for those who make files of the content: begin is called before
// the content of each file that has any, which goes to device at these offsets. The
// decompressed layer, to its very end, is also written to plain.
func Unpack(ctx context.Context, r io.Reader, size int64, device io.WriterAt, begin func(offset, size int64) error, plain io.Writer) (*Result, error) {
	return read(ctx, r, size, &reader{device: device, begin: begin, copy: plain})
}

// Windows is a place for what spans refer to: a new file.
type Windows interface {
	io.Writer
	io.ReaderAt
}

// Check compares the digests with those that a layer is said to have. A difference
// is [blob.ErrCorrupt].
func (r *Result) Check(blobDigest, diffID digest.Digest) error {
	if r.Blob != blobDigest {
		return fmt.Errorf("blob is %s, want %s: %w", r.Blob, blobDigest, blob.ErrCorrupt)
	}
	if r.DiffID != diffID {
		return fmt.Errorf("diff ID is %s, the image states %s: %w", r.DiffID, diffID, blob.ErrCorrupt)
	}
	return nil
}

// Spans is the number of places where reading the blob can begin: 0 if there is no
// zTOC.
func (r *Result) Spans() int { return len(r.spans) }

// WriteZTOC writes the zTOC of a layer that was read by Build, once. It returns
// [soci.ErrNotExpressible] if there is none.
func (r *Result) WriteZTOC(w io.Writer, tool string) error {
	switch {
	case r.entries == nil:
		return soci.ErrNotExpressible
	case len(r.spans) == 0 && r.Index.Compression == index.Zstd:
		return fmt.Errorf("its zstd frames are too large to be read one by one: %w", soci.ErrNotExpressible)
	case len(r.spans) == 0:
		return fmt.Errorf("it is empty: %w", soci.ErrNotExpressible)
	}
	return r.entries.WriteTo(w, soci.Layer{
		Tool: tool, Compression: r.Index.Compression, BlobSize: r.blob, PlainSize: r.Size,
		Spans: r.spans, Windows: r.Index.Windows,
	})
}

func read(ctx context.Context, r io.Reader, size int64, s *reader) (*Result, error) {
	if size < 0 {
		return nil, fmt.Errorf("reading layer of %d bytes: negative size: %w", size, index.ErrInvalid)
	}
	s.blob = &meter{ctx: ctx, r: io.LimitReader(r, size+1), hash: sha256.New()}
	s.size, s.builder, s.buf = size, index.NewBuilder(size, index.DefaultLimits()), make([]byte, bufferSize)
	fetching := newAhead(s.blob)
	s.compressed = bufio.NewReaderSize(fetching, bufferSize)
	idx, err := s.read()
	fetching.stop() // from here on nobody else uses s.blob
	if err != nil {
		return nil, fmt.Errorf("reading layer of %d bytes: %w", size, s.explain(err))
	}
	res := &Result{
		Index: idx, Size: s.diff.n, Files: s.files,
		Blob:    digest.NewDigest(digest.SHA256, s.blob.hash),
		entries: s.entries, spans: s.spans(), blob: size,
	}
	if res.DiffID = res.Blob; s.diff.hash != nil {
		res.DiffID = digest.NewDigest(digest.SHA256, s.diff.hash)
	}
	return res, nil
}

// reader is the state of one Read. The blob goes through its readers in this order.
type reader struct {
	size        int64
	blob        *meter        // compressed
	compressed  *bufio.Reader // what the decompressor reads
	compression index.Compression
	gzip        *gzipReader // one of these decompresses,
	zstd        *zstdReader
	none        *plainSpans // or this one looks on
	diff        *meter      // decompressed
	plain       *position   // decompressed, as the tar reader sees it

	builder *index.Builder
	device  io.WriterAt
	digests bool                              // of chunks are wanted
	points  func(inflate.Point, []byte) error // see ReadTree
	windows Windows                           // see Build
	begin   func(offset, size int64) error    // see Unpack
	copy    io.Writer                         // see Unpack
	entries *soci.Writer
	files   [][sha256.Size]byte // digests, with entries
	last    [sha256.Size]byte   // digest of the latest chunk
	buf     []byte
}

// meter hashes, if hash is not nil, and counts what is read through it.
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
	if m.hash != nil {
		m.hash.Write(p[:n])
	}
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

// read reads the blob and makes the index.
func (s *reader) read() (*index.Index, error) {
	plain, err := s.decompress()
	if err != nil {
		return nil, err
	}
	decompressing := newAhead(plain)
	defer func() {
		decompressing.stop()
		if s.zstd != nil {
			s.zstd.close()
		}
	}()
	s.diff = &meter{ctx: s.blob.ctx, r: decompressing}
	if s.copy != nil {
		s.diff.r = io.TeeReader(decompressing, s.copy)
	}
	if s.compression != index.None { // otherwise it is the same as the blob's
		s.diff.hash = sha256.New()
	}
	s.plain = &position{r: bufio.NewReaderSize(s.diff, bufferSize)}
	if err := s.run(); err != nil {
		return nil, fmt.Errorf("at %d of the decompressed layer: %w", s.plain.n, err)
	}
	return s.finish()
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
		switch {
		case s.windows != nil:
			s.gzip = newGzipReader(s.compressed, soci.SpanSize, s.windows)
			s.digests = false // its chunks lie in spans
		default:
			s.gzip = newGzipReader(s.compressed, 0, nil)
			if s.points != nil {
				s.gzip.z.Points(0, s.points)
			}
		}
		return s.gzip, nil
	case strings.HasPrefix(magic, "\x28\xb5\x2f\xfd"):
		s.compression = index.Zstd
		if s.zstd, err = newZstdReader(s.compressed, zstdSpan); err != nil {
			return nil, err
		}
		s.zstd.points = s.points
		return s.zstd, nil
	case strings.HasPrefix(magic, "BZh"), strings.HasPrefix(magic, "\xfd7zXZ\x00"):
		return nil, fmt.Errorf("compression %q is not supported: %w", magic, index.ErrInvalid)
	}
	s.compression = index.None
	if s.entries == nil {
		return s.compressed, nil
	}
	s.none = &plainSpans{hash: sha256.New(), size: soci.SpanSize}
	return io.TeeReader(s.compressed, s.none), nil
}

// spans are those that were found, nil if nobody wanted them.
func (s *reader) spans() []index.Span {
	switch {
	case s.entries == nil:
		return nil
	case s.gzip != nil:
		return s.gzip.spans
	case s.zstd != nil:
		return s.zstd.spans
	default:
		s.none.end()
		return s.none.spans
	}
}

// finish makes the index. Chunks of a compressed blob lie in its spans, unless those
// are too large to be fetched as one: a zstd blob mostly is a single frame.
func (s *reader) finish() (*index.Index, error) {
	spans := s.spans()
	if s.compression != index.None && len(spans) > 0 {
		idx, err := s.builder.FinishSpans(index.Stream, s.compression, spans, s.diff.n)
		if err == nil {
			idx.Windows = s.windows
		}
		if s.zstd == nil || !errors.Is(err, index.ErrTooLarge) {
			return idx, err
		}
		s.zstd.spans = nil // of no use to anybody
	}
	return s.builder.FinishWhole(index.Stream, s.compression)
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
