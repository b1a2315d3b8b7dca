// SPDX-License-Identifier: Apache-2.0

package cache_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const chunk = 4096

func open(t *testing.T, dir string, chunks int) *cache.File {
	t.Helper()
	return openIn(t, dir, blocks(t, chunks), unlimited())
}

func openIn(t testing.TB, dir string, table *index.Table, space *cache.Space) *cache.File {
	t.Helper()
	f, err := cache.Open(dir, table, space)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // some tests have done so
	return f
}

func unlimited() *cache.Space { return limited(0) }

func limited(bytes int64) *cache.Space {
	return cache.NewSpace(bytes, slog.New(slog.DiscardHandler))
}

// blocks is a device of chunks of one block each.
func blocks(t testing.TB, chunks int) *index.Table {
	t.Helper()
	sizes := make([]int64, chunks)
	for i := range sizes {
		sizes[i] = chunk
	}
	return layout(t, int64(chunks)*chunk, sizes...)
}

// layout is a device of that size, with chunks one after the other.
func layout(t testing.TB, size int64, chunks ...int64) *index.Table {
	t.Helper()
	idx := &index.Index{DeviceSize: size}
	off := int64(0)
	for _, n := range chunks {
		idx.Chunks = append(idx.Chunks, index.Chunk{Offset: off, Size: n})
		off += n
	}
	name := filepath.Join(t.TempDir(), "chunks")
	file, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := index.WriteTable(file, idx); err != nil {
		t.Fatal(err)
	}
	table, err := index.OpenTable(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	return table
}

// content is what chunk i of these tests holds.
func content(i int) []byte { return bytes.Repeat([]byte{byte(i + 1)}, chunk) }

func add(t *testing.T, f *cache.File, chunks ...int) {
	t.Helper()
	for _, i := range chunks {
		if err := store(f, i, content(i)); err != nil {
			t.Fatal(err)
		}
	}
}

func store(f *cache.File, i int, p []byte) error {
	w, err := f.Begin(context.Background(), i)
	if err != nil {
		return err
	}
	defer w.Abort()
	if _, err := w.Write(p); err != nil {
		return err
	}
	return w.Commit()
}

// check compares what is present, and its bytes.
func check(t *testing.T, f *cache.File, chunks int, present map[int]bool) {
	t.Helper()
	if f.Present() != len(present) {
		t.Errorf("%d chunks are present, want %d", f.Present(), len(present))
	}
	for i := range chunks {
		if f.Has(i) != present[i] {
			t.Errorf("chunk %d: present is %v", i, f.Has(i))
		}
		if !present[i] {
			continue
		}
		p := make([]byte, chunk)
		if _, err := f.ReadAt(p, int64(i)*chunk); err != nil || !bytes.Equal(p, content(i)) {
			t.Errorf("chunk %d: %x..., error %v", i, p[:4], err)
		}
	}
}

func TestPresentMapSurvives(t *testing.T) {
	for _, n := range []int{0, 1, 2, 63, 64, 65, 127, 128, 129, 1000} {
		for name, keep := range map[string]func(int) bool{
			"none":  func(int) bool { return false },
			"all":   func(int) bool { return true },
			"first": func(i int) bool { return i == 0 },
			"last":  func(i int) bool { return i == n-1 },
			"odd":   func(i int) bool { return i%2 == 1 },
			"words": func(i int) bool { return i%64 == 0 || i%64 == 63 },
		} {
			t.Run(fmt.Sprintf("%s of %d", name, n), func(t *testing.T) {
				dir, present := t.TempDir(), map[int]bool{}
				f := open(t, dir, n)
				for i := range n {
					if keep(i) {
						add(t, f, i)
						present[i] = true
					}
				}
				check(t, f, n, present)
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
				f = open(t, dir, n)
				check(t, f, n, present)
				if f.Complete() != (len(present) == n) {
					t.Errorf("complete is %v with %d of %d chunks", f.Complete(), len(present), n)
				}
			})
		}
	}
}

// What a crash leaves is opened while the file of before is still open: nothing
// it would do at its end has happened.
func TestCrash(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, 4)
	add(t, f, 0)
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	add(t, f, 1, 2, 3)
	if f.Complete() {
		t.Error("complete before it is durable")
	}
	check(t, open(t, dir, 4), 4, map[int]bool{0: true})
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if !f.Complete() {
		t.Error("not complete although all is durable")
	}
	check(t, open(t, dir, 4), 4, map[int]bool{0: true, 1: true, 2: true, 3: true})
}

// Bytes of a chunk that was not marked are not trusted, whatever they are.
func TestDataWithoutMark(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, 2)
	w, err := f.Begin(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content(0)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	check(t, open(t, dir, 2), 2, map[int]bool{})
}

func TestFlushDoesNothingTwice(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, 2)
	add(t, f, 0)
	flush := func() os.FileInfo {
		t.Helper()
		if err := f.Flush(); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(dir, cache.PresentName))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	first := flush()
	if second := flush(); !os.SameFile(first, second) {
		t.Error("the map was written again although nothing has changed")
	}
	add(t, f, 1)
	if third := flush(); os.SameFile(first, third) {
		t.Error("the map was not written although a chunk was added")
	}
}

