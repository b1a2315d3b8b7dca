// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// isMounted tells by the device number, which asks no server: the root of a
// mount is in the kernel's memory.
func isMounted(t *testing.T, dir string) bool {
	t.Helper()
	var at, above unix.Statx_t
	for path, st := range map[string]*unix.Statx_t{dir: &at, filepath.Dir(dir): &above} {
		if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, st); err != nil {
			t.Fatal(err)
		}
	}
	return at.Dev_minor != above.Dev_minor || at.Dev_major != above.Dev_major
}

func TestRunEndsWithItsContext(t *testing.T) {
	t.Parallel()
	s, stop := serve(t)
	stop()
	if !isMounted(t, s.conn.dir) {
		t.Error("the mount is gone")
	}
	run(t, s)
	if _, err := os.ReadDir(s.conn.dir); err != nil {
		t.Errorf("after a second Run: %v", err)
	}
}

func TestRunEndsWithItsMount(t *testing.T) {
	t.Parallel()
	d := &fakeDevice{data: []byte("data")}
	conn := testMount(t)
	s := New(conn, slog.New(slog.DiscardHandler))
	if err := s.Add(digestOf(d.data), d); err != nil {
		t.Fatal(err)
	}
	s.Ready()
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	f, err := os.Open(s.Path(digestOf(d.data)))
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Unmount(); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(make([]byte, 4), 0); n != 4 {
		t.Errorf("a file still open reads %d bytes, %v", n, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, done); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestMountReplacesDeadMount(t *testing.T) {
	t.Parallel()
	conn := testMount(t)
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Mount(conn.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again.Unmount(), again.Close()); err != nil {
		t.Error(err)
	}
	if isMounted(t, conn.dir) {
		t.Error("a mount is left over")
	}
}

func TestMountFails(t *testing.T) {
	t.Parallel()
	if _, err := Mount(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// TestUnknownNodesWaitForReady: a new server may be asked about files that it
// has not opened yet.
func TestUnknownNodesWaitForReady(t *testing.T) {
	t.Parallel()
	s := New(testMount(t), slog.New(slog.DiscardHandler))
	run(t, s)
	late, never := randomBytes(5000, 1), digestOf([]byte("never"))
	type result struct {
		data []byte
		err  error
	}
	found, missing, listed := make(chan result, 1), make(chan error, 1), make(chan int, 1)
	go func() {
		p, err := os.ReadFile(s.Path(digestOf(late)))
		found <- result{p, err}
	}()
	go func() {
		_, err := os.Stat(s.Path(never))
		missing <- err
	}()
	go func() {
		entries, _ := os.ReadDir(s.conn.dir)
		listed <- len(entries)
	}()
	if err := s.Add(digestOf(late), &fakeDevice{data: late}); err != nil {
		t.Fatal(err)
	}
	if r := receive(t, found); r.err != nil || !bytes.Equal(r.data, late) {
		t.Errorf("%d bytes, %v", len(r.data), r.err)
	}
	select {
	case err := <-missing:
		t.Errorf("an unknown name was answered early: %v", err)
	case <-listed:
		t.Error("an incomplete listing was given")
	default:
	}
	s.Ready()
	if err := receive(t, missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Ready: %v", err)
	}
	if n := receive(t, listed); n != 1 {
		t.Errorf("%d files listed", n)
	}
}

// TestHandOver stops a server while reads wait in it, and has a second one, on
// an inherited descriptor, answer them.
func TestHandOver(t *testing.T) {
	t.Parallel()
	const readers = 20
	calls, data := make(chan struct{}, readers), randomBytes(3<<20, 1)
	first, stop := serve(t, &fakeDevice{data: data, wait: blocked(calls, nil, nil)})
	path := first.Path(digestOf(data))
	errs := make(chan error, readers)
	for i := range readers {
		go func() {
			got, err := readRange(path, int64(i)<<16, 1<<20)
			if err == nil && !bytes.Equal(got, data[i<<16:i<<16+1<<20]) {
				err = errors.New("content differs")
			}
			errs <- err
		}()
	}
	for range readers {
		receive(t, calls)
	}
	stop()

	second := New(adopt(t, first.conn), slog.New(slog.DiscardHandler))
	if err := second.Resend(); err != nil {
		t.Fatal(err)
	}
	run(t, second)
	if err := second.Add(digestOf(data), &fakeDevice{data: data}); err != nil {
		t.Fatal(err)
	}
	second.Ready()
	for range readers {
		if err := receive(t, errs); err != nil {
			t.Error(err)
		}
	}
}

// TestStopWithoutResend: where nobody could answer later, readers get an error
// rather than wait for ever, and those that can be answered in time are.
func TestStopWithoutResend(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		drain time.Duration
		want  error
	}{
		{"too slow", 0, unix.EIO},
		{"in time", time.Hour, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			calls, released := make(chan struct{}, 1), make(chan struct{})
			d := &fakeDevice{data: randomBytes(4096, 1), wait: blocked(calls, released, nil)}
			s, stop := serve(t, d)
			s.conn.resend.Store(false)
			s.drain = c.drain
			errs := make(chan error, 1)
			go func() {
				_, err := readRange(s.Path(digestOf(d.data)), 0, 4096)
				errs <- err
			}()
			receive(t, calls)
			if c.want == nil {
				close(released)
			}
			stop()
			if err := receive(t, errs); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

// TestInterruptAfterResend: the id of a repeated request differs by one bit.
func TestInterruptAfterResend(t *testing.T) {
	t.Parallel()
	calls, causes := make(chan struct{}, 2), make(chan error, 2)
	d := &fakeDevice{data: randomBytes(4096, 1), wait: blocked(calls, nil, causes)}
	first, stop := serve(t, d)
	kill := startReader(t, first.Path(digestOf(d.data)))
	receive(t, calls)
	stop()
	if err := receive(t, causes); !errors.Is(err, errAbandoned) {
		t.Errorf("the first wait ended with %v", err)
	}
	second := New(adopt(t, first.conn), slog.New(slog.DiscardHandler))
	if err := errors.Join(second.Add(digestOf(d.data), d), second.Resend()); err != nil {
		t.Fatal(err)
	}
	second.Ready()
	run(t, second)
	receive(t, calls)
	kill()
	if err := receive(t, causes); !errors.Is(err, errInterrupted) {
		t.Errorf("the second wait ended with %v", err)
	}
}

// TestResendToTheSameServer: the copy that waits is given up for the new one.
func TestResendToTheSameServer(t *testing.T) {
	t.Parallel()
	calls, causes, released := make(chan struct{}, 2), make(chan error, 2), make(chan struct{})
	d := &fakeDevice{data: randomBytes(4096, 1), wait: blocked(calls, released, causes)}
	s, _ := serve(t, d)
	got := make(chan []byte, 1)
	go func() {
		p, err := readRange(s.Path(digestOf(d.data)), 0, 4096)
		if err != nil {
			t.Error(err)
		}
		got <- p
	}()
	receive(t, calls)
	if err := s.Resend(); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, causes); !errors.Is(err, errAbandoned) {
		t.Errorf("the first copy ended with %v", err)
	}
	receive(t, calls)
	close(released)
	if p := receive(t, got); !bytes.Equal(p, d.data) {
		t.Error("content differs")
	}
}

// TestRestartsUnderLoad replaces the server again and again under readers.
func TestRestartsUnderLoad(t *testing.T) {
	t.Parallel()
	data := randomBytes(4<<20+123, 1)
	conn := testMount(t)
	path := filepath.Join(conn.dir, digestOf(data).Encoded())
	ctx, cancel := context.WithCancel(context.Background())
	var readers sync.WaitGroup
	start := func() func() {
		s := New(adopt(t, conn), slog.New(slog.DiscardHandler))
		if err := s.Resend(); err != nil {
			t.Fatal(err)
		}
		stop := run(t, s)
		if err := s.Add(digestOf(data), &fakeDevice{data: data}); err != nil {
			t.Fatal(err)
		}
		s.Ready()
		return stop
	}
	reads := make(chan struct{}, 8)
	for range 8 {
		readers.Go(func() {
			for ctx.Err() == nil {
				got, err := os.ReadFile(path)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
					return
				}
				select {
				case reads <- struct{}{}:
				default:
				}
			}
		})
	}
	for range 30 {
		stop := start()
		receive(t, reads)
		stop()
	}
	stop := start()
	cancel()
	readers.Wait()
	stop()
}
