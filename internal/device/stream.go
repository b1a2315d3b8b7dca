// SPDX-License-Identifier: Apache-2.0

package device

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/inflate"
)

// maxDrain is how much of a body is read only to keep its connection.
const maxDrain = 64 << 10

// stream requests the bytes of flights, which one run covers, and lands each
// chunk as soon as it is verified. It returns those that did not arrive; a
// chunk that is corrupt does not keep the ones behind it from landing.
func (d *Device) stream(f *fetch, src blob.Source, flights []*flight) ([]*flight, error) {
	first := d.table.At(flights[0].chunk)
	var end int64
	for _, fl := range flights {
		c := d.table.At(fl.chunk)
		end = max(end, c.BlobOffset+c.BlobSize)
	}
	d.stats.requests.Add(1)
	body, err := src.Open(f.ctx, d.desc, first.BlobOffset, end-first.BlobOffset)
	if err != nil {
		return flights, err
	}
	defer body.Close() //nolint:errcheck // read only; a broken stream shows in Read
	w := workers.Get().(*worker)
	defer func() {
		w.reset(index.None, nil, 0)
		workers.Put(w)
	}()
	in := &yielding{d: d, f: f, r: body, at: Fill}
	defer in.end()
	w.reset(d.table.Compression(), in, first.BlobOffset)
	store := d.streamChunks
	if d.table.Spans() > 0 {
		store = d.streamSpans
	}
	failed, err := store(f, src, w, flights)
	if err == nil || errors.Is(err, blob.ErrCorrupt) {
		// The end of the last frame holds no chunk. Without it the connection could
		// not be used again, which costs the next fetch a round trip or more.
		_, _ = io.CopyN(io.Discard, body, maxDrain)
	}
	return failed, err
}

// streamChunks is what stream does with the body of its request where each chunk
// has a digest.
func (d *Device) streamChunks(f *fetch, src blob.Source, w *worker, flights []*flight) (failed []*flight, last error) {
	for i, fl := range flights {
		err := d.store(f, w, fl.chunk)
		if err == nil || errors.Is(err, cache.ErrFull) { // no other source would help
			d.land(fl, err)
			continue
		}
		err = fmt.Errorf("chunk %d: %w", fl.chunk, err)
		if !errors.Is(err, blob.ErrCorrupt) {
			return append(failed, flights[i:]...), errors.Join(last, err)
		}
		d.stats.corrupt.Add(1)
		fl.blame(src)
		failed, last = append(failed, fl), err
	}
	return failed, last
}

// store puts the next chunk of the stream in the cache.
func (d *Device) store(f *fetch, w *worker, i int) error {
	out, err := d.cache.Begin(f.ctx, i)
	if err != nil {
		return &writeError{err}
	}
	defer out.Abort()
	if err := w.chunk(d.table.At(i), out); err != nil {
		return err
	}
	if err := out.Commit(); err != nil {
		return &writeError{err}
	}
	return nil
}

// yielding lets fetches of a higher priority go first, between reads.
type yielding struct {
	d  *Device
	f  *fetch
	r  io.Reader
	at Priority // as the scheduler knows it
}

func (y *yielding) Read(p []byte) (int, error) {
	if y.d.priority(y.f) > BlockedRead {
		y.end() // it may stand back itself: nobody does so for it then
	}
	if err := y.d.sched.Yield(y.f.ctx, func() Priority { return y.d.priority(y.f) }); err != nil {
		return 0, err
	}
	y.receive(y.d.priority(y.f))
	return y.r.Read(p)
}

// receive notes that bytes come, at a priority.
func (y *yielding) receive(p Priority) {
	y.d.sched.receive(y.at, p)
	y.at = p
}

// end notes that no more bytes come.
func (y *yielding) end() { y.receive(Fill) }

// workers recycles decompressors and buffers: they are the larger part of the
// memory a fetch needs.
var workers = sync.Pool{New: func() any {
	return &worker{in: bufio.NewReaderSize(nil, 64<<10), buf: make([]byte, 64<<10), hash: sha256.New()}
}}

// worker reads chunks, in order, out of one stream of a blob.
type worker struct {
	src     io.Reader // the blob
	pos     int64     // offset in the blob of the next byte of src
	last    byte      // the one before that, if
	any     bool      // any byte has been read
	gzip    *gzip.Reader
	zstd    *zstd.Decoder
	inflate *inflate.Reader
	hash    hash.Hash
	buf     []byte

	compression index.Compression
	left        int64         // compressed bytes of the open frame that are still in src
	in          *bufio.Reader // the open frame, compressed
	start       int64         // where the open frame starts in the blob
	plain       io.Reader     // the open frame, decompressed; nil if none is open
	inner       int64         // offset in the decompressed frame of the next byte of plain
}

