// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast/holdfast/internal/index"
)

const testChunk = 64 << 10

// newFile is a file of so many chunks, and its space, which has a limit.
func newFile(t *testing.T, dir string, chunks int, limit int64) *File {
	t.Helper()
	idx := &index.Index{DeviceSize: int64(chunks) * testChunk}
	for i := range chunks {
		idx.Chunks = append(idx.Chunks, index.Chunk{Offset: int64(i) * testChunk, Size: testChunk})
	}
	name := filepath.Join(t.TempDir(), "chunks")
	file, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(index.WriteTable(file, idx), file.Close()); err != nil {
		t.Fatal(err)
	}
	table, err := index.OpenTable(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := Open(dir, table, NewSpace(limit, slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.Close() // some tests have done so
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func chunkBytes(i int) []byte { return bytes.Repeat([]byte{byte(i + 1)}, testChunk) }

func storeChunk(t *testing.T, f *File, i int) error {
	t.Helper()
	w, err := f.Begin(t.Context(), i)
	if err != nil {
		return err
	}
	defer w.Abort()
	if _, err := w.Write(chunkBytes(i)); err != nil {
		return err
	}
	return w.Commit()
}

// namedOnDisk are the chunks that the map on disk names: all that counts after a crash.
func namedOnDisk(t *testing.T, f *File) []uint64 {
	t.Helper()
	raw, err := os.ReadFile(f.mapName())
	if errors.Is(err, os.ErrNotExist) {
		return make([]uint64, len(f.bits))
	}
	if err != nil {
		t.Fatal(err)
	}
	words := decode(raw, f.table.Len())
	if words == nil {
		t.Fatal("the map on disk is damaged")
	}
	return words
}

// checkDisk compares the chunks that the map on disk names with the data.
func checkDisk(t *testing.T, f *File) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(f.dir, DataName))
	if err != nil {
		t.Fatal(err)
	}
	words := namedOnDisk(t, f)
	for i := range f.table.Len() {
		if words[i/64]&(1<<(i%64)) != 0 && !bytes.Equal(data[i*testChunk:][:testChunk], chunkBytes(i)) {
			t.Errorf("a crash now would leave chunk %d present without its bytes", i)
		}
	}
}

// What a crash leaves is right before and after each step of an eviction.
func TestCrashInAnEviction(t *testing.T) {
	const n = 200
	f := newFile(t, t.TempDir(), n, 64*testChunk)
	sync, punch, punched := f.sync, f.punchHole, 0
	f.sync = func() error {
		checkDisk(t, f)
		defer checkDisk(t, f)
		return sync()
	}
	f.punchHole = func(off, end int64) error {
		punched++
		words := namedOnDisk(t, f)
		for i := int(off / testChunk); int64(i)*testChunk < end; i++ {
			if words[i/64]&(1<<(i%64)) != 0 {
				t.Errorf("chunk %d is punched while the map on disk names it", i)
			}
		}
		checkDisk(t, f)
		defer checkDisk(t, f)
		return punch(off, end)
	}
	for i := range n {
		if err := storeChunk(t, f, i); err != nil {
			t.Fatal(err)
		}
		if i%10 == 9 {
			if err := f.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if punched == 0 || f.Present() == 0 || f.Present() > 64 {
		t.Errorf("%d holes, %d chunks are present", punched, f.Present())
	}
	words := namedOnDisk(t, f)
	if count(words) == 0 {
		t.Error("the map on disk names nothing")
	}
}

// An eviction while a Flush waits for the disk.
func TestEvictionDuringAFlush(t *testing.T) {
	f := newFile(t, t.TempDir(), 64, 0)
	for i := range 64 {
		if err := storeChunk(t, f, i); err != nil {
			t.Fatal(err)
		}
	}
	sync := f.sync
	f.sync = func() error {
		if freed := f.space.pass(16 * testChunk); freed < 16*testChunk {
			t.Errorf("freed %d bytes", freed)
		}
		// What was evicted is there again, but not durable.
		for i := range 64 {
			if !f.Has(i) {
				if err := storeChunk(t, f, i); err != nil {
					t.Error(err)
				}
			}
		}
		return sync()
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := count(namedOnDisk(t, f)); got > 48 || f.Complete() || f.Present() != 64 {
		t.Errorf("the map names %d chunks, complete is %v, present are %d", got, f.Complete(), f.Present())
	}
	f.sync = sync
	if err := f.Flush(); err != nil || !f.Complete() {
		t.Errorf("error %v, complete is %v", err, f.Complete())
	}
}

// Without a map that does not name them, chunks are not punched.
func TestEvictionWithoutMap(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f := newFile(t, dir, 8, 0)
	for i := range 8 {
		if err := storeChunk(t, f, i); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	f.punchHole = func(int64, int64) error {
		t.Error("punched")
		return nil
	}
	if err := os.Rename(dir, dir+"-away"); err != nil {
		t.Fatal(err)
	}
	if freed := f.space.pass(testChunk); freed != 0 {
		t.Errorf("freed %d bytes", freed)
	}
	if f.Complete() || f.Freeze() {
		t.Error("complete although nobody knows what the map on disk names")
	}
	if err := os.Rename(dir+"-away", dir); err != nil {
		t.Fatal(err)
	}
	if err := f.Flush(); err != nil || !f.Complete() {
		t.Errorf("error %v, complete is %v", err, f.Complete())
	}
	checkDisk(t, f)
}

func TestSyncFails(t *testing.T) {
	f := newFile(t, t.TempDir(), 8, 0)
	for i := range 4 {
		if err := storeChunk(t, f, i); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	for i := 4; i < 6; i++ {
		if err := storeChunk(t, f, i); err != nil {
			t.Fatal(err)
		}
	}
	w, err := f.Begin(t.Context(), 6)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(chunkBytes(6)); err != nil {
		t.Fatal(err)
	}
	sync, boom := f.sync, errors.New("boom")
	f.sync = func() error { return boom }
	release, err := f.Hold(t.Context(), 4, 5)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Flush(); !errors.Is(err, boom) {
		t.Errorf("flush: %v", err)
	}
	if _, err := f.ReadAt(make([]byte, 10), 4*testChunk); !errors.Is(err, ErrAbsent) {
		t.Errorf("what may be lost was read: %v", err)
	}
	release()
	if err := w.Commit(); err == nil {
		t.Error("what was written before was taken for whole")
	}
	f.sync = sync
	for i := range 8 {
		if f.Has(i) != (i < 4) {
			t.Errorf("chunk %d: present is %v", i, f.Has(i))
		}
	}
	if got := f.space.Stats().Used; got != 4*testChunk {
		t.Errorf("%d bytes count as used", got)
	}
	for i := 4; i < 8; i++ {
		if err := storeChunk(t, f, i); err != nil {
			t.Error(err)
		}
	}
	if err := f.Flush(); err != nil || !f.Complete() {
		t.Errorf("error %v, complete is %v", err, f.Complete())
	}
	checkDisk(t, f)
}

func TestBucketsAreInOrder(t *testing.T) {
	last := 0
	for _, age := range []uint32{0, 1, 15, 16, 17, 31, 32, 34, 63, 64, 1000, 1 << 20, 1 << 31, 1<<32 - 1} {
		b := bucket(age)
		if b < last || b >= buckets || age > 0 && b == 0 {
			t.Errorf("age %d is in bucket %d, the one before in %d", age, b, last)
		}
		last = b
	}
}
