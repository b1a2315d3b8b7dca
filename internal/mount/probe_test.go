// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func probeIn(t *testing.T, dir, device string) (*Mounter, error) {
	t.Helper()
	m, err := Probe(t.Context(), dir, device, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	noLoops(t, dir)
	if err != nil && strings.Contains(err.Error(), "\n") {
		t.Errorf("more than one line: %q", err)
	}
	return m, err
}

func TestProbe(t *testing.T) {
	m, err := probeIn(t, t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(m)
	image, device, target := newImage(t)
	if m, err = probeIn(t, t.TempDir(), device); err != nil {
		t.Fatal(err)
	}
	if err := m.Mount(t.Context(), image, device, target); err != nil {
		t.Error(err)
	}
	if err := Unmount(target, false); err != nil {
		t.Error(err)
	}
}

// TestProbeFallsBack has the image on tmpfs, which EROFS cannot read as a file.
func TestProbeFallsBack(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	m, err := probeIn(t, dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if m.Method() != Loop || !strings.Contains(m.String(), "not file: this kernel does not mount EROFS from files") {
		t.Errorf("got %s", m)
	}
}

// TestTrial runs both methods whatever Probe prefers.
func TestTrial(t *testing.T) {
	forEachMethod(t, func(t *testing.T, m *Mounter) {
		tr := trial{dir: t.TempDir()}
		if err := tr.build(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := tr.run(t.Context(), m); err != nil {
			t.Error(err)
		}
		for _, name := range tr.mounts() {
			if left, err := os.ReadDir(name); err != nil || len(left) > 0 {
				t.Errorf("left behind in %s: %v, %v", name, left, err)
			}
		}
	})
}

// TestProbeAfterKill clears what a probe left that was killed.
func TestProbeAfterKill(t *testing.T) {
	dir := t.TempDir()
	old := trial{dir: filepath.Join(dir, "mount-probe")}
	if err := old.build(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := New(Loop, slog.New(slog.DiscardHandler))
	if err := m.Mount(t.Context(), old.path("image"), old.device, old.path("layer")); err != nil {
		t.Fatal(err)
	}
	if err := old.overlay("overlay1", old.path("layer/diff")); err != nil {
		t.Fatal(err)
	}
	if _, err := probeIn(t, dir, ""); err != nil {
		t.Error(err)
	}
}

func TestProbeBadDevice(t *testing.T) {
	short := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(short, make([]byte, 4095), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, device := range []string{short, short + "x", t.TempDir()} {
		if _, err := probeIn(t, t.TempDir(), device); err == nil {
			t.Errorf("device %s: no error", device)
		}
	}
}

// TestProbeWithoutCapability runs itself in a process that must not mount.
func TestProbeWithoutCapability(t *testing.T) {
	const variable = "MOUNT_TEST_WITHOUT_CAPABILITY"
	if os.Getenv(variable) != "" {
		if _, err := probeIn(t, t.TempDir(), ""); !errors.Is(err, ErrNotPermitted) {
			t.Errorf("got %v", err)
		}
		return
	}
	type result struct {
		out []byte
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its goroutine
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN, 0, 0, 0); err != nil {
			done <- result{nil, err}
			return
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProbeWithoutCapability$") //nolint:gosec // this test
		cmd.Env = append(os.Environ(), variable+"=1")
		out, err := cmd.CombinedOutput()
		done <- result{out, err}
	}()
	if r := <-done; r.err != nil {
		t.Errorf("%v\n%s", r.err, r.out)
	}
}
