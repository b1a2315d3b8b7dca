// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"fmt"
)

// Prefetch brings in the chunks that lie before the offset end of the blob, in
// order, at the given priority, one request at a time.
func (d *Device) Prefetch(ctx context.Context, end int64, p Priority) error {
	for i := 0; i < d.table.Len(); {
		flights, next, err := d.prefetch(i, end, p)
		if err != nil {
			return err
		}
		i = next
		for _, f := range flights {
			select {
			case <-f.done:
				if f.err != nil {
					return fmt.Errorf("prefetching layer %s: %w", d.desc.Digest, f.err)
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	return nil
}

// prefetch starts the first request's worth of missing chunks from chunk i on.
func (d *Device) prefetch(i int, end int64, p Priority) ([]*flight, int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, 0, errClosed
	}
	var missing []int
	var size int64
	for ; i < d.table.Len() && size < maxRequest; i++ {
		c := d.table.At(i)
		if c.BlobOffset >= end {
			i = d.table.Len()
			break
		}
		if d.missing(i) {
			missing = append(missing, i)
			size += c.BlobSize
		}
	}
	var flights []*flight
	for _, run := range d.runs(missing) {
		f := d.start(run, p)
		f.keep = true
		flights = append(flights, f.flights...)
	}
	return flights, i, nil
}
