// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"fmt"
	"math/bits"
	"sync/atomic"

	"github.com/holdfast/holdfast/internal/index"
)

// extentSize is the part of a device that shares a time of its last use.
const extentSize = 1 << 20

// extent is what is known of the chunks that start in one.
type extent struct {
	used  atomic.Uint32 // when it was last read: see Space.now
	bytes atomic.Int64  // disk space of those that are present
}

// span is chunks [first, end) and the disk space that they count for.
type span struct {
	first, end int
	cost       int64
}

// appendChunk adds chunk i, which is behind all spans.
func appendChunk(spans []span, i int, cost int64) []span {
	if n := len(spans); n > 0 && spans[n-1].end == i {
		spans[n-1].end++
		spans[n-1].cost += cost
		return spans
	}
	return append(spans, span{i, i + 1, cost})
}

func blockStart(off int64) int64 { return off / index.BlockSize * index.BlockSize }
func blockEnd(off int64) int64   { return blockStart(off + index.BlockSize - 1) }

// cost is the disk space that a chunk counts for: all blocks in which it has
// bytes, so that a block is counted as long as any chunk in it is present.
func cost(c index.Chunk) int64 { return blockEnd(c.End()) - blockStart(c.Offset) }

// touch notes that chunks [first, end) are read now.
func (f *File) touch(first, end int) {
	if first >= end {
		return
	}
	a, b := f.table.At(first).Offset, f.table.At(end-1).End()
	now := f.space.tick(b - a)
	for e := a / extentSize; e*extentSize < b; e++ {
		if used := &f.extents[e].used; used.Load() != now {
			used.Store(now)
		}
	}
}

// buckets is how many ages there are: see bucket.
const buckets = 464

// bucket orders ages, with sixteen steps an octave.
func bucket(age uint32) int {
	if age < 16 {
		return int(age)
	}
	octave := bits.Len32(age) - 5
	return 16*octave + int(age>>octave)
}

// age is how long ago an extent was read.
func (e *extent) age(now uint32) int {
	used := e.used.Load()
	if used > now { // after now was read
		return 0
	}
	return bucket(now - used)
}

// selection says which chunks are to be evicted: all that are older than a
// bucket, and of those in it as many as it takes.
type selection struct {
	now    uint32
	bucket int
	anyAge bool  // as many as it takes, of whatever age
	left   int64 // bytes that it still takes
}

// wants reports whether chunks of an age are selected, and whether they count.
func (s *selection) wants(age int) (selected, counted bool) {
	counted = age == s.bucket || s.anyAge
	return counted && s.left > 0 || !counted && age > s.bucket, counted
}

// evict takes selected chunks that nobody holds off the disk, and returns how
// much space that has freed. A crash at any step leaves a map that names only
// what is whole on disk.
func (f *File) evict(sel *selection) (int64, error) {
	f.naming.Lock()
	f.mu.Lock()
	spans := f.victims(sel)
	f.punch(spans)
	f.mu.Unlock()
	err := f.unname(spans)
	if err != nil {
		f.mu.Lock()
		f.restore(spans)
		f.mu.Unlock()
	}
	f.naming.Unlock()
	if err != nil {
		return 0, err
	}
	return f.free(spans)
}

// victims makes the selected chunks absent. The caller holds f.mu.
func (f *File) victims(sel *selection) []span {
	if f.frozen {
		return nil
	}
	var spans []span
	for n := range f.extents {
		e := &f.extents[n]
		if e.bytes.Load() == 0 {
			continue
		}
		selected, counted := sel.wants(e.age(sel.now))
		if !selected {
			continue
		}
		start := int64(n) * extentSize
		for i := f.table.Search(start); i < f.table.Len(); i++ {
			c := f.table.At(i)
			if c.Offset >= start+extentSize || counted && sel.left <= 0 {
				break
			}
			if c.Offset < start || !f.stored(i) || f.isHeld(i) {
				continue
			}
			f.unmark(i)
			spans = appendChunk(spans, i, cost(c))
			if counted {
				sel.left -= cost(c)
			}
		}
	}
	return spans
}

// restore makes chunks present again that have not been touched on disk. The
// caller holds f.mu.
func (f *File) restore(spans []span) {
	for _, s := range spans {
		for i := s.first; i < s.end; i++ {
			f.mark(i)
			// The map on disk is one of two, and only one lacks it.
			f.named[i/64] |= 1 << (i % 64)
		}
		delete(f.punching, s)
	}
	f.signal()
}

// punch notes that absent chunks are about to be freed. Until they are, nobody
// writes them. The caller holds f.mu.
func (f *File) punch(spans []span) {
	for _, s := range spans {
		f.punching[s] = struct{}{}
	}
}

// isPunched reports whether a block of chunk i is being freed. The caller holds f.mu.
func (f *File) isPunched(i int) bool {
	if len(f.punching) == 0 {
		return false
	}
	c := f.table.At(i)
	for s := range f.punching {
		if blockStart(f.table.At(s.first).Offset) < blockEnd(c.End()) &&
			blockStart(c.Offset) < blockEnd(f.table.At(s.end-1).End()) {
			return true
		}
	}
	return false
}

// free punches chunks out of the file, gives their space back and lets them be
// written again. Space that could not be freed counts as used.
func (f *File) free(spans []span) (freed int64, err error) {
	for _, s := range spans {
		off, end := f.blocks(s)
		if perr := f.punchHole(off, end); perr != nil {
			err = fmt.Errorf("punching %d bytes at %d out of cache %s: %w", end-off, off, f.dir, perr)
			continue
		}
		freed += s.cost
	}
	f.space.give(freed)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range spans {
		delete(f.punching, s)
	}
	f.signal()
	return freed, err
}

// blocks is the range to punch for chunks: theirs, and the rest of the blocks at
// both ends if no other chunk has bytes there.
func (f *File) blocks(s span) (off, end int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	off, end = f.table.At(s.first).Offset, f.table.At(s.end-1).End()
	start, stop := blockStart(off), blockEnd(end)
	inUse := func(i int) bool { return f.stored(i) || f.writing[i] }
	free := true
	for i := s.first - 1; i >= 0 && f.table.At(i).End() > start; i-- {
		free = free && !inUse(i)
	}
	if free {
		off = start
	}
	free = true
	for i := s.end; i < f.table.Len() && f.table.At(i).Offset < stop; i++ {
		free = free && !inUse(i)
	}
	if free {
		end = stop
	}
	return off, end
}
