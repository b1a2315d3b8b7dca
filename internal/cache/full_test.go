// SPDX-License-Identifier: Apache-2.0

package cache_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/cache"
)

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil { //nolint:gosec // of this file
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// smallDisk is a directory on an ext4 file system of some MiB.
func smallDisk(t *testing.T, size int64) string {
	t.Helper()
	return disk(t, size, "mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0")
}

// disk is a directory on a file system that a program makes in a file.
func disk(t *testing.T, size int64, mkfs string, args ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	run(t, mkfs, append(args, image)...)
	dir := t.TempDir()
	run(t, "mount", "-o", "loop", image, dir)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A disk that is full, in the middle of chunks, and has room again later.
func TestFullFileSystem(t *testing.T) {
	const size, n = 200_001, 400
	dir := smallDisk(t, 128<<20)
	ballast := filepath.Join(dir, "ballast")
	run(t, "fallocate", "-l", "100M", ballast)
	table := layout(t, (n*size+4095)/4096*4096, same(n, size)...)
	space := unlimited()
	f := openIn(t, dir, table, space)
	readAll := func() {
		t.Helper()
		for i := range n {
			if err := readChunk(t.Context(), f, table, i); err != nil {
				t.Fatal(err)
			}
		}
	}
	readAll()
	before, s := f.Present(), space.Stats()
	if !s.Full || s.InMemory == 0 || s.InMemory > 32<<20 || before == 0 || before == n {
		t.Fatalf("%d chunks on disk, stats %+v", before, s)
	}
	if !f.Has(n-1) || !f.Has(n-100) || f.Has(n-200) {
		t.Error("what was read last is not what is in memory")
	}
	if got := f.Allocated(); got > s.Used+ofFileSystem {
		t.Errorf("%d bytes on disk, stats %+v", got, s)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); space.Stats().Full; readAll() {
		if time.Now().After(deadline) {
			t.Fatalf("%d chunks on disk, stats %+v", f.Present(), space.Stats())
		}
	}
	readAll()
	if f.Present() <= before {
		t.Errorf("%d chunks on disk, as before", f.Present())
	}
}

// Readers who need more memory together than there is wait for each other; one
// who needs more than there is gets an error.
func TestMemoryIsBounded(t *testing.T) {
	const size, n = 3 << 20, 20
	table := layout(t, n*size+(40<<20), append(same(n, size), 40<<20)...)
	space := limited(chunk)
	f := openIn(t, t.TempDir(), table, space)
	if err := readChunk(t.Context(), f, table, 0); err != nil { // now it is full
		t.Fatal(err)
	}
	release, err := f.Hold(t.Context(), 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	patience := errors.New("no patience")
	cancel(patience)
	if _, err := f.Hold(ctx, 10, 20); !errors.Is(err, patience) {
		t.Errorf("error %v", err)
	}
	waiting := make(chan error, 1)
	go func() {
		release, err := f.Hold(t.Context(), 10, 20)
		if err == nil {
			release()
		}
		waiting <- err
	}()
	for i := range 10 {
		if !f.Has(i) {
			if err := store(f, i, fill(table.At(i), i)); err != nil {
				t.Error(err)
			}
		}
	}
	if s := space.Stats(); s.InMemory != 10*size {
		t.Errorf("stats %+v", s)
	}
	if err := store(f, 15, fill(table.At(15), 15)); !errors.Is(err, cache.ErrFull) {
		t.Errorf("beside what is held: %v", err)
	}
	release()
	if err := <-waiting; err != nil {
		t.Error(err)
	}
	if err := store(f, 15, fill(table.At(15), 15)); err != nil {
		t.Error(err)
	}
	if err := readChunk(t.Context(), f, table, n); !errors.Is(err, cache.ErrFull) {
		t.Errorf("a chunk that is too large: %v", err)
	}
	if s := space.Stats(); s.Used != 0 || s.InMemory > 32<<20 {
		t.Errorf("stats %+v", s)
	}
}

// On a full disk a chunk cannot be written; what was durable stays so.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("cache-test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	const n = 100
	f := open(t, dir, n)
	add(t, f, 0)
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	present := map[int]bool{0: true}
	for i := 1; !f.Full(); i++ {
		if err := store(f, i, content(i)); err != nil {
			t.Fatal(err)
		}
		present[i] = !f.Full()
	}
	last := len(present) - 1 // went to memory
	delete(present, last)
	if p := make([]byte, chunk); !f.Has(last) {
		t.Error("what could not be stored is gone")
	} else if _, err := f.ReadAt(p, int64(last)*chunk); err != nil || !bytes.Equal(p, content(last)) {
		t.Errorf("what could not be stored: %x..., error %v", p[:4], err)
	}
	if err := f.Flush(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("flush: %v", err)
	}
	again := open(t, dir, n)
	check(t, again, n, map[int]bool{0: true})
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left over: %v, error %v", left, err)
	}
	// As soon as there is room, all is made durable.
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	again = open(t, dir, n)
	check(t, again, n, present)
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}
