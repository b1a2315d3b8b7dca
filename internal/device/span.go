// SPDX-License-Identifier: Apache-2.0

package device

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/inflate"
)

// Spans. The chunks of a layer that was not made to be read in parts have no
// digests: what can be verified is a span of the blob, which holds many of them.
// They are fetched together, decompressed into the cache on the way, and become
// present together when the digest of the span has matched.

// whole adds to chunks, ascending, those that share a span with one of them and are
// missing as well. The caller holds d.mu.
func (d *Device) whole(chunks []int) []int {
	if d.table.Spans() == 0 {
		return chunks
	}
	var all []int
	done := 0 // chunks before it have been looked at
	for _, i := range chunks {
		if i < done {
			continue
		}
		span, first := d.table.At(i).BlobOffset, i
		for first > done && d.table.At(first-1).BlobOffset == span {
			first--
		}
		for done = first; done < d.table.Len() && d.table.At(done).BlobOffset == span; done++ {
			if d.missing(done) {
				all = append(all, done)
			}
		}
	}
	return all
}

// A miss takes along as many of the spans behind it as there were misses close by,
// and not more than readers have wanted so far, beside an allowance.
const (
	maxNextSpans     = 8
	spansCloseBy     = 48 << 20 // of the blob
	spansAllowance   = 24 << 20
	spansNumerator   = 1
	spansDenominator = 2
)

// nextSpans returns the chunks behind a run that its request takes along.
func (d *Device) nextSpans(run []int) (behind []int) {
	last := d.table.At(run[len(run)-1])
	touched := d.stats.touched.Load()
	budget := touched + touched*spansNumerator/spansDenominator + spansAllowance - d.stats.fetched.Load()
	end := last.BlobOffset + last.BlobSize
	left := min(d.misses.near(last.BlobOffset), maxNextSpans)
	for i := run[len(run)-1] + 1; i < d.table.Len() && d.missing(i); i++ {
		c := d.table.At(i)
		if c.BlobOffset != last.BlobOffset {
			left--
		}
		cost := c.BlobOffset + c.BlobSize - end
		if left < 0 || cost > budget || !follows(last, c, end, maxGap) {
			break
		}
		behind = append(behind, i)
		budget, last, end = budget-cost, c, c.BlobOffset+c.BlobSize
	}
	return behind
}

// streamSpans is what stream does with the body of its request where there are
// spans.
func (d *Device) streamSpans(f *fetch, src blob.Source, w *worker, flights []*flight) (failed []*flight, last error) {
	for len(flights) > 0 {
		span := d.table.At(flights[0].chunk).BlobOffset
		n := slices.IndexFunc(flights, func(fl *flight) bool { return d.table.At(fl.chunk).BlobOffset != span })
		if n < 0 {
			n = len(flights)
		}
		err := d.storeSpan(f, w, flights[:n])
		switch {
		case err == nil:
		case !errors.Is(err, blob.ErrCorrupt):
			return append(failed, flights...), errors.Join(last, err)
		default:
			for _, fl := range flights[:n] {
				d.stats.corrupt.Add(1)
				fl.blame(src)
			}
			failed, last = append(failed, flights[:n]...), err
		}
		flights = flights[n:]
	}
	return failed, last
}

// storeSpan puts those chunks of the stream's next span in the cache that have
// flights.
func (d *Device) storeSpan(f *fetch, w *worker, flights []*flight) error {
	outs := make([]*cache.Writer, len(flights))
	defer func() {
		for _, out := range outs {
			if out != nil {
				out.Abort()
			}
		}
	}()
	var full error
	for i, fl := range flights {
		out, err := d.cache.Begin(f.ctx, fl.chunk)
		if errors.Is(err, cache.ErrFull) {
			full = err // the others may be smaller
			continue
		}
		if err != nil {
			return &writeError{err}
		}
		outs[i] = out
	}
	number := d.table.SpanOf(d.table.At(flights[0].chunk))
	if number < 0 {
		return fmt.Errorf("chunk %d is in no span", flights[0].chunk)
	}
	if err := w.span(d.table, number, flights, outs); err != nil {
		return fmt.Errorf("span %d: %w", number, err)
	}
	for i, out := range outs {
		if out == nil {
			d.land(flights[i], &writeError{full}) // no other source would help
			continue
		}
		outs[i] = nil
		if err := out.Commit(); err != nil {
			return &writeError{err}
		}
		d.land(flights[i], nil)
	}
	return nil
}

