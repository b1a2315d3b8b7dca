// SPDX-License-Identifier: Apache-2.0

package device

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"math"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
)

// Filling takes in the whole content of a device and compares it with the chunk
// table. What matches and is not in the cache is stored, as long as there is room
// without taking anything from readers. It is used by one goroutine.
//
// The content comes through WriteAt, in ascending order; what is not written is
// zeros. Readers who want the chunk that is just coming wait for it.
type Filling struct {
	d     *Device
	fetch *fetch // of all its flights
	pos   int64  // how much of the device has come
	next  int    // the chunk that holds pos, or the next one
	hash  hash.Hash
	zeros []byte

	out      *cache.Writer // nil: the chunk is only compared
	flight   *flight       // of the chunk that out takes in
	mismatch *Mismatch
	closed   bool

	spans *spanCheck // nil if each chunk has a digest
	span  int        // that the last chunk lay in, -1 before the first
	kept  []kept     // chunks of that span
}

// Mismatch is the first place where content differs from the chunk table. Only
// the digest of the blob tells which of the two is wrong.
type Mismatch struct {
	Span      bool  // it is in a span, and the next two are its number and its offset in the blob
	Chunk     int   // -1: between chunks, where there are only zeros
	Offset    int64 // in the device
	Got, Want [sha256.Size]byte
}

func (m *Mismatch) Error() string {
	if m.Span {
		return fmt.Sprintf("span %d at %d of the blob: got sha256:%x, want sha256:%x", m.Chunk, m.Offset, m.Got, m.Want)
	}
	if m.Chunk < 0 {
		return fmt.Sprintf("content at %d of the device, where no chunk is", m.Offset)
	}
	return fmt.Sprintf("chunk %d at %d of the device: got sha256:%x, want sha256:%x", m.Chunk, m.Offset, m.Got, m.Want)
}

// Filling begins to take in the device's content. The caller ends it with Finish
// or Close, for which the device's own Close waits.
func (d *Device) Filling() (*Filling, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	d.active.Add(1)
	f := &Filling{
		d: d, fetch: &fetch{ctx: d.ctx, idle: Fill, keep: true},
		hash: sha256.New(), zeros: make([]byte, 256<<10), span: -1,
	}
	if d.table.Spans() > 0 {
		f.spans = newSpanCheck(d.table)
	}
	return f, nil
}

// Priority is that of the content which comes next: a reader may wait for it. It
// may be called concurrently with the other methods.
func (f *Filling) Priority() Priority { return f.d.priority(f.fetch) }

// WriteAt takes in what follows, zeros up to off included. It fails if off lies
// before what has come already, or if the device is closed; a mismatch is no error.
func (f *Filling) WriteAt(p []byte, off int64) (int, error) {
	if f.d.ctx.Err() != nil {
		return 0, context.Cause(f.d.ctx)
	}
	if off < f.pos {
		return 0, fmt.Errorf("filling a device at %d after %d", off, f.pos)
	}
	f.skip(off)
	f.take(p)
	f.pos = off + int64(len(p)) // also after a mismatch
	return len(p), nil
}

// Finish takes in zeros up to the end of the device, and returns the first
// mismatch, or nil if all has come and is what the table says.
func (f *Filling) Finish() *Mismatch {
	f.skip(f.d.Size())
	f.settle()
	if f.spans != nil && f.mismatch == nil {
		f.mismatch = f.spans.wrong.Load() // where no chunk is
	}
	f.Close()
	return f.mismatch
}

// Close ends the filling, wherever it is. After Finish it does nothing.
func (f *Filling) Close() {
	if f.closed {
		return
	}
	f.closed = true
	f.abandon()
	f.span = -1 // nothing is known of what is kept
	f.settle()
	f.d.active.Done()
}

// skip takes in zeros up to an offset.
func (f *Filling) skip(to int64) {
	for f.pos < to && f.mismatch == nil {
		if gap := min(f.gapEnd(), to); gap > f.pos {
			f.pos = gap
			continue
		}
		f.take(f.zeros[:min(int64(len(f.zeros)), to-f.pos)])
	}
}

// gapEnd is where the next chunk starts.
func (f *Filling) gapEnd() int64 {
	if f.next < f.d.table.Len() {
		return f.d.table.At(f.next).Offset
	}
	return math.MaxInt64
}

// take takes in bytes at pos.
func (f *Filling) take(p []byte) {
	for len(p) > 0 && f.mismatch == nil {
		var n int64
		if gap := f.gapEnd() - f.pos; gap > 0 {
			n = min(gap, int64(len(p)), int64(len(f.zeros)))
			if !bytes.Equal(p[:n], f.zeros[:n]) {
				f.mismatch = &Mismatch{Chunk: -1, Offset: f.pos}
			}
			f.pos += n
		} else {
			n = f.takeChunk(p)
		}
		p = p[n:]
	}
}

// takeChunk takes in bytes of the next chunk, and returns how many.
func (f *Filling) takeChunk(p []byte) int64 {
	c := f.d.table.At(f.next)
	if f.pos == c.Offset {
		f.hash.Reset()
		if f.spans != nil {
			f.enter(c)
		}
		f.claim()
	}
	n := min(c.End()-f.pos, int64(len(p)))
	if f.spans == nil {
		f.hash.Write(p[:n])
	}
	if f.out != nil {
		if _, err := f.out.Write(p[:n]); err != nil {
			f.abandon()
		}
	}
	f.pos += n
	if f.pos == c.End() {
		f.finishChunk(c)
	}
	return n
}

// claim makes this the fetch of the next chunk, if it is missing, nobody fetches
// it, and there is room.
func (f *Filling) claim() {
	d := f.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.flights[f.next] != nil {
		return
	}
	if f.out = d.cache.TryBegin(f.next); f.out != nil {
		f.flight = &flight{chunk: f.next, fetch: f.fetch, done: make(chan struct{})}
		d.flights[f.next] = f.flight
	}
}

func (f *Filling) finishChunk(c index.Chunk) {
	if f.spans != nil {
		f.next++
		f.keep()
		return
	}
	if got := [sha256.Size]byte(f.hash.Sum(nil)); got != c.Digest {
		f.mismatch = &Mismatch{Chunk: f.next, Offset: c.Offset, Got: got, Want: c.Digest}
		f.abandon()
		return
	}
	f.next++
	if f.out == nil {
		return
	}
	if err := f.out.Commit(); err != nil {
		f.abandon()
		return
	}
	f.d.land(f.flight, nil)
	f.out, f.flight = nil, nil
}

// abandon leaves the chunk that is being stored to those who want it.
func (f *Filling) abandon() {
	if f.out == nil {
		return
	}
	f.out.Abort()
	f.d.land(f.flight, errAbandoned)
	f.out, f.flight = nil, nil
}
