// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"fmt"
)

// hold keeps chunks [first, end) readable once they are.
type hold struct {
	file       *File
	first, end int
	slot       int   // in File.held
	admitted   int64 // bytes of memory that it may need
}

// Hold keeps those of the chunks [first, end) that are in the cache, and those
// that get there, readable until it is released, once. They count as read now.
//
// When the disk is full it waits until what the chunks take fits into memory
// beside what others hold, so that readers never wait for each other's chunks;
// it fails with [ErrFull] if that cannot be, or when ctx ends.
func (f *File) Hold(ctx context.Context, first, end int) (release func(), err error) {
	admitted, err := f.admit(ctx, first, end)
	if err != nil {
		return nil, err
	}
	f.touch(first, end)
	h := f.pin(first, end)
	h.admitted = admitted
	return h.release, nil
}

func (h *hold) release() {
	h.file.unpin(h)
	if h.admitted > 0 {
		h.file.space.overflow.admission.Release(h.admitted)
	}
}

// admit waits for the memory that the chunks [first, end) may need.
func (f *File) admit(ctx context.Context, first, end int) (int64, error) {
	full := f.Full()
	if !full && f.buffered.Load() == 0 {
		return 0, nil
	}
	o := &f.space.overflow
	o.use(f, first, end)
	var need int64
	for i := first; i < end; i++ {
		if !f.stored(i) && (full || f.Has(i)) {
			need += f.table.At(i).Size
		}
	}
	if need == 0 {
		return 0, nil
	}
	if need > o.max {
		return 0, fmt.Errorf("keeping %d bytes in memory: %w", need, ErrFull)
	}
	if err := o.admission.Acquire(ctx, need); err != nil {
		return 0, context.Cause(ctx)
	}
	return need, nil
}

func (f *File) pin(first, end int) *hold {
	h := &hold{file: f, first: first, end: end}
	f.mu.Lock()
	defer f.mu.Unlock()
	h.slot = len(f.held)
	f.held = append(f.held, h)
	return h
}

func (f *File) unpin(h *hold) {
	f.mu.Lock()
	defer f.mu.Unlock()
	last := f.held[len(f.held)-1]
	f.held[h.slot], last.slot = last, h.slot
	f.held[len(f.held)-1] = nil
	f.held = f.held[:len(f.held)-1]
}

// isHeld reports whether somebody holds chunk i. The caller holds f.mu.
func (f *File) isHeld(i int) bool {
	for _, h := range f.held {
		if h.first <= i && i < h.end {
			return true
		}
	}
	return false
}
