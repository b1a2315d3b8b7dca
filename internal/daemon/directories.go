// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/mount"
)

// Lock creates the daemon's directories and makes sure that no other daemon uses
// them until unlock is called.
func Lock(cfg config.Config) (unlock func(), err error) {
	var files []*os.File
	unlock = func() {
		for _, f := range files {
			_ = f.Close()
		}
	}
	for _, dir := range []string{cfg.Root, cfg.RunRoot} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			unlock()
			return nil, fmt.Errorf("creating the daemon's directories: %w", err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			unlock()
			return nil, fmt.Errorf("closing the daemon's directories to others: %w", err)
		}
		f, err := os.OpenFile(filepath.Join(dir, "daemon.lock"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			unlock()
			return nil, fmt.Errorf("locking the daemon's directories: %w", err)
		}
		files = append(files, f)
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			unlock()
			return nil, fmt.Errorf("another daemon uses %s: stop it first (systemctl stop holdfast), or give this one directories of its own (root, runroot): %w", dir, err)
		}
	}
	return unlock, nil
}

// ClearMounts ends what a daemon that is gone has left mounted below the run
// directory, the latest first. What containers hold of it stays with them.
func ClearMounts(cfg config.Config) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(cfg.RunRoot))
	if err != nil {
		return fmt.Errorf("looking for mounts of an earlier daemon: %w", err)
	}
	for _, m := range slices.Backward(mounts) {
		if m.Mountpoint == cfg.RunRoot {
			continue // a file system of its own
		}
		if err := mount.Unbind(m.Mountpoint); err != nil {
			return fmt.Errorf("ending mounts of an earlier daemon: %w", err)
		}
	}
	return nil
}
