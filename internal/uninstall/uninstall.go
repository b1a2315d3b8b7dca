// SPDX-License-Identifier: Apache-2.0

// Package uninstall removes the daemon's directories from a node, without the
// daemon. It does not remove the program, its configuration or its unit.
//
// It removes all or refuses: while the daemon runs, while a runtime refers to a
// layer or lists the store (without a store that is listed a runtime does not
// start), and while any of that is not known. It removes only directories that a
// daemon has used, and nothing that is mounted in them. After an interrupt it can
// be run again.
package uninstall

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/prepare"
)

// lockName is the file by which a daemon has its directories to itself.
const lockName = "daemon.lock"

// Options say what is removed, and what might need it.
type Options struct {
	Config config.Config
	// StorageConf are the files in which runtimes list stores, as patterns; see
	// [StorageConf].
	StorageConf []string
	// DryRun makes Run change nothing.
	DryRun bool
}

// Report says what Run has done, or would do.
type Report struct {
	DryRun    bool     `json:"dryRun"`
	Unmounted []string `json:"unmounted"`
	Removed   []string `json:"removed"`
	// Emptied are directories that stay: they are mount points themselves.
	Emptied []string `json:"emptied"`
}

// Run removes the daemon's directories. The error is [prepare.ErrInUse] if a
// runtime refers to a layer.
func Run(o Options) (*Report, error) {
	r := &Report{DryRun: o.DryRun, Unmounted: []string{}, Removed: []string{}, Emptied: []string{}}
	dirs, err := directories(o.Config)
	if err != nil || len(dirs) == 0 {
		return r, err
	}
	unlock, err := lock(o.Config, o.DryRun)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := errors.Join(unlisted(o.StorageConf, o.Config.StorePath()), unreferenced(o.Config)); err != nil {
		return nil, err
	}
	if r.Unmounted, err = unmountBelow(resolve(o.Config.RunRoot), dirs, o.DryRun); err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		stays, err := isMountPoint(dir)
		if err == nil && !o.DryRun {
			err = removeDirectory(dir, stays)
		}
		if err != nil {
			return nil, err
		}
		if stays {
			r.Emptied = append(r.Emptied, dir)
		} else {
			r.Removed = append(r.Removed, dir)
		}
	}
	return r, nil
}

// directories are those that exist, by the paths that the kernel has for them. It
// refuses ones that no daemon has used, and those with a runtime's own store in them.
func directories(cfg config.Config) ([]string, error) {
	root, run, store := resolve(cfg.Root), resolve(cfg.RunRoot), resolve(cfg.StorePath())
	var dirs []string
	for _, dir := range []string{run, store, root} {
		if below(root, dir) || below(run, dir) {
			continue // it goes with that
		}
		_, err := os.Stat(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = checkOurs(dir)
		}
		for _, other := range cfg.RuntimeRoots {
			if other = resolve(other); err == nil && (other == dir || below(dir, other)) {
				err = fmt.Errorf("the store of a runtime, %s, is in it", other)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("refusing to remove %s: %w", dir, err)
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// resolve is a path without symbolic links, if it exists.
func resolve(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

// checkOurs accepts a directory that a daemon has locked, an image store without
// images, and what an installation makes: a directory with nothing but such a store.
func checkOurs(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(entries) == 0 {
		return nil
	}
	store := dir
	for _, e := range entries {
		if e.Name() == lockName {
			return nil
		}
		if e.Name() == "store" && len(entries) == 1 {
			store = filepath.Join(dir, "store")
		}
	}
	images, err := os.ReadFile(filepath.Join(store, "overlay-images", "images.json"))
	if err != nil || strings.TrimSpace(string(images)) != "[]" {
		return errors.New("it does not look like a directory of Holdfast's")
	}
	return nil
}

// lock makes sure that no daemon runs, and that none starts.
func lock(cfg config.Config, dryRun bool) (unlock func(), err error) {
	var files []*os.File
	unlock = func() {
		for _, f := range files {
			_ = f.Close() // ends its lock
		}
	}
	flags := os.O_RDWR | os.O_CREATE
	if dryRun {
		flags = os.O_RDWR
	}
	for _, dir := range []string{cfg.Root, cfg.RunRoot} {
		f, err := os.OpenFile(filepath.Join(dir, lockName), flags, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the directory does not exist, or the file and this is a dry run
		}
		if err != nil {
			unlock()
			return nil, fmt.Errorf("locking the daemon's directories: %w", err)
		}
		files = append(files, f)
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			unlock()
			return nil, fmt.Errorf("the daemon uses %s: stop it first, for good (systemctl disable --now holdfast): %w", dir, err)
		}
	}
	return unlock, nil
}

// unreferenced is an error if a runtime refers to a layer, or if that is not known.
func unreferenced(cfg config.Config) error {
	records, err := imagestore.Records(cfg.StorePath())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	used, err := imagestore.References(cfg.RuntimeRoots, records)
	if err != nil {
		return err
	}
	var ids []string
	for _, r := range records {
		ids = append(ids, r.ID)
	}
	if err := prepare.Refusal(used, ids); err != nil {
		return fmt.Errorf("layers of the store %s are %w: remove what refers to them first (podman rmi, podman rm; crictl rmi, crictl rmp)", cfg.StorePath(), err)
	}
	return nil
}

// removeDirectory removes a directory, or only what is in it. The lock goes last:
// by it an interrupted removal knows the directory again.
func removeDirectory(dir string, stays bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("removing %s: %w", dir, err)
	}
	for _, e := range entries {
		if e.Name() == lockName {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("removing %s: %w", dir, err)
		}
	}
	if err := os.Remove(filepath.Join(dir, lockName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing %s: %w", dir, err)
	}
	if stays {
		return nil
	}
	if err := os.Remove(dir); err != nil {
		return fmt.Errorf("removing %s: %w", dir, err)
	}
	return nil
}

// below reports whether a path lies below a directory, both absolute.
func below(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != "." && filepath.IsLocal(rel)
}
