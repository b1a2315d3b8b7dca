// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func forEachMethod(t *testing.T, f func(t *testing.T, m *Mounter)) {
	t.Helper()
	for _, method := range []Method{File, Loop} {
		t.Run(string(method), func(t *testing.T) {
			f(t, New(method, slog.New(slog.DiscardHandler)))
			noLoops(t, t.TempDir())
		})
	}
}

// newImage makes an image and its device in a directory, and a mount point.
func newImage(t *testing.T) (image, device, target string) {
	t.Helper()
	tr := trial{dir: t.TempDir()}
	if err := tr.build(t.Context()); err != nil {
		t.Fatal(err)
	}
	return tr.path("image"), tr.device, tr.path("layer")
}

// noLoops fails if a loop device holds a file below the test's directories.
func noLoops(t *testing.T, dir string) {
	t.Helper()
	root := filepath.Dir(dir) // shared by all TempDirs of a test
	deadline := time.Now().Add(10 * time.Second)
	for {
		held := loopsOf(t, root)
		if len(held) == 0 {
			return
		}
		// The kernel frees a loop device shortly after its last user has left.
		if time.Now().After(deadline) {
			t.Fatalf("loop devices still hold %v", held)
		}
		time.Sleep(time.Millisecond)
	}
}

func loopsOf(t *testing.T, root string) (held []string) {
	t.Helper()
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		backing, err := os.ReadFile(name)
		if err == nil && strings.HasPrefix(string(backing), root+"/") {
			held = append(held, name+" "+strings.TrimSpace(string(backing)))
		}
	}
	return held
}

func wantMounted(t *testing.T, target string, want bool) {
	t.Helper()
	if got, err := Mounted(target); err != nil || got != want {
		t.Errorf("Mounted(%s) = %t, %v; want %t", target, got, err, want)
	}
}

func TestMountAndUnmount(t *testing.T) {
	forEachMethod(t, func(t *testing.T, m *Mounter) {
		image, device, target := newImage(t)
		ctx := t.Context()
		wantMounted(t, target, false)
		if err := Check(ctx, target); !errors.Is(err, unix.ENOENT) {
			t.Errorf("Check of an empty directory: %v", err)
		}
		for range 2 { // a place can be used again
			if err := m.Mount(ctx, image, device, target); err != nil {
				t.Fatal(err)
			}
			wantMounted(t, target, true)
			wantMounted(t, filepath.Join(target, "diff"), false)
			if err := Check(ctx, target); err != nil {
				t.Error(err)
			}
			if err := m.Mount(ctx, image, device, target); !errors.Is(err, unix.EBUSY) {
				t.Errorf("second mount: %v, want EBUSY", err)
			}
			got, err := os.ReadFile(filepath.Join(target, "diff/file"))
			want, _ := os.ReadFile(device)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("content differs (%v)", err)
			}
			wantFlags(t, target)
			for range 2 { // what is done stays done
				if err := Unmount(target, false); err != nil {
					t.Fatal(err)
				}
				wantMounted(t, target, false)
			}
			noLoops(t, target)
		}
	})
}

// wantFlags checks that a mount lets containers have what they need.
func wantFlags(t *testing.T, target string) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(target, &st); err != nil {
		t.Fatal(err)
	}
	for flag, want := range map[int64]bool{
		unix.ST_RDONLY: true, unix.ST_NOATIME: true, unix.ST_NOSUID: false, unix.ST_NODEV: false, unix.ST_NOEXEC: false,
	} {
		if got := st.Flags&flag != 0; got != want {
			t.Errorf("mount flag %#x is %t, want %t", flag, got, want)
		}
	}
}

