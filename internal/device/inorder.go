// SPDX-License-Identifier: Apache-2.0

package device

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"sort"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cache"
)

// Fetching what is known to be wanted. The numbers are for a line of 1 Gbit/s and
// 20 ms, which holds 2.5 MB.
const (
	// Within a piece, 64 ms of the line, what is near in the blob shares a request.
	pieceSize = 8 << 20
	// A request is as large as it can be without keeping what comes behind it.
	pieceRequest = 4 << 20
	// So many bytes are on their way, and so many requests if they are small.
	maxAhead, maxAheadRequests = 8 << 20, 16
	// maxBridge is how far what is wanted may be apart in the blob to share a
	// request: a millisecond of the line. What lies between is stored as well ...
	maxBridge = 128 << 10
	// ... and is at most such a part of what is wanted.
	bridgeShare = 4
)

// Want is bytes of a device's blob that somebody will want.
type Want struct {
	*Device
	blob.Range
}

// FetchInOrder brings in what is wanted, from several devices, about in the order
// in which it is wanted: the chunks whose frames have bytes in the ranges. It
// keeps a line busy with few and large requests, and returns when all has come.
// Meanwhile readers of these devices guess less what else they will want. It ends
// with the first error, with [cache.ErrFull] if there is no room.
//
// Frames are looked for as if they lay in the blob in the order of the device,
// which they do unless an index is odd. What is not found so is not fetched.
func FetchInOrder(ctx context.Context, wants []Want, p Priority) error {
	defer guide(wants)()
	g, ctx := errgroup.WithContext(ctx)
	ahead := semaphore.NewWeighted(maxAhead)
	for piece := range pieces(wants) {
		for _, r := range piece.requests() {
			weight := min(max(r.bytes, maxAhead/maxAheadRequests), maxAhead)
			if ahead.Acquire(ctx, weight) != nil {
				return cmp.Or(g.Wait(), context.Cause(ctx))
			}
			g.Go(func() error {
				defer ahead.Release(weight)
				return r.fetch(ctx, p)
			})
		}
	}
	return g.Wait()
}

// guide tells devices that what readers want is fetched for them, until the
// returned function is called.
func guide(wants []Want) (end func()) {
	devices := map[*Device]bool{}
	for _, w := range wants {
		devices[w.Device] = true
	}
	add := func(n int) {
		for d := range devices {
			d.mu.Lock()
			d.guided += n
			d.mu.Unlock()
		}
	}
	add(1)
	return func() { add(-1) }
}

// piece is what is looked at together: chunks that are wanted about now.
type piece map[*Device][]wanted

// wanted is a chunk and its place in the order.
type wanted struct{ chunk, place int }

// pieces cuts what is wanted into pieces of pieceSize or a little more. Each frame
// is in one of them, once.
func pieces(wants []Want) iter.Seq[piece] {
	return func(yield func(piece) bool) {
		now, size := piece{}, int64(0)
		seen := map[*Device][]uint64{} // the first chunks of frames, one bit each
		for place, w := range wants {
			if seen[w.Device] == nil {
				seen[w.Device] = make([]uint64, (w.table.Len()+63)/64)
			}
			for first, end := range w.frames(seen[w.Device]) {
				for i := first; i < end; i++ {
					now[w.Device] = append(now[w.Device], wanted{i, place})
				}
				if size += w.table.At(first).BlobSize; size < pieceSize {
					continue
				}
				if !yield(now) {
					return
				}
				now, size = piece{}, 0
			}
		}
		if size > 0 {
			yield(now)
		}
	}
}

// frames returns the chunks [first, end) of each frame that has bytes in the range
// and is not marked as seen, and marks it.
func (w Want) frames(seen []uint64) iter.Seq2[int, int] {
	return func(yield func(first, end int) bool) {
		n := w.table.Len()
		i := sort.Search(n, func(i int) bool {
			c := w.table.At(i)
			return c.BlobOffset+c.BlobSize > w.Offset
		})
		for w.Length > 0 && i < n && w.table.At(i).BlobOffset < w.End() {
			first, start := i, w.table.At(i).BlobOffset
			if seen[first/64]&(1<<(first%64)) != 0 {
				i += 1 + sort.Search(n-i-1, func(k int) bool { return w.table.At(i+1+k).BlobOffset > start })
				continue
			}
			seen[first/64] |= 1 << (first % 64)
			for i++; i < n && w.table.At(i).BlobOffset == start; i++ {
			}
			if !yield(first, i) {
				return
			}
		}
	}
}

