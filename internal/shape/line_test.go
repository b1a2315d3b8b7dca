// SPDX-License-Identifier: Apache-2.0

package shape

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

func TestReserve(t *testing.T) {
	t.Parallel()
	p := &Proxy{line: Line{Rate: 1000}}
	t0 := time.Now()
	for _, c := range []struct {
		at   time.Duration
		n    int
		want time.Duration
	}{
		{0, 100, 100 * time.Millisecond},
		{0, 50, 150 * time.Millisecond},                       // behind the first
		{100 * time.Millisecond, 50, 200 * time.Millisecond},  // the line is still busy
		{time.Second, 100, 1100 * time.Millisecond},           // idle time is not saved up
		{1050 * time.Millisecond, 0, 1100 * time.Millisecond}, // an end goes behind all bytes
	} {
		if got := p.reserve(t0.Add(c.at), c.n).Sub(t0); got != c.want {
			t.Errorf("%d bytes at %s leave the line at %s, want %s", c.n, c.at, got, c.want)
		}
	}
}

// TestGreedyConnectionsQueueLittle: what a few bulk transfers have promised the
// line stays small, or all others would wait behind it. A slow machine can only
// make it smaller.
func TestGreedyConnectionsQueueLittle(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var servers sync.WaitGroup
	servers.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			servers.Go(func() {
				defer c.Close() //nolint:errcheck // the client has gone
				for b := make([]byte, 1<<20); err == nil; {
					_, err = c.Write(b)
				}
			})
		}
	})
	const (
		connections = 4
		rate        = 8 << 20
		limit       = 2 * connections * time.Second * segment / rate
	)
	// The delay alone would let each connection queue 200 ms.
	p, err := Start(l.Addr().String(), Line{RTT: 400 * time.Millisecond, Rate: rate})
	if err != nil {
		t.Fatal(err)
	}
	var clients sync.WaitGroup
	for range connections {
		clients.Go(func() {
			c, err := net.Dial("tcp", p.Addr())
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.Copy(io.Discard, c) // until Close
			_ = c.Close()
		})
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for p.Down() < 4<<20 {
		p.mu.Lock()
		ahead := time.Until(p.clear)
		p.mu.Unlock()
		if ahead > limit {
			t.Errorf("the line is promised %s ahead, the limit is %s", ahead, limit)
			break
		}
		<-tick.C
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	clients.Wait()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	servers.Wait()
}