func TestUnmountInUse(t *testing.T) {
	forEachMethod(t, func(t *testing.T, m *Mounter) {
		image, device, target := newImage(t)
		if err := m.Mount(t.Context(), image, device, target); err != nil {
			t.Fatal(err)
		}
		user, err := os.Open(filepath.Join(target, "diff/file"))
		if err != nil {
			t.Fatal(err)
		}
		if err := Unmount(target, false); !errors.Is(err, unix.EBUSY) {
			t.Errorf("got %v, want EBUSY", err)
		}
		wantMounted(t, target, true)
		if err := Unmount(target, true); err != nil {
			t.Error(err)
		}
		wantMounted(t, target, false)
		if _, err := user.ReadAt(make([]byte, 10), 100); err != nil {
			t.Errorf("the user of a detached mount: %v", err)
		}
		if err := user.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestForeign leaves alone what is not a mount of an image.
func TestForeign(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tmpfs := t.TempDir()
	if err := unix.Mount("tmpfs", tmpfs, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(tmpfs, 0); err != nil {
			t.Errorf("the foreign mount is gone: %v", err)
		}
	})
	link := filepath.Join(dir, "link")
	if err := os.Symlink(tmpfs, link); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{dir, file, tmpfs, link, filepath.Join(dir, "none"), filepath.Join(file, "below")} {
		wantMounted(t, target, false)
		for _, lazy := range []bool{false, true} {
			if err := Unmount(target, lazy); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestFailedMount leaves nothing behind.
func TestFailedMount(t *testing.T) {
	forEachMethod(t, func(t *testing.T, m *Mounter) {
		image, device, target := newImage(t)
		garbage := filepath.Join(t.TempDir(), "garbage")
		if err := os.WriteFile(garbage, make([]byte, 1<<16), 0o600); err != nil {
			t.Fatal(err)
		}
		short := filepath.Join(t.TempDir(), "short")
		if err := os.WriteFile(short, make([]byte, 4095), 0o600); err != nil {
			t.Fatal(err)
		}
		bare := filepath.Join(t.TempDir(), "bare")
		f, err := os.Create(bare)
		if err != nil {
			t.Fatal(err)
		}
		idx := trialIndex()
		idx.DeviceSize, idx.Inodes[1].Size = 0, 0
		if err := errors.Join(erofs.Write(f, idx, "layer"), f.Close()); err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string][3]string{
			"device not needed": {bare, device, target},
			"no image":          {image + "x", device, target},
			"not an image":      {garbage, device, target},
			"directory":         {target, device, target},
			"no device":         {image, device + "x", target},
			"device not given":  {image, "", target},
			"short device":      {image, short, target},
			"no target":         {image, device, target + "x"},
			"target is a file":  {image, device, image},
			"name is too long":  {image + strings.Repeat("/", 256), device, target},
			"device is missing": {image, target, target},
		} {
			err := m.Mount(t.Context(), c[0], c[1], c[2])
			if err == nil {
				t.Errorf("%s: mounted", name)
				continue
			}
			if text := err.Error(); strings.Contains(text, "\n") || !strings.Contains(text, c[0]) {
				t.Errorf("%s: message %q", name, text)
			}
			wantMounted(t, target, false)
			noLoops(t, filepath.Dir(image))
		}
	})
}

func TestReadAhead(t *testing.T) {
	forEachMethod(t, func(t *testing.T, m *Mounter) {
		const want = "1236\n"
		m.ReadAheadKB = 1236
		image, device, target := newImage(t)
		before := erofsBDIs()
		if err := m.Mount(t.Context(), image, device, target); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := Unmount(target, false); err != nil {
				t.Error(err)
			}
		}()
		names := slices.DeleteFunc(erofsBDIs(), func(name string) bool { return slices.Contains(before, name) })
		if m.Method() == Loop {
			var st unix.Stat_t
			if err := unix.Stat(target, &st); err != nil {
				t.Fatal(err)
			}
			names = []string{fmt.Sprintf("/sys/class/bdi/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))}
		}
		ok := false
		for _, name := range names {
			got, err := os.ReadFile(filepath.Join(name, "read_ahead_kb"))
			ok = ok || err == nil && string(got) == want
		}
		if !ok {
			t.Errorf("none of %v reads %q ahead", names, want)
		}
	})
}

func TestConcurrentMounts(t *testing.T) {
	forEachMethod(t, func(t *testing.T, m *Mounter) {
		m.ReadAheadKB = 512
		image, device, target := newImage(t)
		var g errgroup.Group
		for i := range 8 {
			g.Go(func() error {
				at := fmt.Sprintf("%s%d", target, i)
				if err := os.Mkdir(at, 0o700); err != nil {
					return err
				}
				for range 5 {
					if err := m.Mount(t.Context(), image, device, at); err != nil {
						return err
					}
					if err := errors.Join(Check(t.Context(), at), Unmount(at, false)); err != nil {
						return err
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// deafFUSE mounts a FUSE whose server never answers, until the test ends.
func deafFUSE(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev.Fd())
	if err := unix.Mount("deaf", dir, "fuse", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Closing it ends all requests.
		if err := errors.Join(dev.Close(), unix.Unmount(dir, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestDeafDevice gives up on a device when the context ends.
func TestDeafDevice(t *testing.T) {
	image, _, target := newImage(t)
	t.Run("hanging", func(t *testing.T) {
		device := filepath.Join(deafFUSE(t), "device")
		forEachMethod(t, func(t *testing.T, m *Mounter) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if err := m.Mount(ctx, image, device, target); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Mount: %v", err)
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := Check(ctx, filepath.Dir(device)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Check: %v", err)
		}
		if _, err := Probe(ctx, t.TempDir(), device, slog.New(slog.DiscardHandler)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Probe: %v", err)
		}
	})
	wantMounted(t, target, false)
	noLoops(t, filepath.Dir(image))
}

// TestAwaitDiscards hands a result that came too late to discard.
func TestAwaitDiscards(t *testing.T) {
	for _, fails := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		answer, discarded, returned := make(chan struct{}), make(chan int, 1), make(chan struct{})
		_, err := await(ctx, func() (int, error) {
			cancel()
			<-answer
			defer close(returned)
			if fails {
				return 0, unix.EIO
			}
			return 42, nil
		}, func(n int) { discarded <- n })
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		close(answer)
		<-returned
		if !fails && <-discarded != 42 {
			t.Error("the result was lost")
		}
		if _, err := await(ctx, func() (int, error) { t.Error("called"); return 0, nil }, func(int) {}); err == nil {
			t.Error("no error for a context that has ended")
		}
	}
}
