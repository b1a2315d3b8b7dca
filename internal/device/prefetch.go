// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"fmt"

	"github.com/holdfast/holdfast/internal/index"
)

// Prefetch brings in [off, off+n) for somebody who will read it, at the given
// priority. Unlike [Device.Wait] it takes nothing along.
func (d *Device) Prefetch(ctx context.Context, off int64, n int, p Priority) error {
	if err := d.checkRange(off, int64(n)); err != nil {
		return err
	}
	first, end := d.table.Range(off, int64(n))
	return d.prefetch(ctx, first, end, p, func(index.Chunk) bool { return true })
}

// PrefetchBlob brings in the chunks that lie before the offset end of the blob.
func (d *Device) PrefetchBlob(ctx context.Context, end int64, p Priority) error {
	return d.prefetch(ctx, 0, d.table.Len(), p, func(c index.Chunk) bool { return c.BlobOffset < end })
}

// prefetch fetches those of the chunks [i, end) that are wanted, in order, a
// request's worth at a time.
func (d *Device) prefetch(ctx context.Context, i, end int, p Priority, wanted func(index.Chunk) bool) error {
	for i < end {
		flights, next, err := d.startPrefetch(i, end, p, wanted)
		if err != nil {
			return err
		}
		err = arrive(ctx, flights)
		if errors.Is(err, errAbandoned) && ctx.Err() == nil {
			continue // by a reader who had begun to fetch it
		}
		if err != nil {
			return fmt.Errorf("prefetching layer %s: %w", d.desc.Digest, err)
		}
		i = next
	}
	return nil
}

// arrive returns when all flights have landed, or with the first error. If ctx
// ends first the error also says what the fetch has met so far.
func arrive(ctx context.Context, flights []*flight) error {
	for _, f := range flights {
		select {
		case <-f.done:
			if f.err != nil {
				return f.err
			}
		case <-ctx.Done():
			err := context.Cause(ctx)
			if met := f.fetch.failed.Load(); met != nil {
				err = fmt.Errorf("%w: %w", err, *met)
			}
			return err
		}
	}
	return nil
}

// startPrefetch starts the next request's worth and returns its flights, those
// that are under way already included, and the chunk to go on with.
func (d *Device) startPrefetch(i, end int, p Priority, wanted func(index.Chunk) bool) ([]*flight, int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, 0, errClosed
	}
	var missing []int
	var flights []*flight
	var size, frame int64
	for ; i < end && size < maxRequest; i++ {
		c := d.table.At(i)
		if !wanted(c) {
			continue
		}
		if f := d.flights[i]; f != nil {
			flights = append(flights, f)
		} else if !d.cache.Has(i) {
			if len(missing) == 0 || c.BlobOffset != frame {
				size += c.BlobSize
			}
			frame = c.BlobOffset
			missing = append(missing, i)
		}
	}
	for _, f := range d.begin(d.whole(missing), p) {
		f.keep = true
		flights = append(flights, f.flights...)
	}
	return flights, i, nil
}
