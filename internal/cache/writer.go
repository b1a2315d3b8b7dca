// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
)

// ErrFull means that a chunk can be kept neither on disk nor in memory.
var ErrFull = errors.New("disk full")

// Writer takes in one chunk. It is used by one goroutine, and ended with Commit
// or Abort.
type Writer struct {
	file  *File
	i     int
	chunk index.Chunk
	n     int64  // bytes written
	lost  uint64 // File.lost when it began

	reserved bool   // disk space
	spills   bool   // may go to memory
	buf      []byte // what has been written, if it goes to memory
	ended    bool
}

// Begin begins to take in chunk i, which is not in the cache. It waits while the
// chunk is being evicted, and while others are for its room. If there is none on
// disk the chunk goes to memory; [ErrFull] says that it cannot go there either.
func (f *File) Begin(ctx context.Context, i int) (*Writer, error) {
	for {
		ok, changed := f.claim(i)
		if ok {
			break
		}
		if f.stored(i) {
			return nil, fmt.Errorf("storing chunk %d: it is there already", i)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	w := f.writer(i)
	w.spills = true
	var err error
	if !f.Frozen() { // the map of a frozen file may have got lost; what is mounted is not written
		w.reserved, err = f.space.reserve(ctx, cost(w.chunk))
	}
	if err == nil && !w.reserved {
		err = w.spill()
	}
	if err != nil {
		w.Abort()
		return nil, err
	}
	return w, nil
}

// TryBegin begins to take in chunk i, which goes to disk. It returns nil if the
// chunk is there or on its way, or if there is no room without an eviction.
func (f *File) TryBegin(i int) *Writer {
	if ok, _ := f.claim(i); !ok {
		return nil
	}
	w := f.writer(i)
	if w.reserved = !f.Frozen() && f.space.tryReserve(cost(w.chunk)); !w.reserved {
		w.Abort()
		return nil
	}
	return w
}

func (f *File) writer(i int) *Writer {
	return &Writer{file: f, i: i, chunk: f.table.At(i), lost: f.lost.Load()}
}

// claim makes the caller the one who writes chunk i. If it cannot be now, changed
// is closed when it is worth another try.
func (f *File) claim(i int) (ok bool, changed <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stored(i) || f.writing[i] || f.isPunched(i) {
		return false, f.changed
	}
	f.writing[i] = true
	return true, nil
}

// Write takes in the next bytes of the chunk.
func (w *Writer) Write(p []byte) (int, error) {
	if w.n+int64(len(p)) > w.chunk.Size {
		return 0, fmt.Errorf("writing more than the %d bytes of chunk %d", w.chunk.Size, w.i)
	}
	n := 0
	if w.buf == nil {
		var err error
		n, err = w.file.data.WriteAt(p, w.chunk.Offset+w.n)
		w.n += int64(n)
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			return n, err
		}
		w.file.space.noteFull()
		if err := w.spill(); err != nil {
			return n, err
		}
	}
	copy(w.buf[w.n:], p[n:])
	w.n += int64(len(p) - n)
	return len(p), nil
}

// spill goes on in memory, with what is on disk so far.
func (w *Writer) spill() error {
	if !w.spills || !w.file.space.overflow.take(w.chunk.Size) {
		return fmt.Errorf("keeping chunk %d of %d bytes: %w", w.i, w.chunk.Size, ErrFull)
	}
	w.buf = make([]byte, w.chunk.Size)
	if _, err := w.file.data.ReadAt(w.buf[:w.n], w.chunk.Offset); err != nil {
		return fmt.Errorf("reading back chunk %d: %w", w.i, err)
	}
	return nil
}

// Commit makes the chunk, whose bytes have been written and verified, readable.
// After an error it is not.
func (w *Writer) Commit() error {
	defer w.Abort()
	if w.n != w.chunk.Size {
		return fmt.Errorf("chunk %d has %d bytes, want %d", w.i, w.n, w.chunk.Size)
	}
	f := w.file
	if w.buf != nil {
		f.space.overflow.put(f, w.i, w.buf)
		w.buf = nil
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.lost.Load() != w.lost {
		return fmt.Errorf("chunk %d: the disk lost what was written", w.i)
	}
	if w.spills { // somebody wants it
		f.touch(w.i, w.i+1)
	}
	f.mark(w.i)
	f.ended(w.i)
	w.ended = true
	f.space.noteStored()
	return nil
}

// Abort throws away what was written. After Commit it does nothing.
func (w *Writer) Abort() {
	if w.ended {
		return
	}
	w.ended = true
	f := w.file
	if w.buf != nil {
		f.space.overflow.give(w.chunk.Size)
	}
	f.mu.Lock()
	if !w.reserved {
		f.ended(w.i)
		f.mu.Unlock()
		return
	}
	delete(f.writing, w.i)
	spans := []span{{first: w.i, end: w.i + 1, cost: cost(w.chunk)}}
	f.punch(spans)
	f.mu.Unlock()
	if _, err := f.free(spans); err != nil {
		f.space.log.Error("freeing disk space of a chunk that was not stored", "cache", f.dir, "err", err)
	}
}

// ended lets go of a chunk that was being written. The caller holds f.mu.
func (f *File) ended(i int) {
	delete(f.writing, i)
	f.signal()
}

func (f *File) signal() {
	close(f.changed)
	f.changed = make(chan struct{})
}
