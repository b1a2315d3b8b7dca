// SPDX-License-Identifier: Apache-2.0

package device

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/holdfast/holdfast/internal/blob"
)

const (
	// maxBridge is how far what is wanted may be apart in the blob to share a
	// request: a millisecond of a line of 1 Gbit/s. What lies between is stored as
	// well.
	maxBridge = 128 << 10
	// bridgeShare bounds all of that to a part of what is wanted.
	bridgeShare = 8
)

// PrefetchRanges brings in, at the given priority, the chunks that have bytes in
// ranges of the blob, all at once: each request is for what is near. Chunks that
// are on their way are waited for.
//
// Frames are looked for as if they lay in the blob in the order of the device,
// which they do unless an index is odd. What is not found so is not prefetched.
func (d *Device) PrefetchRanges(ctx context.Context, ranges []blob.Range, p Priority) error {
	for {
		flights, err := d.startRanges(ranges, p)
		if err == nil {
			err = arrive(ctx, flights)
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errAbandoned) && ctx.Err() == nil: // by a reader who had begun to fetch it
		default:
			return fmt.Errorf("prefetching layer %s: %w", d.desc.Digest, err)
		}
	}
}

// startRanges starts what is missing of the ranges and returns its flights, those
// that are under way already included.
func (d *Device) startRanges(ranges []blob.Range, p Priority) ([]*flight, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	var missing []int
	var flights []*flight
	for _, i := range d.covering(ranges) {
		if f := d.flights[i]; f != nil {
			flights = append(flights, f)
		} else if !d.cache.Has(i) {
			missing = append(missing, i)
		}
	}
	for _, run := range d.runs(d.bridge(missing)) {
		f := d.start(run, p)
		f.keep = true
		flights = append(flights, f.flights...)
	}
	return flights, nil
}

// covering returns the chunks whose frames have bytes in any of the ranges, ascending.
func (d *Device) covering(ranges []blob.Range) []int {
	sorted := slices.SortedFunc(slices.Values(ranges), func(a, b blob.Range) int {
		return cmp.Compare(a.Offset, b.Offset)
	})
	var chunks []int
	next := 0 // what lies before has been looked at
	for _, r := range sorted {
		if r.Length <= 0 {
			continue
		}
		at := sort.Search(d.table.Len(), func(i int) bool {
			c := d.table.At(i)
			return c.BlobOffset+c.BlobSize > r.Offset
		})
		for next = max(next, at); next < d.table.Len() && d.table.At(next).BlobOffset < r.End(); next++ {
			chunks = append(chunks, next)
		}
	}
	return chunks
}

// bridge adds to chunks, ascending, those between that cost less to fetch than
// another request.
func (d *Device) bridge(chunks []int) []int {
	var budget int64
	for _, i := range chunks {
		budget += d.table.At(i).BlobSize / bridgeShare
	}
	var all []int
	for k, i := range chunks {
		if k > 0 {
			between := d.between(chunks[k-1], i)
			if prev := d.table.At(chunks[k-1]); len(between) > 0 {
				gap := d.table.At(i).BlobOffset - prev.BlobOffset - prev.BlobSize
				if gap <= budget {
					budget -= gap
					all = append(all, between...)
				}
			}
		}
		all = append(all, i)
	}
	return all
}

// between returns the chunks between a and b, if they are all missing and lie
// in a gap that is worth bridging.
func (d *Device) between(a, b int) []int {
	from, to := d.table.At(a), d.table.At(b)
	if gap := to.BlobOffset - from.BlobOffset - from.BlobSize; gap <= maxGap || gap > maxBridge {
		return nil
	}
	var chunks []int
	for i := a + 1; i < b; i++ {
		c := d.table.At(i)
		if !d.missing(i) || c.BlobOffset < from.BlobOffset || c.BlobOffset > to.BlobOffset {
			return nil
		}
		chunks = append(chunks, i)
	}
	return chunks
}
