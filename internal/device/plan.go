// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/holdfast/holdfast/internal/index"
)

// Reading ahead. A source answers after a round trip however little is asked
// for, so a request takes neighbours along as long as most of what is fetched
// is also read: the budget below. Neighbours in the device are neighbours in
// the blob.
const (
	// A reader that goes on where it stopped gets what follows: as much as it has
	// read in a row, up to minReadAhead, and then an eighth of that, up to
	// maxReadAhead bytes of the device. Chunks arrive whole, so a window is many
	// of the largest, of 4 MiB, and more than a fast line holds.
	minReadAhead   = 8 << 20
	maxReadAhead   = 24 << 20
	readAheadShare = 8
	// A miss takes along its neighbours, on both sides. How much, in compressed
	// bytes, grows with every earlier miss close by: programs load directories in
	// parts.
	minExtra     = 128 << 10
	maxExtra     = 1 << 20
	extraGrowth  = 4
	closeBy      = 2 << 20   // of the blob
	budgetShare  = 4         // of what may be spent, one miss takes a quarter on each side
	maxNeighbour = 256 << 10 // largest chunk taken along ...
	maxRest      = 1 << 20   // ... and if it is the rest of the same file
	// Bytes fetched and not (yet) read may be this share of the bytes read ...
	extraNumerator, extraDenominator = 1, 4
	// ... and this much more, what a fast line carries in four or five round
	// trips, so that the first misses take something along too.
	extraAllowance = 11 << 20
	// Chunks this close in the blob share a request.
	maxGap = 16 << 10
	// Spans may begin with the byte that the one before ends with.
	shared = 1
	// The compressed bytes of one request: four of the largest chunks, which may
	// be a little larger than their content. In one request they come one after
	// the other; in several they would share the line, and all come late.
	maxRequest = 17 << 20
)

// stream is a reader that goes through the device in order.
type stream struct {
	next int64 // where it would go on
	read int64 // how much it has read in a row
}

// errClosed is what readers of a closed device get.
var errClosed = errors.New("device is closed")

// errAbandoned ends the flight of a chunk that nobody waits for any more.
var errAbandoned = errors.New("fetch abandoned by its last reader")

// flight is the fetch of one chunk, shared by all who need it.
type flight struct {
	chunk int
	fetch *fetch
	done  chan struct{} // closed after err is set
	err   error
	// corrupt is how often a source's bytes did not match; only run uses it.
	corrupt map[string]int
}

// fetch is a run of chunks on their way in one request.
type fetch struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	flights []*flight // in the order of the blob
	waiting int       // readers that wait for any of them; protected by Device.mu
	idle    Priority  // what it counts as while nobody waits
	keep    bool      // goes on when its last reader leaves

	failed atomic.Pointer[error] // why the latest round was not the last

	// Only run uses these.
	met    map[string]error // the latest of each source
	blamed int              // chunks that did not match
}

// demand notes that a reader wants a range, starts what is missing and what is
// likely to be wanted next, and returns the flights to wait for, joined.
func (d *Device) demand(off, n int64) ([]*flight, error) {
	if err := d.checkRange(off, n); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	if d.broken != nil {
		return nil, d.broken
	}
	var wait []*flight
	var missing []int
	first := d.table.Search(off)
	end := first
	for ; end < d.table.Len(); end++ {
		c := d.table.At(end)
		if c.Offset >= off+n {
			break
		}
		d.touch(end, c)
		if f := d.flights[end]; f != nil {
			wait = append(wait, f)
		} else if !d.cache.Has(end) {
			missing = append(missing, end)
		}
	}
	copied, missing := d.split(d.whole(missing))
	if len(copied) > 0 {
		wait = append(wait, d.startCopy(copied, ReadAhead).flights...)
	}
	for _, run := range d.runs(missing) {
		before, behind := d.neighbours(run)
		f := d.start(slices.Concat(before, run, behind), ReadAhead)
		for _, fl := range f.flights {
			if fl.chunk >= first && fl.chunk < end {
				wait = append(wait, fl)
			}
		}
	}
	if !d.cache.Full() { // what is not stored would only displace what is needed
		d.readAhead(off, n)
	}
	for _, f := range wait {
		f.fetch.waiting++
	}
	return wait, nil
}

