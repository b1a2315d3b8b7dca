// SPDX-License-Identifier: Apache-2.0

// Package shape imitates a line between a client and a server on one machine: a
// TCP proxy with a round trip time and a rate. It is for the demo, the bench and
// tests.
package shape

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Line is what a line is like.
type Line struct {
	// RTT is the round trip time; half of it passes in each direction. Opening a
	// connection takes one more.
	RTT time.Duration
	// Rate is how many bytes a second come down, all connections together; 0
	// means as many as the machine can move. What goes up is not limited.
	Rate int64
}

const (
	segment = 64 << 10  // bytes moved at a time
	slack   = 128 << 10 // bytes a connection may queue beyond what the line holds
	free    = 4 << 20   // and if the rate is not limited

	// backlog is how far the line may be promised ahead by one connection: enough
	// to keep it busy while goroutines wake up late, and little, or a few greedy
	// connections would make all others wait behind what they have queued.
	backlog = 2 * time.Millisecond
)

// Proxy is a running proxy.
type Proxy struct {
	line     Line
	target   string
	listener net.Listener
	ctx      context.Context
	cancel   context.CancelFunc
	active   sync.WaitGroup

	down, up, conns atomic.Int64

	mu    sync.Mutex // protects the field below
	clear time.Time  // when all that has been put on the line has left it
}

// Start starts a proxy to target, host:port, on a free port of 127.0.0.1. The
// caller closes it.
func Start(target string, line Line) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("starting line to %s: %w", target, err)
	}
	p := &Proxy{line: line, target: target, listener: l}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.active.Go(p.accept)
	return p, nil
}

// Addr is where clients connect to, host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Down is how many bytes have come from the target.
func (p *Proxy) Down() int64 { return p.down.Load() }

// Up is how many bytes have gone to the target.
func (p *Proxy) Up() int64 { return p.up.Load() }

// Connections is how many connections there have been.
func (p *Proxy) Connections() int64 { return p.conns.Load() }

// Close ends all connections and waits for that.
func (p *Proxy) Close() error {
	p.cancel()
	err := p.listener.Close()
	p.active.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (p *Proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.conns.Add(1)
		p.active.Go(func() { p.serve(c) })
	}
}

// serve moves bytes both ways until both sides have ended or one has broken.
func (p *Proxy) serve(client net.Conn) {
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		_ = client.Close() // that tells the client
		return
	}
	closeBoth := sync.OnceFunc(func() {
		_ = client.Close() // either may be gone already
		_ = server.Close()
	})
	defer closeBoth()
	stop := context.AfterFunc(p.ctx, closeBoth)
	defer stop()

	open := time.Now().Add(p.line.RTT)
	var both sync.WaitGroup
	both.Go(func() {
		p.pump(server, client, &p.up, closeBoth, func(time.Time, int) time.Time {
			return later(time.Now(), open)
		})
	})
	both.Go(func() { p.pump(client, server, &p.down, closeBoth, p.reserve) })
	both.Wait()
}

// reserve puts n bytes on the line behind what is on it and returns when the
// last of them has left it.
func (p *Proxy) reserve(now time.Time, n int) time.Time {
	if p.line.Rate == 0 {
		return now
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear = later(p.clear, now).Add(time.Duration(float64(n) / float64(p.line.Rate) * float64(time.Second)))
	return p.clear
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// parcel is bytes on their way, with the time at which they arrive. One without
// bytes is the end of the stream.
type parcel struct {
	buf *[segment]byte
	n   int
	due time.Time
}

var buffers = sync.Pool{New: func() any { return new([segment]byte) }}

// pump moves what src sends to dst, half a round trip after schedule says.
func (p *Proxy) pump(dst, src net.Conn, count *atomic.Int64, closeBoth func(), schedule func(time.Time, int) time.Time) {
	room := int64(free)
	if p.line.Rate > 0 {
		room = int64(p.line.RTT.Seconds()/2*float64(p.line.Rate)) + slack
	}
	queue := make(chan parcel, room/segment+1)
	var writer sync.WaitGroup
	writer.Go(func() {
		if err := deliver(dst, queue); err != nil {
			closeBoth()
			for q := range queue { // the reader must not block
				release(q)
			}
		}
	})
	for {
		buf := buffers.Get().(*[segment]byte)
		n, err := src.Read(buf[:])
		if n > 0 {
			count.Add(int64(n))
			left := schedule(time.Now(), n)
			queue <- parcel{buf, n, left.Add(p.line.RTT / 2)}
			p.pause(time.Until(left) - backlog)
		} else {
			buffers.Put(buf)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				closeBoth()
			}
			queue <- parcel{due: schedule(time.Now(), 0).Add(p.line.RTT / 2)}
			break
		}
	}
	close(queue)
	writer.Wait()
}

// pause waits for d, or for Close.
func (p *Proxy) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	select {
	case <-time.After(d):
	case <-p.ctx.Done():
	}
}

// deliver writes parcels when they are due.
func deliver(dst net.Conn, queue <-chan parcel) error {
	for q := range queue {
		if wait := time.Until(q.due); wait > 0 {
			time.Sleep(wait) // at most the queue's length; Close waits for it
		}
		if q.n == 0 {
			if c, ok := dst.(*net.TCPConn); ok {
				return c.CloseWrite()
			}
			return nil
		}
		_, err := dst.Write(q.buf[:q.n])
		release(q)
		if err != nil {
			return err
		}
	}
	return nil
}

func release(q parcel) {
	if q.buf != nil {
		buffers.Put(q.buf)
	}
}
