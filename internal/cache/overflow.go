// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"container/list"
	"sync"

	"golang.org/x/sync/semaphore"
)

// overflowSize is how many bytes of chunks that cannot be stored are kept in
// memory, on the whole node.
const overflowSize = 32 << 20

// overflow is the chunks in memory: those that somebody holds or fills, and, as
// long as the room is not needed, the ones used most recently.
type overflow struct {
	max int64
	// admission bounds what holds may need, so that what is held always fits.
	admission *semaphore.Weighted

	mu    sync.Mutex // protects the fields below
	bytes int64      // of buffers, and of those that are being filled
	used  list.List  // of *buffer, latest first
}

// buffer is a chunk in memory. Its data does not change.
type buffer struct {
	file  *File
	chunk int
	data  []byte
	at    *list.Element
}

// take makes room for a chunk that is about to be filled, and reports whether
// it could.
func (o *overflow) take(size int64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for e := o.used.Back(); e != nil && o.bytes+size > o.max; {
		b := e.Value.(*buffer)
		e = e.Prev()
		b.file.mu.Lock()
		if !b.file.isHeld(b.chunk) {
			o.drop(b)
		}
		b.file.mu.Unlock()
	}
	if o.bytes+size > o.max {
		return false
	}
	o.bytes += size
	return true
}

// give returns what take took.
func (o *overflow) give(size int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.bytes -= size
}

// put makes a chunk readable for which take has made room.
func (o *overflow) put(f *File, i int, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := &buffer{file: f, chunk: i, data: data}
	b.at = o.used.PushFront(b)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.memory[i] = b
	f.buffered.Add(1)
}

// use notes that chunks are being read.
func (o *overflow) use(f *File, first, end int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := first; i < end; i++ {
		if b := f.memory[i]; b != nil {
			o.used.MoveToFront(b.at)
		}
	}
}

// remove forgets all chunks of a file.
func (o *overflow) remove(f *File) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range f.memory {
		o.drop(b)
	}
}

// drop forgets a buffer. The caller holds o.mu and its file's.
func (o *overflow) drop(b *buffer) {
	o.used.Remove(b.at)
	o.bytes -= int64(len(b.data))
	delete(b.file.memory, b.chunk)
	b.file.buffered.Add(-1)
}

// size is how many bytes are in memory.
func (o *overflow) size() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.bytes
}
