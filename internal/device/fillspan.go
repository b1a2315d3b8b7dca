// SPDX-License-Identifier: Apache-2.0

package device

import (
	"crypto/sha256"
	"hash"
	"sync/atomic"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
)

// spanCheck compares the spans of a blob that goes by with the chunk table. One
// goroutine writes to it, ahead of the one that asks.
type spanCheck struct {
	table *index.Table
	next  int   // span that is going by
	pos   int64 // in the blob
	last  byte
	hash  hash.Hash
	right []atomic.Bool // by span
	wrong atomic.Pointer[Mismatch]
}

func newSpanCheck(t *index.Table) *spanCheck {
	return &spanCheck{table: t, hash: sha256.New(), right: make([]atomic.Bool, t.Spans())}
}

// Write takes in the next bytes of the blob.
func (c *spanCheck) Write(p []byte) (int, error) {
	all := len(p)
	for len(p) > 0 {
		n := int64(len(p))
		var s index.Span
		inside := false
		if c.next < c.table.Spans() {
			s = c.table.Span(c.next)
			if inside = c.pos >= s.BlobOffset; inside {
				n = min(n, s.BlobOffset+s.BlobSize-c.pos)
				c.hash.Write(p[:n])
			} else {
				n = min(n, s.BlobOffset-c.pos)
			}
		}
		c.pos += n
		c.last, p = p[n-1], p[n:]
		if inside && c.pos == s.BlobOffset+s.BlobSize {
			c.end(s)
		}
	}
	return all, nil
}

// end looks at the digest of a span and begins the next one.
func (c *spanCheck) end(s index.Span) {
	got := [sha256.Size]byte(c.hash.Sum(nil))
	if c.right[c.next].Store(got == s.Digest); got != s.Digest {
		c.wrong.CompareAndSwap(nil, &Mismatch{Span: true, Chunk: c.next, Offset: s.BlobOffset, Got: got, Want: s.Digest})
	}
	c.hash.Reset()
	c.next++
	if c.next < c.table.Spans() && c.table.Span(c.next).BlobOffset == c.pos-shared {
		c.hash.Write([]byte{c.last})
	}
}

// kept is a chunk whose bytes are in the cache, where nobody sees them before its
// span has matched.
type kept struct {
	out    *cache.Writer
	flight *flight
}

// Blob takes in the next bytes of the blob. A device whose chunks lie in spans needs
// them beside the content, from another goroutine if the caller likes: always more
// than what the content that has come was decompressed from.
func (f *Filling) Blob(p []byte) {
	if f.spans != nil {
		_, _ = f.spans.Write(p) // never fails
	}
}

// keep keeps the chunk that has just been taken in until its span has matched.
func (f *Filling) keep() {
	if f.out != nil {
		f.kept = append(f.kept, kept{f.out, f.flight})
		f.out, f.flight = nil, nil
	}
}

// enter settles what is kept if the chunk lies in another span.
func (f *Filling) enter(c index.Chunk) {
	number := f.d.table.SpanOf(c)
	if number != f.span {
		f.settle()
		f.span = number
	}
}

// settle makes what is kept present, or throws it away.
func (f *Filling) settle() {
	all := f.kept
	f.kept = nil
	right := f.span >= 0 && f.spans.right[f.span].Load()
	if f.span >= 0 && !right && f.mismatch == nil {
		if f.mismatch = f.spans.wrong.Load(); f.mismatch == nil {
			s := f.d.table.Span(f.span)
			f.mismatch = &Mismatch{Span: true, Chunk: f.span, Offset: s.BlobOffset, Want: s.Digest}
		}
	}
	for _, k := range all {
		if right && k.out.Commit() == nil {
			f.d.land(k.flight, nil)
			continue
		}
		k.out.Abort()
		f.d.land(k.flight, errAbandoned)
	}
}