func (d *Device) checkRange(off, n int64) error {
	if off < 0 || n < 0 || off > d.Size() || n > d.Size()-off {
		return fmt.Errorf("reading %d bytes at %d of a device of %d bytes", n, off, d.Size())
	}
	return nil
}

// touch notes that a reader wants chunk i. A frame with several chunks counts once.
func (d *Device) touch(i int, c index.Chunk) {
	for _, r := range d.records {
		r.note(c)
	}
	if d.isTouched(i) {
		return
	}
	d.touched[i/64] |= 1 << (i % 64)
	for k := i - 1; k >= 0 && d.table.At(k).BlobOffset == c.BlobOffset; k-- {
		if d.isTouched(k) {
			return
		}
	}
	for k := i + 1; k < d.table.Len() && d.table.At(k).BlobOffset == c.BlobOffset; k++ {
		if d.isTouched(k) {
			return
		}
	}
	d.stats.touched.Add(c.BlobSize)
}

func (d *Device) isTouched(i int) bool { return d.touched[i/64]&(1<<(i%64)) != 0 }

// runs splits chunks, ascending, into what one request each can fetch.
func (d *Device) runs(chunks []int) [][]int {
	var runs [][]int
	var start, end int64 // of the current run in the blob
	var prev index.Chunk
	last := 0
	for _, i := range chunks {
		c := d.table.At(i)
		if len(runs) > 0 && follows(prev, c, end, d.gap(last, i)) && c.BlobOffset+c.BlobSize-start <= maxRequest {
			runs[len(runs)-1] = append(runs[len(runs)-1], i)
		} else {
			runs = append(runs, []int{i})
			start, end = c.BlobOffset, 0
		}
		end = max(end, c.BlobOffset+c.BlobSize)
		prev, last = c, i
	}
	return runs
}

// follows reports whether c can be read after prev from one stream of the blob
// that so far reaches to end, over a gap of at most so many bytes.
func follows(prev, c index.Chunk, end, gap int64) bool {
	if c.BlobOffset == prev.BlobOffset {
		return c.InnerOffset >= prev.InnerOffset+prev.Size
	}
	if c.Digest == [sha256.Size]byte{} {
		end -= shared
	}
	return c.BlobOffset >= end && c.BlobOffset-end <= gap
}

// neighbours returns chunks before and behind a run that its request takes
// along, each ascending, within the budget.
func (d *Device) neighbours(run []int) (before, behind []int) {
	if d.guided > 0 {
		return nil, nil
	}
	if d.table.Spans() > 0 {
		return nil, d.nextSpans(run)
	}
	first, last := d.table.At(run[0]), d.table.At(run[len(run)-1])
	start, end := first.BlobOffset, last.BlobOffset+last.BlobSize
	window := d.misses.window(start)
	budget := d.budget() - (end - start)
	left := min(budget/budgetShare, window)
	prev, at := last, run[len(run)-1]
	for i := run[len(run)-1] + 1; i < d.table.Len(); i++ {
		c := d.table.At(i)
		cost := c.BlobOffset + c.BlobSize - end
		rest := c.Offset == prev.End() && c.BlobSize <= maxRest && cost <= budget
		if !d.missing(i) || !follows(prev, c, end, d.gap(at, i)) || !rest && (c.BlobSize > maxNeighbour || cost > left) {
			break
		}
		if d.spared(c) {
			continue
		}
		left, budget = left-cost, budget-cost
		behind = append(behind, i)
		prev, at, end = c, i, c.BlobOffset+c.BlobSize
	}
	left = min(budget/budgetShare, window)
	next, at := first, run[0]
	for i := run[0] - 1; i >= 0; i-- {
		c := d.table.At(i)
		cost := start - c.BlobOffset
		if !d.missing(i) || !follows(c, next, c.BlobOffset+c.BlobSize, d.gap(i, at)) || c.BlobSize > maxNeighbour || cost > left {
			break
		}
		if d.spared(c) {
			continue
		}
		left -= cost
		before = append(before, i)
		next, at, start = c, i, c.BlobOffset
	}
	slices.Reverse(before)
	return before, behind
}

