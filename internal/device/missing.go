// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"

	"github.com/holdfast/holdfast/internal/index"
)

// fillBatch is how many compressed bytes a fill asks for at a time.
const fillBatch = 4 << 20

// ErrNoRoom means that a device cannot be filled without taking room from readers.
var ErrNoRoom = errors.New("there is no room for the rest of the layer")

// FillMissing brings in what is missing and nothing else, below everything that a
// reader waits for. Before it asks a source for bytes it calls pay with their number,
// compressed, and ends with pay's error if there is one. As soon as there is no room
// without an eviction it ends with [ErrNoRoom].
func (d *Device) FillMissing(ctx context.Context, pay func(ctx context.Context, n int64) error) error {
	all := func(index.Chunk) bool { return true }
	for i := 0; i < d.table.Len(); {
		b := d.nextBatch(i)
		if b.size > 0 && !d.cache.Room(b.size) {
			return ErrNoRoom
		}
		if b.fetched > 0 {
			if err := pay(ctx, b.fetched); err != nil {
				return err
			}
		}
		if err := d.prefetch(ctx, i, b.end, Fill, all); err != nil {
			return err
		}
		i = b.end
	}
	return nil
}

// batch is what is missing of some chunks, up to end.
type batch struct {
	end     int
	size    int64 // bytes of the device
	fetched int64 // bytes of the blob that are not local elsewhere either
}

// nextBatch is the batch that starts with chunk i.
func (d *Device) nextBatch(i int) (b batch) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var missing []int
	last := int64(-1)
	var compressed int64
	for b.end = i; b.end < d.table.Len() && compressed < fillBatch; b.end++ {
		if !d.missing(b.end) {
			continue
		}
		c := d.table.At(b.end)
		missing = append(missing, b.end)
		b.size += c.Size
		if c.BlobOffset != last { // a frame with several chunks counts once
			compressed += c.BlobSize
			last = c.BlobOffset
		}
	}
	_, away := d.split(missing)
	b.fetched = d.compressed(away)
	return b
}
