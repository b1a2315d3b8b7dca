// SPDX-License-Identifier: Apache-2.0

package cache_test

import (
	"os"
	"slices"
	"testing"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/killtest"
)

const (
	killedChunk  = 64 << 10
	killedChunks = 48 // over three extents
	killedLimit  = 32 * killedChunk
	// notSwept is what may be on disk of chunks that are not present: File.sweep
	// takes so little for the file system's own.
	notSwept = 64 << 10
)

func killedTable(t *testing.T) *index.Table {
	t.Helper()
	return layout(t, killedChunks*killedChunk, same(killedChunks, killedChunk)...)
}

// readOn reads chunks one after the other, stores those that are missing, which
// evicts others, and makes all durable from time to time.
func readOn(t *testing.T, f *cache.File, table *index.Table, first, end int) error {
	t.Helper()
	for i := first; i < end; i++ {
		if err := readChunk(t.Context(), f, table, i); err != nil {
			return err
		}
		if i%8 == 7 {
			if err := f.Flush(); err != nil {
				return err
			}
		}
	}
	return f.Flush()
}

// An eviction that is killed at any step leaves a cache that has only right
// bytes, no space that is not counted, and most of what it had.
func TestKilledEviction(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		table := killedTable(t)
		f := openIn(t, in.Args[0], table, limited(killedLimit))
		return func() error { return readOn(t, f, table, 32, killedChunks) }
	})
	table := killedTable(t)
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		dir := t.TempDir()
		f := openIn(t, dir, table, limited(killedLimit))
		for i := range 32 {
			if err := store(f, i, fill(table.At(i), i)); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		kill(t, []string{dir})
		space := limited(killedLimit)
		f = openIn(t, dir, table, space)
		checkKilled(t, dir, f, space, table)
		if err := readOn(t, f, table, 32, killedChunks); err != nil {
			t.Error(err)
		}
		checkKilled(t, dir, f, space, table)
		for i := 40; i < killedChunks; i++ {
			if !f.Has(i) {
				t.Errorf("chunk %d, which was just read, is not there", i)
			}
		}
	})
}

func checkKilled(t *testing.T, dir string, f *cache.File, space *cache.Space, table *index.Table) {
	t.Helper()
	for i := range killedChunks {
		if f.Has(i) {
			if err := readChunk(t.Context(), f, table, i); err != nil {
				t.Error(err)
			}
		}
	}
	used := space.Stats().Used
	if f.Present() < 24 || used != int64(f.Present())*killedChunk || used > killedLimit || f.Allocated() > used+notSwept {
		t.Errorf("%d chunks are present, %d bytes count as used, %d are on disk", f.Present(), used, f.Allocated())
	}
	entries, err := os.ReadDir(dir)
	if err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		return e.Name() != cache.DataName && e.Name() != cache.PresentName
	}) {
		t.Errorf("left over: %v, error %v", entries, err)
	}
}
