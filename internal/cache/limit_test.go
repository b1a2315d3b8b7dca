// SPDX-License-Identifier: Apache-2.0

package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
)

// ofFileSystem is the disk space of a file that is not its data's: ext4 keeps
// where that is in blocks of its own.
const ofFileSystem = 16 << 10

// fill is what a chunk of any layout holds, by its number.
func fill(c index.Chunk, i int) []byte { return bytes.Repeat([]byte{byte(i%255 + 1)}, int(c.Size)) }

func same(n int, size int64) []int64 {
	sizes := make([]int64, n)
	for i := range sizes {
		sizes[i] = size
	}
	return sizes
}

func readChunk(ctx context.Context, f *cache.File, table *index.Table, i int) error {
	c := table.At(i)
	release, err := f.Hold(ctx, i, i+1)
	if err != nil {
		return err
	}
	defer release()
	if !f.Has(i) {
		if err := store(f, i, fill(c, i)); err != nil {
			return err
		}
	}
	p := make([]byte, c.Size)
	if _, err := f.ReadAt(p, c.Offset); err != nil {
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	if !bytes.Equal(p, fill(c, i)) {
		return fmt.Errorf("chunk %d has other bytes", i)
	}
	return nil
}

func TestLeastRecentlyUsedGoFirst(t *testing.T) {
	const size, n, limit = 1 << 20, 96, 32 << 20
	table := layout(t, n*size, same(n, size)...)
	space := limited(limit)
	f := openIn(t, t.TempDir(), table, space)
	for i := range n {
		for _, k := range []int{0, 1, 2, i} { // the first three all the time
			if k < 3 && i >= 3 && !f.Has(k) {
				t.Fatalf("chunk %d was evicted, which was just read", k)
			}
			if err := readChunk(t.Context(), f, table, k); err != nil {
				t.Fatal(err)
			}
		}
		if got := f.Allocated(); got > limit+ofFileSystem {
			t.Fatalf("%d bytes on disk", got)
		}
	}
	if !f.Has(n-1) || !f.Has(n-10) || f.Has(4) || f.Has(n/2) {
		t.Error("not the least recently used chunks were evicted")
	}
	if s := space.Stats(); s.Evicted < (n-34)*size || s.Full || s.Used > limit {
		t.Errorf("stats %+v", s)
	}
}

// Chunks that begin and end anywhere share blocks with their neighbours.
func TestSpaceIsGivenBack(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // no secret
	for name, next := range map[string]func() int64{
		"tiny":        func() int64 { return 1 + random.Int64N(100) },
		"block":       func() int64 { return 4096 },
		"block and 1": func() int64 { return 4097 },
		"block less":  func() int64 { return 4095 },
		"any":         func() int64 { return 1 + random.Int64N(60_000) },
	} {
		t.Run(name, func(t *testing.T) {
			var sizes []int64
			var total int64
			for total < 1<<20 && len(sizes) < 500 {
				n := next()
				sizes, total = append(sizes, n), total+n
			}
			table := layout(t, (total+4095)/4096*4096, sizes...)
			space := limited(total / 3)
			f := openIn(t, t.TempDir(), table, space)
			for range 3 {
				for _, i := range random.Perm(len(sizes)) {
					if err := readChunk(t.Context(), f, table, i); err != nil {
						t.Fatal(err)
					}
					if s := space.Stats(); f.Allocated() > s.Used+ofFileSystem || s.Used > s.Limit {
						t.Fatalf("%d bytes on disk, stats %+v", f.Allocated(), s)
					}
				}
				for i := range sizes {
					if f.Has(i) {
						if err := readChunk(t.Context(), f, table, i); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			if s := space.Stats(); s.Evicted == 0 || s.Full {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

func TestHeldChunksStay(t *testing.T) {
	const n = 64
	table, space := blocks(t, n), limited(n/2*chunk)
	f := openIn(t, t.TempDir(), table, space)
	release, err := f.Hold(t.Context(), 0, 8) // before they are there
	if err != nil {
		t.Fatal(err)
	}
	add(t, f, 0, 1, 2, 3, 4, 5, 6, 7)
	for i := 8; i < n; i++ {
		add(t, f, i)
	}
	for i := range 8 {
		if !f.Has(i) {
			t.Errorf("chunk %d was evicted while it was held", i)
		}
	}
	release()
	all, err := f.Hold(t.Context(), 0, n)
	if err != nil {
		t.Fatal(err)
	}
	defer all()
	for i := range n {
		if !f.Has(i) {
			add(t, f, i)
		}
	}
	// With everything held the rest is in memory.
	if s := space.Stats(); !s.Full || s.Used > s.Limit || s.InMemory == 0 {
		t.Errorf("stats %+v", s)
	}
	for i := range n {
		if err := readChunk(t.Context(), f, table, i); err != nil {
			t.Error(err)
		}
	}
}

func TestFrozenFilesStay(t *testing.T) {
	const n = 64
	space := limited(n * chunk)
	frozen := openIn(t, t.TempDir(), blocks(t, n/2), space)
	for i := range n / 2 {
		if frozen.Freeze() {
			t.Error("froze what is not complete")
		}
		add(t, frozen, i)
	}
	if frozen.Freeze() {
		t.Error("froze what is not durable")
	}
	if err := frozen.Flush(); err != nil {
		t.Fatal(err)
	}
	if !space.MayFreeze(n/2*chunk) || space.MayFreeze(n/2*chunk+1) {
		t.Error("not half of the limit may be frozen")
	}
	for range 2 {
		if !frozen.Freeze() {
			t.Error("a complete file was not frozen")
		}
	}
	if space.MayFreeze(1) {
		t.Error("more than half of the limit may be frozen")
	}
	other := openIn(t, t.TempDir(), blocks(t, 2*n), space)
	for i := range 2 * n {
		add(t, other, i)
	}
	if !frozen.Complete() || frozen.Present() != n/2 {
		t.Error("chunks of a frozen file were evicted")
	}
	if s := space.Stats(); s.Used > s.Limit || s.Frozen != n/2*chunk || s.Full {
		t.Errorf("stats %+v", s)
	}
	if err := frozen.Close(); err != nil {
		t.Fatal(err)
	}
	if s := space.Stats(); s.Frozen != 0 || s.Used > n/2*chunk {
		t.Errorf("after its end: %+v", s)
	}
}

// What is mounted stays mounted when the daemon is restarted, whatever becomes of
// the rest.
func TestFrozenAfterARestart(t *testing.T) {
	const n = 32
	for name, damage := range map[string]func(t *testing.T, dir string) (frozen, complete bool){
		"":    func(*testing.T, string) (bool, bool) { return true, true },
		"map": func(t *testing.T, dir string) (bool, bool) { remove(t, dir, cache.PresentName); return true, false },
		"boot": func(t *testing.T, dir string) (bool, bool) {
			if err := os.WriteFile(filepath.Join(dir, cache.FrozenName), []byte("another boot"), 0o600); err != nil {
				t.Fatal(err)
			}
			return false, true
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			f := open(t, dir, n)
			for i := range n {
				add(t, f, i)
			}
			if err := f.Flush(); err != nil || !f.Freeze() {
				t.Fatal("not frozen", err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			frozen, complete := damage(t, dir)
			table, space := blocks(t, n), limited(n/2*chunk)
			f = openIn(t, dir, table, space)
			other := openIn(t, t.TempDir(), blocks(t, n), space)
			for i := range n {
				add(t, other, i)
			}
			if s := space.Stats(); f.Complete() != (frozen && complete) || (s.Frozen == n*chunk) != (frozen && complete) {
				t.Errorf("complete is %v, stats %+v", f.Complete(), s)
			}
			if frozen && f.Allocated() < n*chunk {
				t.Errorf("%d bytes on disk", f.Allocated())
			}
			for i := range n {
				if err := readChunk(t.Context(), f, table, i); err == nil {
					continue
				}
				// readChunk has other bytes than content.
				p := make([]byte, chunk)
				if _, err := f.ReadAt(p, int64(i)*chunk); err != nil || !bytes.Equal(p, content(i)) {
					t.Errorf("chunk %d: %x..., error %v", i, p[:4], err)
				}
			}
			if !frozen {
				return
			}
			data, err := os.ReadFile(filepath.Join(dir, cache.DataName))
			for i := range n {
				if err != nil || !bytes.Equal(data[i*chunk:][:chunk], content(i)) {
					t.Fatalf("what is mounted has changed, in chunk %d; error %v", i, err)
				}
			}
		})
	}
}

func remove(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// A limit that has become smaller is kept soon after the start.
func TestRunKeepsSpaceFree(t *testing.T) {
	const n = 128
	dir := t.TempDir()
	f := open(t, dir, n)
	for i := range n {
		add(t, f, i)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	space := limited(n / 2 * chunk)
	f = openIn(t, dir, blocks(t, n), space)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- space.Run(ctx) }()
	for deadline := time.Now().Add(20 * time.Second); space.Stats().Used > n/2*chunk*15/16; {
		if time.Now().After(deadline) {
			t.Fatalf("stats %+v", space.Stats())
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if f.Present() == 0 || f.Allocated() > n/2*chunk+ofFileSystem {
		t.Errorf("%d chunks are present, %d bytes on disk", f.Present(), f.Allocated())
	}
}

func TestTryBegin(t *testing.T) {
	space := limited(33 * chunk)
	f := openIn(t, t.TempDir(), blocks(t, 64), space)
	n := 0
	for ; n < 64; n++ {
		w := f.TryBegin(n)
		if w == nil {
			break
		}
		if f.TryBegin(n) != nil {
			t.Error("a chunk has two writers")
		}
		if _, err := w.Write(content(n)); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if s := space.Stats(); n < 30 || n > 32 || s.Evicted != 0 || s.Full {
		t.Errorf("%d chunks, stats %+v", n, s)
	}
	if f.TryBegin(0) != nil {
		t.Error("a chunk that is there has a writer")
	}
}

// What was not committed takes no space, on disk or in memory.
func TestAbort(t *testing.T) {
	space := limited(4 * chunk)
	f := openIn(t, t.TempDir(), blocks(t, 16), space)
	for i := range 16 {
		w, err := f.Begin(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content(i)[:chunk-i]); err != nil {
			t.Fatal(err)
		}
		if i > 0 && w.Commit() == nil {
			t.Error("a part of a chunk was taken for the whole")
		}
		w.Abort()
	}
	if s := space.Stats(); s.Used != 0 || s.InMemory != 0 || f.Allocated() > ofFileSystem {
		t.Errorf("%d bytes on disk, stats %+v", f.Allocated(), s)
	}
}

// What a crash leaves of chunks that are not present is not on disk for ever.
func TestSweep(t *testing.T) {
	const n = 64
	dir := t.TempDir()
	f := open(t, dir, n)
	add(t, f, 1, 10)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.OpenFile(filepath.Join(dir, cache.DataName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := data.WriteAt(bytes.Repeat([]byte{9}, 40*chunk), 20*chunk); err != nil {
		t.Fatal(err)
	}
	data.Close()
	f = open(t, dir, n)
	check(t, f, n, map[int]bool{1: true, 10: true})
	if got := f.Allocated(); got > 2*chunk+ofFileSystem {
		t.Errorf("%d bytes on disk", got)
	}
}

func TestConcurrentReadersWithinALimit(t *testing.T) {
	const n = 600
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // no secret
	sizes, total := make([]int64, n), int64(0)
	for i := range sizes {
		sizes[i] = 1 + random.Int64N(20_000)
		total += sizes[i]
	}
	table := layout(t, (total+4095)/4096*4096, sizes...)
	space := limited(total / 4)
	f := openIn(t, t.TempDir(), table, space)
	var locks [n]atomic.Bool // as flights do
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var background, readers errgroup.Group
	background.Go(func() error { return space.Run(ctx) })
	background.Go(func() error {
		for ctx.Err() == nil {
			if err := f.Flush(); err != nil {
				return err
			}
			if s := space.Stats(); s.Used > s.Limit || f.Allocated() > s.Limit+ofFileSystem {
				return fmt.Errorf("%d bytes on disk, stats %+v", f.Allocated(), s)
			}
		}
		return nil
	})
	for r := range uint64(6) {
		readers.Go(func() error {
			random := rand.New(rand.NewPCG(3, r)) //nolint:gosec // no secret
			for range 600 {
				i := random.IntN(n)
				if !locks[i].CompareAndSwap(false, true) {
					continue
				}
				err := readChunk(ctx, f, table, i)
				locks[i].Store(false)
				if err != nil && !errors.Is(err, cache.ErrFull) {
					return err
				}
			}
			return nil
		})
	}
	if err := readers.Wait(); err != nil {
		t.Error(err)
	}
	cancel()
	if err := background.Wait(); err != nil {
		t.Error(err)
	}
	if s := space.Stats(); s.Evicted == 0 {
		t.Errorf("stats %+v", s)
	}
}
