// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"bytes"
	"context"
	_ "crypto/sha512" // for digests of that kind
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func TestReadGrid(t *testing.T) {
	t.Parallel()
	const m = maxRead
	var devices []*fakeDevice
	for i, size := range []int{0, 1, 4095, 4096, 4097, m - 1, m, m + 1, 3*m + 17} {
		devices = append(devices, &fakeDevice{data: randomBytes(size, uint64(i))})
	}
	s, _ := serve(t, devices...)
	for _, d := range devices {
		path := s.Path(digestOf(d.data))
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(whole, d.data) {
			t.Errorf("%d bytes: content differs", len(d.data))
		}
		for _, off := range []int{0, 1, 4095, 4096, m - 1, m, m + 1, len(d.data) - 1, len(d.data), len(d.data) + 1} {
			for _, n := range []int{1, 4095, 4096, 4097, m, m + 1} {
				if off < 0 {
					continue
				}
				got, err := readRange(path, int64(off), n)
				if err != nil {
					t.Fatalf("%d+%d of %d: %v", off, n, len(d.data), err)
				}
				from := min(off, len(d.data))
				if want := d.data[from:min(from+n, len(d.data))]; !bytes.Equal(got, want) {
					t.Errorf("%d+%d of %d: got %d bytes, want %d, or they differ", off, n, len(d.data), len(got), len(want))
				}
			}
		}
	}
}

func TestReadDirectIO(t *testing.T) {
	t.Parallel()
	d := &fakeDevice{data: randomBytes(2*maxRead+100, 1)}
	s, _ := serve(t, d)
	fd, err := unix.Open(s.Path(digestOf(d.data)), unix.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd) //nolint:errcheck // read only
	raw := make([]byte, maxRead+4096)
	skip := -int(uintptr(unsafe.Pointer(&raw[0]))) & 4095
	buf := raw[skip : skip+maxRead]
	for off := 0; off <= len(d.data); off += maxRead / 2 {
		n, err := unix.Pread(fd, buf, int64(off))
		if err != nil {
			t.Fatal(err)
		}
		if want := d.data[off:min(off+len(buf), len(d.data))]; !bytes.Equal(buf[:n], want) {
			t.Errorf("at %d: got %d bytes, want %d, or they differ", off, n, len(want))
		}
	}
}

func TestConcurrentReaders(t *testing.T) {
	t.Parallel()
	devices := []*fakeDevice{{data: randomBytes(5<<20+1, 1)}, {data: randomBytes(3<<20, 2)}}
	s, _ := serve(t, devices...)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			d := devices[i%2]
			for j := range 20 {
				off := (i*7919 + j*104729) % len(d.data)
				n := min(1+(i*j*4099)%maxRead, len(d.data)-off)
				got, err := readRange(s.Path(digestOf(d.data)), int64(off), n)
				if err != nil || !bytes.Equal(got, d.data[off:off+n]) {
					t.Errorf("%d+%d: got %d bytes, %v", off, n, len(got), err)
				}
			}
		})
	}
	wg.Wait()
}