// compressed reads what is left of the open frame from the source.
type compressed struct{ w *worker }

func (c compressed) Read(p []byte) (int, error) {
	if c.w.left == 0 {
		return 0, io.EOF
	}
	n, err := c.w.src.Read(p[:min(int64(len(p)), c.w.left)])
	c.w.left -= int64(n)
	c.w.pos += int64(n)
	if n > 0 {
		c.w.last, c.w.any = p[n-1], true
	}
	if errors.Is(err, io.EOF) && c.w.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = &sourceError{err}
	}
	return n, err
}

// sourceError tells a stream that broke from a frame that does not decompress.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

func (w *worker) reset(c index.Compression, r io.Reader, pos int64) {
	w.src, w.pos, w.any, w.compression, w.plain, w.left = r, pos, false, c, nil, 0
}

// chunk writes the content of c to out and returns nil only if it matches c's
// digest. An error that is blob.ErrCorrupt leaves the stream usable.
func (w *worker) chunk(c index.Chunk, out io.Writer) error {
	err := w.copyChunk(c, out)
	if err == nil {
		if got := [sha256.Size]byte(w.hash.Sum(nil)); got != c.Digest {
			err = fmt.Errorf("got sha256:%x, want sha256:%x: %w", got, c.Digest, blob.ErrCorrupt)
		}
	}
	var broken *sourceError
	var write *writeError
	switch {
	case err == nil, errors.As(err, &broken), errors.As(err, &write), errors.Is(err, blob.ErrCorrupt):
		return err
	default: // the decompressor's
		w.plain = nil
		return fmt.Errorf("decompressing: %w (%w)", err, blob.ErrCorrupt)
	}
}

func (w *worker) copyChunk(c index.Chunk, out io.Writer) error {
	if w.plain == nil || w.start != c.BlobOffset || c.InnerOffset < w.inner {
		if err := w.open(c); err != nil {
			return err
		}
	}
	for w.inner < c.InnerOffset {
		if _, err := w.read(c.InnerOffset - w.inner); err != nil {
			return err
		}
	}
	w.hash.Reset()
	for left := c.Size; left > 0; {
		p, err := w.read(left)
		if err != nil {
			return err
		}
		w.hash.Write(p)
		if _, err := out.Write(p); err != nil {
			return &writeError{err}
		}
		left -= int64(len(p))
	}
	return nil
}

// writeError is an error of the cache: no other source will help.
type writeError struct{ err error }

func (e *writeError) Error() string { return "writing to the cache: " + e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// read returns the next bytes of the open frame, at least one, at most n.
func (w *worker) read(n int64) ([]byte, error) {
	got, err := io.ReadFull(w.plain, w.buf[:min(n, int64(len(w.buf)))])
	w.inner += int64(got)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		var broken *sourceError
		if !errors.As(err, &broken) {
			err = fmt.Errorf("frame at %d ends at %d: %w", w.start, w.inner, blob.ErrCorrupt)
		}
	}
	return w.buf[:got], err
}

// open goes to the frame of c and starts to decompress it.
func (w *worker) open(c index.Chunk) error {
	w.plain = nil
	if c.BlobOffset < w.pos {
		return fmt.Errorf("frame at %d lies behind %d: %w", c.BlobOffset, w.pos, blob.ErrCorrupt)
	}
	w.left = c.BlobOffset - w.pos
	if _, err := io.CopyBuffer(io.Discard, compressed{w}, w.buf); err != nil {
		return err
	}
	w.start, w.inner, w.left = c.BlobOffset, 0, c.BlobSize
	w.in.Reset(compressed{w})
	switch w.compression {
	case index.None:
		w.plain = w.in
		return nil
	case index.Gzip:
		return w.openGzip()
	case index.Zstd:
		return w.openZstd()
	default:
		return fmt.Errorf("unknown compression %d", w.compression)
	}
}

func (w *worker) openGzip() error {
	if w.gzip == nil {
		w.gzip = new(gzip.Reader)
	}
	if err := w.gzip.Reset(w.in); err != nil {
		return err
	}
	// A frame may hold several members, and a chunk run over their borders; what
	// follows the frame is cut off by w.left.
	w.plain = w.gzip
	return nil
}

func (w *worker) openZstd() error {
	if w.zstd == nil {
		z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(8<<20))
		if err != nil {
			return err
		}
		w.zstd = z
	}
	if err := w.zstd.Reset(w.in); err != nil {
		return err
	}
	w.plain = w.zstd
	return nil
}
