// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"io"
	"sync"
)

// maxBehind is how many writes may be on their way: at most 256 KiB each, see
// package stream.
const maxBehind = 8

// behind writes in another goroutine, one write after the other: verifying and
// storing goes on beside fetching and decompressing. It is used by one goroutine.
type behind struct {
	out     io.WriterAt
	pieces  chan piece
	spare   sync.Pool // of *[]byte
	stopped chan struct{}
	err     error // of out; set before failed is closed
	failed  chan struct{}
}

type piece struct {
	p   *[]byte
	off int64
}

func newBehind(out io.WriterAt) *behind {
	b := &behind{
		out: out, pieces: make(chan piece, maxBehind), stopped: make(chan struct{}), failed: make(chan struct{}),
		spare: sync.Pool{New: func() any { return new([]byte) }},
	}
	go b.run()
	return b
}

func (b *behind) run() {
	defer close(b.stopped)
	for w := range b.pieces {
		if b.err == nil {
			if _, b.err = b.out.WriteAt(*w.p, w.off); b.err != nil {
				close(b.failed)
			}
		}
		b.spare.Put(w.p)
	}
}

// WriteAt has p written, or returns the error of an earlier write.
func (b *behind) WriteAt(p []byte, off int64) (int, error) {
	buf := b.spare.Get().(*[]byte)
	*buf = append((*buf)[:0], p...)
	select {
	case b.pieces <- piece{buf, off}:
		return len(p), nil
	case <-b.failed:
		return 0, b.err
	}
}

// close waits until all has been written.
func (b *behind) close() error {
	close(b.pieces)
	<-b.stopped
	return b.err
}