func TestDirectory(t *testing.T) {
	t.Parallel()
	s, _ := serve(t)
	dir := s.conn.dir
	want := []string{}
	for i := range 150 { // more than fit into one READDIR
		p := randomBytes(i, uint64(i))
		d := digest.SHA256.FromBytes(p)
		if i%2 == 1 {
			d = digest.SHA512.FromBytes(p)
		}
		if err := s.Add(d, &fakeDevice{data: p}); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(s.Path(d))
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() != int64(i) || info.Mode() != 0o400 {
			t.Errorf("%s: mode %v, %d bytes", info.Name(), info.Mode(), info.Size())
		}
		want = append(want, d.Encoded())
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
		if !e.Type().IsRegular() {
			t.Errorf("%s: type %v", e.Name(), e.Type())
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("listing (-want +got):\n%s", diff)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Files != 150 {
		t.Errorf("statfs: %d files, %v", st.Files, err)
	}
	upper := string(bytes.ToUpper([]byte(want[0])))
	for _, name := range []string{"x", upper, want[0] + "00", want[0][:62], digestOf([]byte("other")).Encoded()} {
		if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("stat %s: %v", name, err)
		}
	}
	for name, err := range map[string]error{
		"open for writing": func() error { _, err := os.OpenFile(filepath.Join(dir, want[0]), os.O_RDWR, 0); return err }(),
		"create":           os.WriteFile(filepath.Join(dir, "new"), nil, 0o600),
		"remove":           os.Remove(filepath.Join(dir, want[0])),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAdd(t *testing.T) {
	t.Parallel()
	s := New(testMount(t), slog.New(slog.DiscardHandler))
	d := digest.Digest("sha256:" + "00112233445566778899aabbccddeeff" + "00112233445566778899aabbccddeeff")
	twin := digest.Digest("sha256:" + "00112233445566778899aabbccddeeff" + "ff112233445566778899aabbccddeeff")
	if err := s.Add(d, &fakeDevice{}); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []digest.Digest{d, twin, "", "sha256:", "sha256:zz", "md5:00", "x", digest.Digest(d.Encoded())} {
		if err := s.Add(bad, &fakeDevice{}); err == nil {
			t.Errorf("Add(%q) succeeded", bad)
		}
		_ = s.Path(bad)
	}
	s.Remove(twin)
	s.Remove("x")
	s.Remove(d)
	if err := s.Add(twin, &fakeDevice{}); err != nil {
		t.Errorf("after Remove: %v", err)
	}
}

func TestDeviceErrors(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	waitErr := func(err error) func(context.Context, int64, int) error {
		return func(context.Context, int64, int) error { return err }
	}
	data := randomBytes(10000, 1)
	for _, c := range []struct {
		name string
		dev  *fakeDevice
		want error
	}{
		{"wait fails", &fakeDevice{wait: waitErr(boom)}, unix.EIO},
		{"wait fails with an errno", &fakeDevice{wait: waitErr(unix.ENOENT)}, unix.EIO},
		{"wait is cancelled by itself", &fakeDevice{wait: waitErr(context.Canceled)}, unix.EIO},
		{"read fails", &fakeDevice{read: func([]byte, int64) (int, error) { return 0, boom }}, unix.EIO},
		{"read fails late", &fakeDevice{read: func(p []byte, _ int64) (int, error) { return len(p) - 1, boom }}, unix.EIO},
		{"short without an error", &fakeDevice{read: func(p []byte, _ int64) (int, error) { return len(p) - 1, nil }}, unix.EIO},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.dev.data = data
			s, _ := serve(t, c.dev)
			_, err := readRange(s.Path(digestOf(data)), 0, len(data))
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if n := c.dev.held.Load(); n != 0 {
				t.Errorf("%d ranges are still held", n)
			}
		})
	}
}

func TestInterrupt(t *testing.T) {
	t.Parallel()
	calls, causes := make(chan struct{}, 1), make(chan error, 1)
	d := &fakeDevice{data: randomBytes(4096, 1), wait: blocked(calls, nil, causes)}
	s, _ := serve(t, d)
	kill := startReader(t, s.Path(digestOf(d.data)))
	receive(t, calls)
	kill()
	if err := receive(t, causes); !errors.Is(err, errInterrupted) {
		t.Errorf("the device's wait ended with %v", err)
	}
}

func TestRemoveDuringReads(t *testing.T) {
	t.Parallel()
	calls := make(chan struct{}, 10)
	d := &fakeDevice{data: randomBytes(10000, 1), wait: blocked(calls, nil, nil)}
	s, _ := serve(t, d)
	path, id := s.Path(digestOf(d.data)), digestOf(d.data)
	open, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close() //nolint:errcheck // read only
	errs := make(chan error, 10)
	for range 10 {
		go func() {
			_, err := readRange(path, 0, 4096)
			errs <- err
		}()
	}
	for range 10 {
		receive(t, calls)
	}
	s.Remove(id)
	for range 10 {
		if err := receive(t, errs); !errors.Is(err, unix.EIO) {
			t.Errorf("a read of a removed device: %v", err)
		}
	}
	if _, err := open.ReadAt(make([]byte, 1), 0); !errors.Is(err, unix.EIO) {
		t.Errorf("a later read: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("stat after Remove: %v", err)
	}
	if _, err := os.Open(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open after Remove: %v", err)
	}
	// The same name may come back, with another size.
	other := &fakeDevice{data: randomBytes(20000, 2)}
	if err := s.Add(id, other); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, other.data) {
		t.Errorf("after adding it again: %d bytes, %v", len(got), err)
	}
}

// TestBlockedReadsHoldNoBuffers is what bounds the memory of the daemon.
func TestBlockedReadsHoldNoBuffers(t *testing.T) {
	t.Parallel()
	const readers = 60
	calls, released := make(chan struct{}, readers), make(chan struct{})
	slow := &fakeDevice{data: randomBytes(maxRead, 1), wait: blocked(calls, released, nil)}
	quick := &fakeDevice{data: randomBytes(maxRead, 2)}
	s, _ := serve(t, slow, quick)
	errs := make(chan error, readers)
	for range readers {
		go func() {
			got, err := readRange(s.Path(digestOf(slow.data)), 0, maxRead)
			if err == nil && !bytes.Equal(got, slow.data) {
				err = errors.New("content differs")
			}
			errs <- err
		}()
	}
	for range readers {
		receive(t, calls)
	}
	for range maxBuffers {
		if buf := <-s.buffers; buf != nil {
			t.Error("a buffer was used")
		}
		s.buffers <- nil
	}
	if got, err := os.ReadFile(s.Path(digestOf(quick.data))); err != nil || !bytes.Equal(got, quick.data) {
		t.Errorf("a device that need not wait: %d bytes, %v", len(got), err)
	}
	close(released)
	for range readers {
		if err := receive(t, errs); err != nil {
			t.Error(err)
		}
	}
}
