// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"go.podman.io/storage"
	"golang.org/x/sys/unix"
)

// ProbeImageStore opens an image store as CRI-O does when it starts, with
// containers/storage itself, in a scratch store below dir. It is run in a process
// of its own, since it may hang, and changes that process: its root directory is
// then root.
func ProbeImageStore(root, path string) (err error) {
	if root != "/" {
		if err := errors.Join(unix.Chroot(root), unix.Chdir("/")); err != nil {
			return fmt.Errorf("entering %s: %w", root, err)
		}
	}
	old, _ := filepath.Glob(filepath.Join(probeParent(), scratchName+"*"))
	for _, dir := range old { // what killed ones have left; others may be at work
		if info, err := os.Stat(dir); err == nil && time.Since(info.ModTime()) > abandoned {
			_ = os.RemoveAll(dir)
		}
	}
	scratch, err := os.MkdirTemp(probeParent(), scratchName)
	if err != nil {
		return fmt.Errorf("trying the store: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	store, err := storage.GetStore(storage.StoreOptions{
		GraphRoot: filepath.Join(scratch, "root"), RunRoot: filepath.Join(scratch, "run"),
		GraphDriverName: "overlay",
		// Without a mount of its own there is nothing to undo if it is killed.
		GraphDriverOptions: []string{"overlay.imagestore=" + path, "overlay.skip_mount_home=true"},
	})
	if err != nil {
		return fmt.Errorf("containers/storage does not open it: %w", err)
	}
	defer func() {
		if _, bad := store.Shutdown(true); bad != nil {
			err = errors.Join(err, bad)
		}
	}()
	// Only now does it open the lists of layers: should that fail, CRI-O runs, and can
	// neither list nor pull anything.
	if _, err := store.Layers(); err != nil {
		return fmt.Errorf("containers/storage does not list its layers: %w", err)
	}
	if _, err := store.Images(); err != nil {
		return fmt.Errorf("containers/storage does not list its images: %w", err)
	}
	return nil
}

const (
	scratchName = "holdfast-probe-"
	abandoned   = 10 * time.Minute // far more than a probe may take
)

// probeParent is a directory for scratch stores, on a file system that overlays can
// be on.
func probeParent() string {
	for _, dir := range []string{"/var/lib/holdfast-agent", "/var/tmp"} {
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			return dir
		}
	}
	return os.TempDir()
}

// ProbeCommand is the name of the hidden command that calls [ProbeImageStore]: this
// program, then the name, root and path.
const ProbeCommand = "probe-image-store"

// probeImageStore runs the probe in a process of its own, which is killed when the
// time is over. Should it not die, since it waits for a server, it is left behind.
func probeImageStore(ctx context.Context, root, path string) error {
	cmd := exec.Command("/proc/self/exe", ProbeCommand, root, path) //nolint:noctx,gosec // it is ended below
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("trying the store: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			return errors.New(strings.TrimSpace(strings.TrimPrefix(said.String()+" "+err.Error(), "holdfast-operator: ")))
		}
		return nil
	case <-ctx.Done():
		_ = cmd.Process.Kill()
		return context.Cause(ctx)
	}
}
