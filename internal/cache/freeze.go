// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// Freeze makes a complete file stay as it is, and reports whether it has: a mount
// that uses the data file directly would read zeros where it is punched, and may
// outlive everything here. So a file stays frozen, also when it is opened again,
// until the machine is booted. [Space.MayFreeze] is asked first.
func (f *File) Freeze() bool {
	f.naming.Lock() // nothing is evicted meanwhile
	defer f.naming.Unlock()
	if !f.complete() {
		return false
	}
	if f.Frozen() {
		return true
	}
	id, err := bootID()
	if err == nil {
		err = atomicfile.Write(filepath.Join(f.dir, FrozenName), id, 0o600)
	}
	if err != nil {
		f.space.log.Error("freezing a complete cache", "cache", f.dir, "err", err)
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frozen = true
	f.space.freeze(f.bytes)
	return true
}

// Frozen reports whether the file is frozen.
func (f *File) Frozen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.frozen
}

// wasFrozen reports whether the cache in dir was frozen since the last boot.
func wasFrozen(dir string) (bool, error) {
	was, err := os.ReadFile(filepath.Join(dir, FrozenName))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading when it was frozen: %w", err)
	}
	now, err := bootID()
	return string(was) == string(now), err
}

// bootID is another one after each boot.
func bootID() ([]byte, error) { return os.ReadFile("/proc/sys/kernel/random/boot_id") }
