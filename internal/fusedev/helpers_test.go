// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeDevice serves bytes from memory; wait and read, where set, come first.
type fakeDevice struct {
	data []byte
	held atomic.Int64 // ranges that have been waited for and not released
	wait func(ctx context.Context, off int64, n int) error
	read func(p []byte, off int64) (int, error)
}

func (d *fakeDevice) Size() int64 { return int64(len(d.data)) }

func (d *fakeDevice) Wait(ctx context.Context, off int64, n int) (func(), error) {
	if off < 0 || n <= 0 || off+int64(n) > d.Size() {
		return nil, errors.New("range outside of the device")
	}
	if d.wait != nil {
		if err := d.wait(ctx, off, n); err != nil {
			return nil, err
		}
	}
	d.held.Add(1)
	return func() { d.held.Add(-1) }, nil
}

func (d *fakeDevice) ReadAt(p []byte, off int64) (int, error) {
	if d.held.Load() == 0 {
		return 0, errors.New("read without having waited")
	}
	if d.read != nil {
		return d.read(p, off)
	}
	if n := copy(p, d.data[off:]); n < len(p) {
		return n, io.ErrUnexpectedEOF
	}
	return len(p), nil
}

// blocked returns a wait function that reports each call and then blocks until
// released is closed, or its context ends, whose cause goes to causes.
func blocked(calls chan<- struct{}, released <-chan struct{}, causes chan<- error) func(context.Context, int64, int) error {
	return func(ctx context.Context, _ int64, _ int) error {
		calls <- struct{}{}
		select {
		case <-released:
			return nil
		case <-ctx.Done():
			if causes != nil {
				causes <- context.Cause(ctx)
			}
			return ctx.Err()
		}
	}
}

func randomBytes(n int, seed uint64) []byte {
	p := make([]byte, n)
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = src.Read(p)
	return p
}

func digestOf(p []byte) digest.Digest { return digest.FromBytes(p) }

// testMount mounts, and undoes it at the end whatever has happened: closing the
// descriptor fails requests nobody has answered.
func testMount(t testing.TB) *Conn {
	t.Helper()
	conn, err := Mount(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	closeAtLast(t, conn)
	t.Cleanup(func() {
		if err := conn.Unmount(); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
		}
	})
	return conn
}

// closeAtLast closes a connection at the end of the test, or after a minute: a
// process that waits for its own answer could not even be killed.
func closeAtLast(t testing.TB, conn *Conn) {
	watchdog := time.AfterFunc(time.Minute, func() { _ = conn.Close() })
	t.Cleanup(func() {
		watchdog.Stop()
		if err := conn.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
}

// adopt returns a second connection on the descriptor of the first.
func adopt(t testing.TB, conn *Conn) *Conn {
	t.Helper()
	fd, err := unix.FcntlInt(conn.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Adopt(os.NewFile(uintptr(fd), "inherited"), conn.dir)
	if err != nil {
		t.Fatal(err)
	}
	closeAtLast(t, c)
	return c
}

// run runs the server until the returned function is called, which waits for
// it; the end of the test calls it too.
func run(t testing.TB, s *Server) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := receive(t, done); err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// serve is the usual setting: one running server, ready, with devices.
func serve(t testing.TB, devices ...*fakeDevice) (*Server, func()) {
	t.Helper()
	s := New(testMount(t), slog.New(slog.DiscardHandler))
	for _, d := range devices {
		if err := s.Add(digestOf(d.data), d); err != nil {
			t.Fatal(err)
		}
	}
	s.Ready()
	return s, run(t, s)
}

func receive[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Error("nothing happened for 20 seconds")
		panic("stuck")
	}
}

// readRange reads like a user does, by one pread.
func readRange(path string, off int64, n int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	p := make([]byte, n)
	for {
		n, err = unix.Pread(int(f.Fd()), p, off)
		if !errors.Is(err, unix.EINTR) { // the Go runtime's own signals interrupt, too
			break
		}
	}
	if err != nil {
		return nil, err
	}
	return p[:n], nil
}