// request is chunks of a device that one request can fetch.
type request struct {
	*Device
	chunks []int // ascending
	bytes  int64
	place  int // in the order, of the one that is wanted first
}

// requests returns what has to be fetched of a piece, in order.
func (p piece) requests() []request {
	var all []request
	for d, chunks := range p {
		all = append(all, d.requests(chunks)...)
	}
	slices.SortFunc(all, func(a, b request) int { return cmp.Compare(a.place, b.place) })
	return all
}

func (d *Device) requests(chunks []wanted) []request {
	d.mu.Lock()
	defer d.mu.Unlock()
	var missing []int
	place := map[int]int{} // by chunk
	for _, w := range chunks {
		if !d.cache.Has(w.chunk) { // one that is on its way is waited for
			missing = append(missing, w.chunk)
			place[w.chunk] = w.place
		}
	}
	slices.Sort(missing)
	var all []request
	for _, run := range d.runs(d.bridge(missing)) {
		var r *request
		for _, i := range run {
			if r == nil || r.bytes >= pieceRequest && d.table.At(i).BlobOffset != d.table.At(i-1).BlobOffset {
				all = append(all, request{Device: d, place: math.MaxInt})
				r = &all[len(all)-1]
			}
			r.chunks = append(r.chunks, i)
			r.bytes = d.span(r.chunks)
			if at, ok := place[i]; ok {
				r.place = min(r.place, at)
			}
		}
	}
	return all
}

// span is how many bytes of the blob chunks lie in, ascending.
func (d *Device) span(chunks []int) int64 {
	first, last := d.table.At(chunks[0]), d.table.At(chunks[len(chunks)-1])
	return last.BlobOffset + last.BlobSize - first.BlobOffset
}

// bridge adds to chunks, ascending, those between that cost less to fetch than
// another request.
func (d *Device) bridge(chunks []int) []int {
	var budget int64
	for k, i := range chunks {
		if c := d.table.At(i); k == 0 || c.BlobOffset != d.table.At(chunks[k-1]).BlobOffset {
			budget += c.BlobSize / bridgeShare
		}
	}
	var all []int
	for k, i := range chunks {
		if k > 0 {
			between, cost := d.between(chunks[k-1], i)
			if cost <= budget {
				all, budget = append(all, between...), budget-cost
			}
		}
		all = append(all, i)
	}
	return all
}

// between returns the chunks between a and b, and their size in the blob, if they
// are all missing and lie in a gap that is worth bridging.
func (d *Device) between(a, b int) (chunks []int, cost int64) {
	from, to := d.table.At(a), d.table.At(b)
	cost = to.BlobOffset - from.BlobOffset - from.BlobSize
	if cost <= maxGap || cost > maxBridge {
		return nil, 0
	}
	for i := a + 1; i < b; i++ {
		c := d.table.At(i)
		if !d.missing(i) || c.BlobOffset < from.BlobOffset || c.BlobOffset > to.BlobOffset {
			return nil, 0
		}
		chunks = append(chunks, i)
	}
	return chunks, cost
}

// fetch brings in the chunks of a request: it waits for those that are on their way
// by now, and starts the others.
func (r request) fetch(ctx context.Context, p Priority) error {
	for {
		flights, err := r.start(p)
		if err == nil {
			err = arrive(ctx, flights)
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errAbandoned) && ctx.Err() == nil: // by a reader who had begun to fetch it
		default:
			return fmt.Errorf("prefetching layer %s: %w", r.desc.Digest, err)
		}
	}
}

func (r request) start(p Priority) ([]*flight, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errClosed
	}
	if r.cache.Full() { // it would displace what is read
		return nil, cache.ErrFull
	}
	var missing []int
	var flights []*flight
	for _, i := range r.chunks {
		if f := r.flights[i]; f != nil {
			flights = append(flights, f)
		} else if !r.cache.Has(i) {
			missing = append(missing, i)
		}
	}
	for _, f := range r.begin(missing, p) {
		f.keep = true
		flights = append(flights, f.flights...)
	}
	return flights, nil
}
