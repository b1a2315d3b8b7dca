// SPDX-License-Identifier: Apache-2.0

package device

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/estargz"
	"github.com/holdfast/holdfast/internal/index/indextest"
	indexstream "github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/index/zstdchunked"
	"github.com/holdfast/holdfast/internal/testimage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// chunkSize is that of the layers in these tests, where their format lets one choose.
const chunkSize = 64 << 10

// made is a layer with its index and, read by other code, its device.
type made struct {
	blob   []byte
	index  *index.Index
	device []byte
}

// formats are those whose chunks can be fetched one by one, with every compression.
func formats() []testimage.Format {
	return []testimage.Format{
		testimage.Uncompressed, testimage.EStargz, testimage.ZstdChunked, testimage.ZstdChunkedStargz,
	}
}

func file(name string, size int, seed uint64) testimage.File {
	return testimage.File{Header: tar.Header{Name: name}, Content: testimage.Bytes(size, seed)}
}

func makeLayer(t testing.TB, f testimage.Format, o testimage.Options, files ...testimage.File) made {
	t.Helper()
	if o.ChunkSize == 0 {
		o.ChunkSize = chunkSize
	}
	l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(files...), f, o)
	if err != nil {
		t.Fatal(err)
	}
	src := blobtest.NewMemory(l.Bytes)
	desc := blob.Descriptor{Digest: l.Descriptor.Digest, Size: l.Descriptor.Size}
	m := made{blob: l.Bytes}
	switch f {
	case testimage.EStargz:
		m.index, err = estargz.Open(t.Context(), src, desc, l.Descriptor.Annotations)
	case testimage.ZstdChunked, testimage.ZstdChunkedStargz:
		m.index, err = zstdchunked.Open(t.Context(), src, desc, l.Descriptor.Annotations)
	default:
		var res *indexstream.Result
		if res, err = indexstream.Read(t.Context(), bytes.NewReader(l.Bytes), desc.Size, nowhere{}); err == nil {
			m.index = res.Index
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	m.device = indextest.Device(t, m.index, m.blob)
	return m
}

type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// An eStargz starts with a landmark, in a chunk and a block of its own; the
// first chunk of the first file and its offset in the device are these.
const (
	firstChunk = 1
	base       = index.BlockSize
)

// chunked is a layer with one file of n chunks: see firstChunk. The TOC is last.
func chunked(t testing.TB, n int) made {
	t.Helper()
	return makeLayer(t, testimage.EStargz, testimage.Options{}, file("file", n*chunkSize, 1))
}

// rig is a device under test and what it is made of.
type rig struct {
	*Device
	made
	dir string
}

type rigOptions struct {
	dir   string       // of the cache
	space *cache.Space // nil: without a limit
	limit int          // of the scheduler
	sched *Scheduler
	quick bool // pauses between rounds last milliseconds
}

func newRig(t testing.TB, m made, o rigOptions, sources ...blob.Source) *rig {
	t.Helper()
	if o.dir == "" {
		o.dir = t.TempDir()
	}
	if o.limit == 0 {
		o.limit = 8
	}
	if o.sched == nil {
		o.sched = NewScheduler(o.limit)
	}
	name := filepath.Join(t.TempDir(), "chunks")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := index.WriteTable(f, m.index); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	table, err := index.OpenTable(name)
	if err != nil {
		t.Fatal(err)
	}
	if o.space == nil {
		o.space = cache.NewSpace(0, slog.New(slog.DiscardHandler))
	}
	c, err := cache.Open(o.dir, table, o.space)
	if err != nil {
		t.Fatal(err)
	}
	desc := blobtest.Memory{}.Add(m.blob)
	dev := New(Config{
		Descriptor: desc, Table: table, Cache: c, Scheduler: o.sched,
		Logger: slog.New(slog.DiscardHandler),
	})
	if o.quick {
		dev.rounds.Base, dev.rounds.Max = time.Millisecond, 10*time.Millisecond
	}
	dev.setSources(sources)
	t.Cleanup(func() {
		dev.Close()
		_ = c.Close() // some tests have done so
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	return &rig{Device: dev, made: m, dir: o.dir}
}

// wait waits for a range and does not read it.
func (r *rig) wait(ctx context.Context, off int64, n int) error {
	release, err := r.Wait(ctx, off, n)
	if err == nil {
		release()
	}
	return err
}

// read reads as the FUSE server does.
func (r *rig) read(ctx context.Context, off int64, n int) ([]byte, error) {
	release, err := r.Wait(ctx, off, n)
	if err != nil {
		return nil, err
	}
	defer release()
	p := make([]byte, n)
	if n, err := r.ReadAt(p, off); err != nil || n != len(p) {
		return nil, fmt.Errorf("%d bytes, error %w", n, err)
	}
	return p, nil
}

// check reads and compares.
func (r *rig) check(ctx context.Context, off int64, n int) error {
	got, err := r.read(ctx, off, n)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, r.device[off:off+int64(n)]) {
		return fmt.Errorf("wrong bytes in %d+%d: first difference at %d", off, n, firstDifference(got, r.device[off:]))
	}
	return nil
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// quiet waits until nothing is being fetched.
func (r *rig) quiet(t testing.TB) {
	t.Helper()
	eventually(t, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.flights) == 0
	})
}

// waiting is how many readers wait for what the first chunk comes with.
func (r *rig) waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.flights[firstChunk]; f != nil {
		return f.fetch.waiting
	}
	return 0
}