func TestDamagedMap(t *testing.T) {
	const n = 70
	for name, damage := range map[string]func([]byte) []byte{
		"empty":      func([]byte) []byte { return nil },
		"short":      func(p []byte) []byte { return p[:10] },
		"torn":       func(p []byte) []byte { return p[:len(p)-1] },
		"longer":     func(p []byte) []byte { return append(p, 0) },
		"zeros":      func(p []byte) []byte { return make([]byte, len(p)) },
		"magic":      func(p []byte) []byte { p[0]++; return p },
		"count":      func(p []byte) []byte { binary.LittleEndian.PutUint64(p[8:], n+1); return p },
		"huge count": func(p []byte) []byte { binary.LittleEndian.PutUint64(p[8:], 1<<63); return p },
		"a bit more": func(p []byte) []byte { p[20] ^= 2; return p },
		"checksum":   func(p []byte) []byte { p[16]++; return p },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			f := open(t, dir, n)
			add(t, f, 0, 64)
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, cache.PresentName)
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, damage(raw), 0o600); err != nil {
				t.Fatal(err)
			}
			f = open(t, dir, n)
			check(t, f, n, map[int]bool{})
			// It is put right by the next flush.
			add(t, f, 5)
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			check(t, open(t, dir, n), n, map[int]bool{5: true})
		})
	}
}

// A map that names chunks that there are not does not make a cache complete.
func TestStrayBits(t *testing.T) {
	const n = 3
	dir := t.TempDir()
	f := open(t, dir, n)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, cache.PresentName)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw[20] = 0b1111_1001 // chunks 0 and 3 to 7
	binary.LittleEndian.PutUint32(raw[16:], crc32.Checksum(raw[20:], crc32.MakeTable(crc32.Castagnoli)))
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	f = open(t, dir, n)
	if !f.Has(0) || f.Present() != 1 || f.Complete() {
		t.Errorf("%d chunks are present, complete is %v", f.Present(), f.Complete())
	}
}

// A map says nothing about a data file of another size, or about another layer's.
func TestForeignMap(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, 4)
	add(t, f, 0, 1, 2, 3)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	t.Run("of more chunks", func(t *testing.T) {
		f := openIn(t, dir, layout(t, 4*chunk, chunk, chunk, chunk, 1, chunk-1), unlimited())
		if f.Present() != 0 || f.Complete() {
			t.Errorf("%d chunks are present", f.Present())
		}
	})
	for _, size := range []int64{0, 1, 3 * chunk, 4*chunk - 1, 4*chunk + 1, 8 * chunk} {
		t.Run(fmt.Sprintf("of a file of %d bytes", size), func(t *testing.T) {
			dir := t.TempDir()
			f := open(t, dir, 4)
			add(t, f, 0, 1, 2, 3)
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			data := filepath.Join(dir, cache.DataName)
			if err := os.Truncate(data, size); err != nil {
				t.Fatal(err)
			}
			check(t, open(t, dir, 4), 4, map[int]bool{})
			if info, err := os.Stat(data); err != nil || info.Size() != 4*chunk {
				t.Errorf("data file: %v, error %v", info, err)
			}
			// Nor does it come back.
			check(t, open(t, dir, 4), 4, map[int]bool{})
		})
	}
}

func TestConcurrentUse(t *testing.T) {
	const n = 512
	dir := t.TempDir()
	f := open(t, dir, n)
	var done atomic.Bool
	var g, flushing errgroup.Group
	flushing.Go(func() error {
		for !done.Load() {
			if err := f.Flush(); err != nil {
				return err
			}
			if f.Complete() && f.Present() != n {
				return errors.New("complete with chunks missing")
			}
		}
		return nil
	})
	for part := range 4 {
		g.Go(func() error {
			for i := part; i < n; i += 4 {
				if err := store(f, i, content(i)); err != nil {
					return err
				}
				if !f.Has(i) {
					return fmt.Errorf("chunk %d is not there", i)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	done.Store(true)
	if err := flushing.Wait(); err != nil {
		t.Error(err)
	}
	if err := f.Flush(); err != nil {
		t.Error(err)
	}
	all := map[int]bool{}
	for i := range n {
		all[i] = true
	}
	check(t, f, n, all)
	check(t, open(t, dir, n), n, all)
	if !f.Complete() {
		t.Error("not complete")
	}
}

func TestOpenFails(t *testing.T) {
	if _, err := cache.Open(filepath.Join(t.TempDir(), "none"), blocks(t, 0), unlimited()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, cache.PresentName), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, cache.DataName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := cache.Open(dir, blocks(t, 0), unlimited()); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("map that cannot be read: %v", err)
	}
}

func TestAllocated(t *testing.T) {
	f := open(t, t.TempDir(), 1000)
	empty := f.Allocated()
	add(t, f, 1, 500, 999)
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := f.Allocated(); empty > chunk || got < 3*chunk || got > 100*chunk {
		t.Errorf("three chunks of a file with 1000 take %d bytes, none %d", got, empty)
	}
}
