// SPDX-License-Identifier: Apache-2.0

package stream

import (
	"io"
)

const (
	aheadBuffers = 4
	aheadSize    = 256 << 10
)

// ahead reads in a goroutine of its own, a few buffers ahead of its reader: what
// comes before and what comes after it go on at the same time. It is used by one
// goroutine, which ends it with stop.
type ahead struct {
	full  chan filled   // closed at the end
	empty chan []byte   // never closed
	quit  chan struct{} // closed by stop
	done  chan struct{} // closed when the goroutine has ended
	now   filled        // being read
	at    int
}

type filled struct {
	p   []byte
	err error // that came with it
}

func newAhead(r io.Reader) *ahead {
	a := &ahead{
		full: make(chan filled, aheadBuffers), empty: make(chan []byte, aheadBuffers),
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	for range aheadBuffers {
		a.empty <- nil
	}
	go a.run(r)
	return a
}

func (a *ahead) run(r io.Reader) {
	defer close(a.done)
	defer close(a.full)
	for {
		var p []byte
		select {
		case p = <-a.empty:
		case <-a.quit:
			return
		}
		if p == nil {
			p = make([]byte, aheadSize)
		}
		n, err := fill(r, p, a.quit)
		a.full <- filled{p[:n], err} // there is room for all buffers
		if err != nil {
			return
		}
	}
}

// fill reads until p is full.
func fill(r io.Reader, p []byte, quit <-chan struct{}) (n int, err error) {
	for n < len(p) && err == nil {
		select {
		case <-quit:
			return n, io.ErrClosedPipe
		default:
		}
		var got int
		got, err = r.Read(p[n:])
		n += got
	}
	return n, err
}

func (a *ahead) Read(p []byte) (int, error) {
	for a.at == len(a.now.p) {
		if a.now.err != nil {
			return 0, a.now.err
		}
		if a.now.p != nil {
			a.empty <- a.now.p[:cap(a.now.p)]
		}
		a.at = 0
		var ok bool
		if a.now, ok = <-a.full; !ok {
			a.now.err = io.ErrClosedPipe
		}
	}
	n := copy(p, a.now.p[a.at:])
	a.at += n
	return n, nil
}

// stop ends the goroutine and waits for it, and so for a read that is under way.
func (a *ahead) stop() {
	close(a.quit)
	<-a.done
}