func eventually(t testing.TB, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	timeout := time.After(20 * time.Second)
	for !condition() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatal("it did not happen within 20 seconds")
		}
	}
}

func receive[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatal("nothing happened for 20 seconds")
		panic("unreachable")
	}
}

// watched is a source whose calls are seen, and go on when the test says so.
type watched struct {
	blob.Source
	hold func(blobtest.Call) bool // which calls wait for release; nil: none

	release chan struct{} // closed to let all calls go on
	opened  chan blobtest.Call
	ended   chan error // why the contexts of calls ended while they were held

	mu    sync.Mutex // protects the fields below
	calls []blobtest.Call
}

func watch(src blob.Source) *watched {
	return &watched{
		Source: src, release: make(chan struct{}),
		opened: make(chan blobtest.Call, 1000), ended: make(chan error, 1000),
	}
}

func (w *watched) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	w.mu.Lock()
	call := blobtest.Call{N: len(w.calls) + 1, Desc: desc, Offset: offset, Length: length}
	w.calls = append(w.calls, call)
	w.mu.Unlock()
	w.opened <- call
	if w.hold != nil && w.hold(call) {
		select {
		case <-w.release:
		case <-ctx.Done():
			w.ended <- context.Cause(ctx)
			return nil, ctx.Err()
		}
	}
	return w.Source.Open(ctx, desc, offset, length)
}

// seen returns the calls so far.
func (w *watched) seen() []blobtest.Call {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]blobtest.Call(nil), w.calls...)
}

// sizedChunk is the chunk of a file of that size.
func (m made) sizedChunk(size int64) int {
	return slices.IndexFunc(m.index.Chunks, func(c index.Chunk) bool { return c.Size == size })
}

func always(blobtest.Call) bool { return true }

// faults is a source that misbehaves in the same way every time.
func faults(src blob.Source, f blobtest.Fault) blob.Source {
	return blobtest.Inject(src, func(blobtest.Call) blobtest.Fault { return f })
}

// forget empties the cache.
func (r *rig) forget(t testing.TB) {
	t.Helper()
	r.active.Wait()
	c, err := cache.Open(t.TempDir(), r.table, cache.NewSpace(0, slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	r.cache = c
}

// named is a source with a name of its own.
type named struct {
	blob.Source
	name string
}

func (n named) String() string { return n.name }

// setSources replaces the places the blob is read from.
func (d *Device) setSources(sources []blob.Source) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sources = sources
}
