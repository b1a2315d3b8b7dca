// SPDX-License-Identifier: Apache-2.0

// Package layertest gives tests what layers are mounted with: a FUSE server for
// their devices and a mounter that works on this machine. It needs root.
//
// It is for tests only and imports testing; production code must not import it.
package layertest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/fusedev"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/mount"
)

// Exporter serves devices through FUSE: it is a layer.Exporter.
type Exporter struct{ server *fusedev.Server }

// Export serves a device as a file.
func (e *Exporter) Export(d digest.Digest, dev *device.Device) (string, error) {
	if err := e.server.Add(d, dev); err != nil {
		return "", err
	}
	return e.server.Path(d), nil
}

// Blobs is the exporter for blobs: it is a lazyblob.Exporter.
type Blobs struct{ *Exporter }

// Export serves a device as a file.
func (b Blobs) Export(d digest.Digest, dev lazyblob.Device) error { return b.server.Add(d, dev) }

// Path is where that file is.
func (b Blobs) Path(d digest.Digest) string { return b.server.Path(d) }

// Withdraw ends it.
func (e *Exporter) Withdraw(d digest.Digest) { e.server.Remove(d) }

// Start mounts a FUSE directory below dir, serves it, and finds out how to mount
// layers. At the end of the test all is undone; close what uses it before, by a
// later t.Cleanup.
func Start(t testing.TB, dir string) (*mount.Mounter, *Exporter) {
	t.Helper()
	e := Serve(t, Hold(t, dir), dir)
	return e.Probe(t, dir), e
}

// Hold mounts a FUSE directory below dir for [Serve], until the end of the test.
// It outlives those who serve it.
func Hold(t testing.TB, dir string) *fusedev.Held {
	t.Helper()
	devices := filepath.Join(dir, devicesName)
	if err := os.MkdirAll(devices, 0o700); err != nil {
		t.Fatal(err)
	}
	conn, err := fusedev.Mount(devices)
	if err != nil {
		t.Fatal(err)
	}
	held, err := conn.Hold()
	if err != nil {
		t.Fatal(err)
	}
	// A process that waits for its own answer could not even be killed.
	watchdog := time.AfterFunc(2*time.Minute, func() { _ = held.Unmount() })
	t.Cleanup(func() {
		watchdog.Stop()
		if err := errors.Join(held.Unmount(), held.Close()); err != nil {
			t.Error(err)
		}
	})
	return held
}

// Serve serves what [Hold] has mounted below dir, from where another process may
// have left it, until the end of the test.
func Serve(t testing.TB, held *fusedev.Held, dir string) *Exporter {
	t.Helper()
	f, err := held.File()
	if err != nil {
		t.Fatal(err)
	}
	return ServeFile(t, f, dir)
}

// ServeFile is [Serve] with the descriptor that another process holds, which it
// takes over.
func ServeFile(t testing.TB, f *os.File, dir string) *Exporter {
	t.Helper()
	conn, err := fusedev.Adopt(f, filepath.Join(dir, devicesName))
	if err != nil {
		t.Fatal(err)
	}
	server := fusedev.New(conn, slog.New(slog.DiscardHandler))
	if err := server.Resend(); err != nil && !errors.Is(err, fusedev.ErrNoResend) {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-done, conn.Close()); err != nil {
			t.Error(err)
		}
	})
	server.Ready()
	return &Exporter{server}
}

// Probe finds out how layers below dir are mounted on this machine.
func (e *Exporter) Probe(t testing.TB, dir string) *mount.Mounter {
	t.Helper()
	name := digest.FromString("probe")
	if err := e.server.Add(name, zeros{}); err != nil {
		t.Fatal(err)
	}
	defer e.server.Remove(name)
	m, err := mount.Probe(context.Background(), dir, e.server.Path(name), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// devicesName is the FUSE directory.
const devicesName = "devices"

type zeros struct{}

func (zeros) Size() int64                                      { return 16 * index.BlockSize }
func (zeros) Wait(context.Context, int64, int) (func(), error) { return func() {}, nil }
func (zeros) ReadAt(p []byte, _ int64) (int, error)            { clear(p); return len(p), nil }

// Compare reports how the regular files of a layer's tree differ from the tar
// that it was made of; "" if they do not.
func Compare(tree string, plain []byte) string {
	n := 0
	for tr := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err.Error()
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		want, err := io.ReadAll(tr)
		if err != nil {
			return err.Error()
		}
		got, err := os.ReadFile(filepath.Join(tree, h.Name))
		if err != nil {
			return err.Error()
		}
		if !bytes.Equal(got, want) {
			return fmt.Sprintf("%s has other content", h.Name)
		}
		n++
	}
	if n == 0 {
		return "the tar has no files to compare"
	}
	return ""
}

// UnmountAll undoes whatever is mounted below a directory.
func UnmountAll(t testing.TB, dir string) {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(table), "\n")
	slices.Reverse(lines) // what lies on top first
	for _, line := range lines {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil {
				t.Errorf("unmounting %s: %v", f[4], err)
			}
		}
	}
}

// Mounted reports whether something is mounted at a directory.
func Mounted(t testing.TB, dir string) bool {
	t.Helper()
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	if errors.Is(err, unix.ENOENT) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	return st.Type == unix.EROFS_SUPER_MAGIC_V1
}
