// SPDX-License-Identifier: Apache-2.0

package shape

import (
	"bytes"
	"crypto/sha256"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo sends back what it gets, and closes when the client has.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return l.Addr().String()
}

func start(t *testing.T, line Line) *Proxy {
	t.Helper()
	p, err := Start(echo(t), line)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// roundTrip sends data through the proxy and returns what comes back, and how
// long that took.
func roundTrip(t *testing.T, p *Proxy, data []byte) ([]byte, time.Duration) {
	t.Helper()
	begin := time.Now()
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() {
		_, _ = c.Write(data)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return got, time.Since(begin)
}

func TestBytesArriveWholeAndInOrder(t *testing.T) {
	data := make([]byte, 3<<20+17)
	for i := range data {
		data[i] = byte(i * 7 / 3)
	}
	for name, line := range map[string]Line{
		"free": {}, "delayed": {RTT: 10 * time.Millisecond}, "shaped": {RTT: 10 * time.Millisecond, Rate: 50 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, line)
			got, _ := roundTrip(t, p, data)
			if !bytes.Equal(got, data) {
				t.Errorf("got %d bytes, sha256 %x", len(got), sha256.Sum256(got))
			}
			if p.Down() != int64(len(data)) || p.Up() != int64(len(data)) || p.Connections() != 1 {
				t.Errorf("counted %d down, %d up, %d connections", p.Down(), p.Up(), p.Connections())
			}
		})
	}
}

// A line is never faster than it says; how much slower a busy machine makes it
// is not for a test to judge.
func TestLineIsNotFaster(t *testing.T) {
	p := start(t, Line{RTT: 40 * time.Millisecond})
	if _, took := roundTrip(t, p, []byte("x")); took < 80*time.Millisecond {
		t.Errorf("opening and a round trip of 40 ms took %s", took)
	}
	p = start(t, Line{Rate: 10 << 20})
	if _, took := roundTrip(t, p, make([]byte, 4<<20)); took < 390*time.Millisecond {
		t.Errorf("4 MiB at 10 MiB/s took %s", took)
	}
}

func TestCloseEndsConnections(t *testing.T) {
	p := start(t, Line{RTT: time.Millisecond})
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil {
		t.Logf("reading from a closed proxy: %v", err)
	}
}
