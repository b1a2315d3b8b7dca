// SPDX-License-Identifier: Apache-2.0

package stream

import (
	"crypto/sha256"
	"hash"
	"io"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/inflate"
)

// gzipReader decompresses a gzip blob and finds the spans that it can be read in
// later: their places, their windows and the digests of their bytes.
type gzipReader struct {
	z       *inflate.Reader
	src     io.Reader
	pending []byte // what z has been given and the digest of no span has taken in
	base    int64  // offset in the blob of pending
	hash    hash.Hash
	spans   []index.Span
	windows io.Writer
	written int64 // bytes of windows
}

// newGzipReader returns a reader of the blob that src reads. Without a place for
// windows it looks for no spans.
func newGzipReader(src io.Reader, spacing int64, windows io.Writer) *gzipReader {
	g := &gzipReader{src: src, hash: sha256.New(), windows: windows}
	if windows == nil {
		g.z = inflate.NewReader(src)
		return g
	}
	g.z = inflate.NewReader(compressed{g})
	g.z.Points(spacing, g.point)
	return g
}

func (g *gzipReader) Read(p []byte) (int, error) {
	n, err := g.z.Read(p)
	if err == io.EOF { //nolint:errorlint // from a direct Read
		g.finish()
	}
	return n, err
}

// compressed is what a gzipReader's decompressor reads.
type compressed struct{ g *gzipReader }

func (c compressed) Read(p []byte) (int, error) {
	g := c.g
	// What has been decompressed lies before any further point, but for a last
	// byte that two spans may share.
	g.take(g.z.InputOffset() - 1)
	n, err := g.src.Read(p)
	g.pending = append(g.pending, p[:n]...)
	return n, err
}

// take takes the pending bytes before an offset into the digest of the span.
func (g *gzipReader) take(end int64) {
	n := end - g.base
	if n <= 0 {
		return
	}
	if len(g.spans) > 0 { // otherwise it is the header, which lies in no span
		g.hash.Write(g.pending[:n])
	}
	g.pending = append(g.pending[:0], g.pending[n:]...)
	g.base = end
}

// point ends a span and begins the next one.
func (g *gzipReader) point(p inflate.Point, window []byte) error {
	start := p.In
	if p.Bits > 0 {
		start--
	}
	g.take(start)
	if len(g.spans) > 0 {
		if p.Bits > 0 { // the byte that they share
			g.hash.Write(g.pending[:1])
		}
		g.end(p.In)
	}
	s := index.Span{BlobOffset: start, Start: p.Out, Bits: p.Bits, Window: -1}
	if p.Out > 0 {
		s.Window = g.written
		n, err := g.windows.Write(window)
		g.written += int64(n)
		if err != nil {
			return &writeError{err}
		}
	}
	g.spans = append(g.spans, s)
	return nil
}

// end gives the last span its digest.
func (g *gzipReader) end(at int64) {
	s := &g.spans[len(g.spans)-1]
	s.BlobSize = at - s.BlobOffset
	g.hash.Sum(s.Digest[:0])
	g.hash.Reset()
}

func (g *gzipReader) finish() {
	if g.windows == nil || len(g.spans) == 0 {
		return
	}
	end := g.base + int64(len(g.pending))
	g.take(end)
	g.end(end)
	g.windows = nil // once
}

// plainSpans takes the digests of the spans of a blob that is not compressed.
type plainSpans struct {
	hash  hash.Hash
	size  int64 // of a span
	n     int64 // in this one
	spans []index.Span
}

func (s *plainSpans) Write(p []byte) (int, error) {
	all := len(p)
	for len(p) > 0 {
		n := min(int64(len(p)), s.size-s.n)
		s.hash.Write(p[:n])
		p = p[n:]
		if s.n += n; s.n == s.size {
			s.end()
		}
	}
	return all, nil
}

func (s *plainSpans) end() {
	if s.n == 0 {
		return
	}
	at := int64(len(s.spans)) * s.size
	span := index.Span{BlobOffset: at, BlobSize: s.n, Start: at, Window: -1}
	s.hash.Sum(span.Digest[:0])
	s.hash.Reset()
	s.spans, s.n = append(s.spans, span), 0
}