// missing reports whether chunk i is neither present nor on its way.
func (d *Device) missing(i int) bool { return !d.cache.Has(i) && d.flights[i] == nil }

// misses remembers where in the blob the latest misses were.
type misses struct {
	at   [64]int64
	n    int // how many of at are set
	next int // which to replace
}

// near notes a miss and returns how many there were that close to it.
func (m *misses) near(at int64) int {
	n := 0
	for _, other := range m.at[:m.n] {
		if max(at, other)-min(at, other) < spansCloseBy {
			n++
		}
	}
	m.note(at)
	return n
}

// window notes a miss and returns how much to take along on each side.
func (m *misses) window(at int64) int64 {
	window := int64(minExtra)
	for _, other := range m.at[:m.n] {
		if max(at, other)-min(at, other) < closeBy {
			window *= extraGrowth
		}
		if window >= maxExtra {
			window = maxExtra
			break
		}
	}
	m.note(at)
	return window
}

func (m *misses) note(at int64) {
	m.at[m.next] = at
	m.next = (m.next + 1) % len(m.at)
	m.n = min(m.n+1, len(m.at))
}

// budget is how many bytes may be fetched now, wanted or not.
func (d *Device) budget() int64 {
	touched := d.stats.touched.Load()
	return touched + touched*extraNumerator/extraDenominator + extraAllowance - d.stats.fetched.Load() - d.stats.copied.Load()
}

// readAhead starts what a sequential reader will want next.
func (d *Device) readAhead(off, n int64) {
	s := d.sequential(off, n)
	window := max(min(s.read, minReadAhead), min(s.read/readAheadShare, maxReadAhead))
	if d.guided > 0 && s.read < minReadAhead { // who reads so much in a row is not short of a guess
		window = 0
	}
	if window < index.BlockSize {
		return
	}
	var missing []int
	for i := d.table.Search(s.next); i < d.table.Len(); i++ {
		c := d.table.At(i)
		if c.Offset >= s.next+window {
			break
		}
		if d.missing(i) {
			missing = append(missing, i)
		}
	}
	// Few large requests: wait until half of the window is missing.
	if len(missing) == 0 || d.table.At(missing[0]).Offset > s.next+window/2 {
		return
	}
	for _, f := range d.begin(d.whole(missing), ReadAhead) {
		f.keep = true
	}
}

// sequential finds the stream that the read continues, or starts one. A read
// may overlap or skip a little: kernels read ahead, files end on block borders.
func (d *Device) sequential(off, n int64) *stream {
	const slack = 1 << 20
	for i := range d.streams {
		s := &d.streams[i]
		if s.read > 0 && off <= s.next+slack && off+n > s.next-slack {
			if end := off + n; end > s.next {
				s.read += min(n, end-s.next)
				s.next = end
			}
			return s
		}
	}
	s := &d.streams[d.oldest]
	d.oldest = (d.oldest + 1) % len(d.streams)
	*s = stream{next: off + n, read: n}
	return s
}

// leave ends a reader's wait. A fetch that it leaves without having got its
// chunk, and that nobody else waits for, is cancelled.
func (d *Device) leave(flights []*flight) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range flights {
		f.fetch.waiting--
		select {
		case <-f.done:
		default:
			if f.fetch.waiting == 0 && !f.fetch.keep {
				f.fetch.cancel(errAbandoned)
			}
		}
	}
}
