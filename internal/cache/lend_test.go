// SPDX-License-Identifier: Apache-2.0

package cache_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
)

// surrounded is a layout with a chunk of that size at an offset, its number, and
// others that share its blocks.
func surrounded(t *testing.T, off, size int64) (*index.Table, int) {
	t.Helper()
	sizes := []int64{size, 100}
	if off > 0 {
		sizes = append([]int64{off}, sizes...)
	}
	return layout(t, (off+size+100+4095)/4096*4096, sizes...), len(sizes) - 2
}

// newDir is a directory of its own, for the cache of one test.
func newDir(t *testing.T, parent, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, name)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// borrow copies chunk i of one file to chunk k of another, and returns how many
// bytes of it were cloned.
func borrow(t *testing.T, from *cache.File, i int, to *cache.File, k int) int64 {
	t.Helper()
	loan := from.Lend(i)
	if loan == nil {
		t.Fatalf("chunk %d is not to be had", i)
	}
	defer loan.Close() //nolint:errcheck // it has no error
	w, err := to.Begin(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	cloned := w.Clone(loan)
	if _, err := io.CopyN(io.Discard, loan, cloned); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(w, loan); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	return cloned
}

// Chunks of all sizes, on block borders and off them, on a file system that can
// share blocks and on one that cannot.
func TestLend(t *testing.T) {
	const worth = 128 << 10 // see minClone
	for _, fs := range []struct {
		name   string
		dir    string
		clones bool
	}{
		{"xfs", disk(t, 320<<20, "mkfs.xfs", "-q"), true},
		{"ext4", smallDisk(t, 64<<20), false},
	} {
		for _, c := range []struct {
			name       string
			from, to   int64 // offset
			size, want int64 // bytes cloned, if they can be
		}{
			{"a byte", 0, 0, 1, 0},
			{"a block", 4096, 0, 4096, 0},
			{"not worth it", 0, 0, worth - 1, 0},
			{"just worth it", 0, 8192, worth, worth},
			{"a little more", 4096, 8192, worth + 1, worth},
			{"up to the last block", 4096, 0, worth + 4095, worth},
			{"large", 4096, 8192, 5_000_001, 5_000_001 / 4096 * 4096},
			{"off a block border", 1, 4096, 1 << 20, 0},
			{"to off a block border", 4096, 1, 1 << 20, 0},
		} {
			t.Run(fs.name+" "+c.name, func(t *testing.T) {
				dir := func(name string) string { return newDir(t, fs.dir, name) }
				fromTable, i := surrounded(t, c.from, c.size)
				toTable, k := surrounded(t, c.to, c.size)
				from, to := openIn(t, dir("from"), fromTable, unlimited()), openIn(t, dir("to"), toTable, unlimited())
				content := bytes.Repeat([]byte("0123456789"), int(c.size/10+1))[:c.size]
				if err := store(from, i, content); err != nil {
					t.Fatal(err)
				}
				for n := range toTable.Len() {
					if n != k {
						if err := store(to, n, fill(toTable.At(n), n)); err != nil {
							t.Fatal(err)
						}
					}
				}
				cloned := borrow(t, from, i, to, k)
				if want := c.want; fs.clones && cloned != want || !fs.clones && cloned != 0 {
					t.Errorf("%d bytes were cloned, want %d", cloned, want)
				}
				got := make([]byte, c.size)
				if _, err := to.ReadAt(got, toTable.At(k).Offset); err != nil || !bytes.Equal(got, content) {
					t.Errorf("other bytes, error %v", err)
				}
				for n := range toTable.Len() {
					if n != k {
						if err := readChunk(t.Context(), to, toTable, n); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
	}
}

// What has been cloned takes no disk space of its own, and stays when the one that
// it was cloned from goes.
func TestCloneSharesBlocks(t *testing.T) {
	const size = 32 << 20
	disk := disk(t, 320<<20, "mkfs.xfs", "-q")
	free := func() int64 {
		var st unix.Statfs_t
		unix.Sync()
		if err := unix.Statfs(disk, &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Bfree) * st.Bsize //nolint:gosec // small
	}
	fromTable, toTable := layout(t, size, size), layout(t, size, size)
	space := limited(size)
	from, to := openIn(t, newDir(t, disk, "from"), fromTable, space), openIn(t, newDir(t, disk, "to"), toTable, unlimited())
	if err := store(from, 0, fill(fromTable.At(0), 0)); err != nil {
		t.Fatal(err)
	}
	before := free()
	borrow(t, from, 0, to, 0)
	if took := before - free(); took > 1<<20 {
		t.Errorf("the clone took %d bytes", took)
	}
	if ok, err := space.Reserve(t.Context(), size); err != nil || !ok || from.Has(0) {
		t.Fatalf("it was not evicted: %v, %v", ok, err)
	}
	if err := readChunk(t.Context(), to, toTable, 0); err != nil {
		t.Error(err)
	}
}

func TestLendOnlyWhatIsOnDisk(t *testing.T) {
	f := open(t, t.TempDir(), 3)
	if f.Lend(0) != nil {
		t.Error("an absent chunk was lent")
	}
	w, err := f.Begin(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if f.Lend(1) != nil {
		t.Error("a chunk on its way was lent")
	}
	w.Abort()
	// There is no room for this one: it is in memory, for those who wait for it.
	small := openIn(t, t.TempDir(), blocks(t, 1), limited(1))
	add(t, small, 0)
	if !small.Has(0) || small.Lend(0) != nil {
		t.Error("a chunk in memory was lent")
	}
}

// A chunk that is lent is not evicted, and its file is not closed.
func TestLentChunksStay(t *testing.T) {
	space := limited(2 * chunk)
	f := openIn(t, t.TempDir(), blocks(t, 2), space)
	add(t, f, 0, 1)
	loan := f.Lend(0)
	if ok, err := space.Reserve(t.Context(), chunk); err != nil || !ok || !f.Has(0) || f.Has(1) {
		t.Errorf("chunk 0 there: %v, chunk 1: %v; room %v, %v", f.Has(0), f.Has(1), ok, err)
	}
	closed := make(chan error)
	go func() { closed <- f.Close() }()
	select {
	case <-closed: //nolint:errcheck // it must not come
		t.Error("it was closed while a chunk was lent")
	case <-time.After(20 * time.Millisecond):
	}
	if got, err := io.ReadAll(loan); err != nil || !bytes.Equal(got, content(0)) {
		t.Errorf("%d bytes, error %v", len(got), err)
	}
	if err := loan.Close(); err != nil {
		t.Error(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

func TestRoom(t *testing.T) {
	for _, tt := range []struct {
		limit, n int64 // in chunks; one is there, a 32nd is kept free for readers
		want     bool
	}{{0, 1 << 30, true}, {32, 30, true}, {32, 31, false}, {1, 0, false}} {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			f := openIn(t, t.TempDir(), blocks(t, 1), limited(tt.limit*chunk))
			add(t, f, 0)
			if got := f.Room(tt.n * chunk); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