// span writes the chunks of flights, which lie in the span, to outs, where those
// are not nil, and returns nil only if the span matches its digest. An error that is
// blob.ErrCorrupt leaves the stream usable.
func (w *worker) span(t *index.Table, number int, flights []*flight, outs []*cache.Writer) error {
	s := t.Span(number)
	in, err := w.openSpan(t, number, s)
	if err == nil {
		err = w.copySpan(t, flights, outs)
	}
	var broken *sourceError
	var write *writeError
	if errors.As(err, &broken) || errors.As(err, &write) || in == nil {
		return err
	}
	w.plain = nil
	if _, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{in}, w.buf); err != nil {
		return err
	}
	if got := [sha256.Size]byte(w.hash.Sum(nil)); got != s.Digest {
		return fmt.Errorf("got sha256:%x, want sha256:%x: %w", got, s.Digest, blob.ErrCorrupt)
	}
	if err != nil { // these are the right bytes
		return fmt.Errorf("the index does not fit the layer: %w (%w)", err, blob.ErrCorrupt)
	}
	return nil
}

// spanBytes reads the bytes of a span, through the hash.
type spanBytes struct {
	w      *worker
	shared bool // the last byte that was read is the first one
}

func (s *spanBytes) Read(p []byte) (int, error) {
	if s.shared && len(p) > 0 {
		s.shared = false
		p[0] = s.w.last
		s.w.hash.Write(p[:1])
		return 1, nil
	}
	n, err := compressed{s.w}.Read(p)
	s.w.hash.Write(p[:n])
	return n, err
}

// openSpan goes to a span and starts to decompress it. It returns a reader of its
// bytes, nil if they cannot be reached.
func (w *worker) openSpan(t *index.Table, number int, s index.Span) (*spanBytes, error) {
	w.plain = nil
	in := &spanBytes{w: w, shared: w.any && s.BlobOffset == w.pos-1}
	if !in.shared {
		if s.BlobOffset < w.pos {
			return nil, fmt.Errorf("it lies behind %d", w.pos)
		}
		w.left = s.BlobOffset - w.pos
		if _, err := io.CopyBuffer(io.Discard, compressed{w}, w.buf); err != nil {
			return nil, err
		}
	}
	w.start, w.inner, w.left = s.BlobOffset, 0, s.BlobOffset+s.BlobSize-w.pos
	w.hash.Reset()
	switch w.compression {
	case index.None:
		w.plain = in
	case index.Gzip:
		window, err := t.Window(number, w.buf[:index.WindowSize])
		if err != nil {
			return nil, err
		}
		if w.inflate == nil {
			w.inflate = inflate.NewReader(nil)
		}
		if err := w.inflate.Resume(in, s.Bits, window); err != nil {
			return nil, err
		}
		w.plain = w.inflate
	case index.Zstd:
		w.in.Reset(in)
		return in, w.openZstd()
	default:
		return nil, fmt.Errorf("unknown compression %d", w.compression)
	}
	return in, nil
}

// copySpan writes chunks of the open span.
func (w *worker) copySpan(t *index.Table, flights []*flight, outs []*cache.Writer) error {
	for i, fl := range flights {
		if outs[i] == nil {
			continue
		}
		c := t.At(fl.chunk)
		for w.inner < c.InnerOffset {
			if _, err := w.read(c.InnerOffset - w.inner); err != nil {
				return err
			}
		}
		for left := c.Size; left > 0; {
			p, err := w.read(left)
			if err != nil {
				return err
			}
			if _, err := outs[i].Write(p); err != nil {
				return &writeError{err}
			}
			left -= int64(len(p))
		}
	}
	return nil
}
