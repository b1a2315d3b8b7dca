// SPDX-License-Identifier: Apache-2.0

package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/testimage"
)

// Every byte of every format, at the borders of blocks, files and chunks.
func TestReadsWhatTheLayerHolds(t *testing.T) {
	files := []testimage.File{
		file("empty", 0, 1), file("one", 1, 2), file("block", 4096, 3), file("more", 4097, 4),
		file("chunk", chunkSize, 5), file("longer", chunkSize+1, 6), file("long", 5*chunkSize+100, 7),
	}
	for _, format := range formats() {
		for _, shared := range []int{0, 50_000} {
			t.Run(fmt.Sprintf("%s, frames of %d", format, shared), func(t *testing.T) {
				t.Parallel()
				m := makeLayer(t, format, testimage.Options{MinChunkSize: shared}, files...)
				r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
				size := r.Size()
				for _, at := range []int64{0, 4096, 8192, 3 * 4096, size - chunkSize, size - 4096, size} {
					for _, d := range []int64{-1, 0, 1} {
						for _, n := range []int64{1, 2, 4095, 4096, 4097, chunkSize, 2*chunkSize + 1} {
							off := at + d
							if off < 0 || off+n > size {
								continue
							}
							if err := r.check(t.Context(), off, int(n)); err != nil {
								t.Fatalf("%d+%d: %v", off, n, err)
							}
						}
					}
				}
				if err := r.check(t.Context(), 0, int(size)); err != nil {
					t.Fatal(err)
				}
				if s := r.Stats(); s.Present != s.Chunks || s.Chunks == 0 || s.Requests == 0 || s.Touched == 0 || s.Failures != 0 || s.Corrupt != 0 {
					t.Errorf("stats are %+v", s)
				}
			})
		}
	}
}

func TestRangesOutsideOfTheDevice(t *testing.T) {
	m := chunked(t, 2)
	r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
	size := r.Size()
	for _, c := range []struct {
		off int64
		n   int
	}{{-1, 1}, {size, 1}, {size - 1, 2}, {0, int(size) + 1}, {1<<63 - 1, 1}} {
		if err := r.wait(t.Context(), c.off, c.n); err == nil {
			t.Errorf("%d+%d: no error", c.off, c.n)
		}
	}
}

func TestWithoutSource(t *testing.T) {
	m := chunked(t, 1)
	r := newRig(t, m, rigOptions{quick: true})
	if err := r.Prefetch(t.Context(), 0, 1, Fill); !errors.Is(err, ErrNoSource) {
		t.Errorf("error %v", err)
	}
	// Sources may come a little later than readers, after a start.
	read := make(chan error, 1)
	go func() { read <- r.check(t.Context(), 0, int(r.Size())) }()
	eventually(t, func() bool { return r.waiting() > 0 })
	r.AddSources([]blob.Source{blobtest.NewMemory(m.blob)})
	if err := receive(t, read); err != nil {
		t.Error(err)
	}
}

// What is present is read without a request, also by a later device.
func TestWhatIsLocalNeedsNoSource(t *testing.T) {
	m := chunked(t, 3)
	dir := t.TempDir()
	first := newRig(t, m, rigOptions{dir: dir}, blobtest.NewMemory(m.blob))
	if err := first.check(t.Context(), 0, int(first.Size())); err != nil {
		t.Fatal(err)
	}
	first.Device.Close()
	if err := first.cache.Close(); err != nil {
		t.Fatal(err)
	}
	second := newRig(t, m, rigOptions{dir: dir})
	if err := second.check(t.Context(), 0, int(second.Size())); err != nil {
		t.Error(err)
	}
	if !second.cache.Complete() {
		t.Error("the cache is not complete")
	}
}

func TestReadersOfAChunkShareOneRequest(t *testing.T) {
	m := chunked(t, 1)
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = always
	r := newRig(t, m, rigOptions{}, src)
	const readers = 20
	var g errgroup.Group
	for i := range readers {
		g.Go(func() error { return r.check(t.Context(), base+int64(100*i), 1000) })
	}
	eventually(t, func() bool { return r.waiting() == readers })
	close(src.release)
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if calls := src.seen(); len(calls) != 1 {
		t.Errorf("%d requests: %v", len(calls), calls)
	}
}

func TestNeighboursShareOneRequest(t *testing.T) {
	for _, format := range formats() {
		var files []testimage.File
		for i := range 20 {
			files = append(files, file(fmt.Sprint("file", i), 3000, uint64(i))) //nolint:gosec // small
		}
		m := makeLayer(t, format, testimage.Options{}, files...)
		src := watch(blobtest.NewMemory(m.blob))
		r := newRig(t, m, rigOptions{}, src)
		if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
			t.Errorf("%s: %v", format, err)
		}
		if calls := src.seen(); len(calls) != 1 {
			t.Errorf("%s: %d requests for %d chunks next to each other: %v", format, len(calls), r.table.Len(), calls)
		}
		if s := r.Stats(); s.Requests != 1 {
			t.Errorf("%s: stats are %+v", format, s)
		}
	}
}

func TestTheLastReaderThatLeavesEndsTheFetch(t *testing.T) {
	m := chunked(t, 1)
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = always
	r := newRig(t, m, rigOptions{}, src)

	wait := func() (leave context.CancelFunc, left chan error) {
		ctx, cancel := context.WithCancel(t.Context())
		left = make(chan error, 1)
		before := r.waiting()
		go func() { left <- r.wait(ctx, base, 10) }()
		eventually(t, func() bool { return r.waiting() == before+1 })
		return cancel, left
	}
	leave1, left1 := wait()
	leave2, left2 := wait()
	leave1()
	if err := receive(t, left1); !errors.Is(err, context.Canceled) {
		t.Errorf("first reader: %v", err)
	}
	select {
	case err := <-src.ended:
		t.Fatalf("the fetch ended (%v) although somebody waits", err)
	case err := <-left2:
		t.Fatalf("second reader: %v", err)
	default:
	}
	leave2()
	if err := receive(t, left2); !errors.Is(err, context.Canceled) {
		t.Errorf("second reader: %v", err)
	}
	if err := receive(t, src.ended); !errors.Is(err, errAbandoned) {
		t.Errorf("the fetch ended with %v", err)
	}
	// The next reader starts afresh, and nobody blames the source.
	close(src.release)
	if err := r.check(t.Context(), base, chunkSize); err != nil {
		t.Error(err)
	}
	if s := r.Stats(); s.Failures != 0 || s.LastError != "" {
		t.Errorf("stats are %+v", s)
	}
}

func TestAReaderThatLeavesDisturbsNobody(t *testing.T) {
	m := chunked(t, 1)
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = always
	r := newRig(t, m, rigOptions{}, src)
	ctx, leave := context.WithCancel(t.Context())
	left, stayed := make(chan error, 1), make(chan error, 1)
	go func() { left <- r.wait(ctx, base, 10) }()
	go func() { stayed <- r.check(t.Context(), base, chunkSize) }()
	eventually(t, func() bool { return r.waiting() == 2 })
	leave()
	if err := receive(t, left); !errors.Is(err, context.Canceled) {
		t.Errorf("who left: %v", err)
	}
	close(src.release)
	if err := receive(t, stayed); err != nil {
		t.Errorf("who stayed: %v", err)
	}
	if n := len(src.seen()); n != 1 {
		t.Errorf("%d requests", n)
	}
}

// A reader that joins a fetch in the very moment in which its last one leaves
// gets its bytes none the less.
func TestReadersThatComeAndGo(t *testing.T) {
	m := chunked(t, 4)
	r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
	var g errgroup.Group
	for i := range 8 {
		g.Go(func() error {
			random := rand.New(rand.NewPCG(1, uint64(i))) //nolint:gosec // no secret
			for range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				var leaving sync.WaitGroup
				if random.IntN(2) == 0 {
					leaving.Go(cancel)
				}
				err := r.check(ctx, base+random.Int64N(3)*chunkSize, chunkSize)
				leaving.Wait()
				if err != nil && ctx.Err() == nil {
					cancel()
					return err
				}
				cancel()
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestCloseEndsReaders(t *testing.T) {
	m := chunked(t, 2)
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = always
	r := newRig(t, m, rigOptions{}, src)
	read := make(chan error, 1)
	go func() { read <- r.wait(t.Context(), base, 10) }()
	receive(t, src.opened)
	r.Device.Close()
	if err := receive(t, read); !errors.Is(err, errClosed) {
		t.Errorf("reader got %v", err)
	}
	if err := r.wait(t.Context(), base, 10); !errors.Is(err, errClosed) {
		t.Errorf("later reader got %v", err)
	}
	if err := r.PrefetchBlob(t.Context(), 1<<60, Fill); !errors.Is(err, errClosed) {
		t.Errorf("prefetch got %v", err)
	}
	if s := r.Stats(); s.Failures != 0 {
		t.Errorf("stats are %+v", s)
	}
}

func TestReadsAheadOfASequentialReader(t *testing.T) {
	m := chunked(t, 128)
	src := watch(blobtest.NewMemory(m.blob))
	r := newRig(t, m, rigOptions{}, src)
	half := r.Size() / 2
	for off := int64(0); off < half; off += chunkSize {
		if err := r.check(t.Context(), off, chunkSize); err != nil {
			t.Fatal(err)
		}
	}
	r.quiet(t)
	calls := len(src.seen())
	if !r.cache.Has(r.table.Search(half)) {
		t.Error("what follows is not there")
	}
	if calls >= r.table.Len()/2 {
		t.Errorf("%d requests for %d chunks read in order", calls, r.table.Len()/2)
	}
}

// Whatever sources do, a read has the right bytes or an error.
func TestRightBytesOrAnError(t *testing.T) {
	for _, format := range formats() {
		t.Run(string(format), func(t *testing.T) {
			t.Parallel()
			m := makeLayer(t, format, testimage.Options{MinChunkSize: 20_000},
				file("a", 3*chunkSize, 1), file("b", 5000, 2), file("c", 9000, 3), file("d", 4*chunkSize+7, 4))
			for seed := range uint64(8) {
				src := blobtest.Inject(blobtest.NewMemory(m.blob), script(seed))
				r := newRig(t, m, rigOptions{quick: true}, src, named{src, "again"})
				failed, right := 0, 0
				random := rand.New(rand.NewPCG(seed, 2)) //nolint:gosec // no secret
				for range 60 {
					off := random.Int64N(r.Size())
					err := r.check(t.Context(), off, int(min(r.Size()-off, random.Int64N(2*chunkSize)+1)))
					switch {
					case err == nil:
						right++
					case strings.Contains(err.Error(), "wrong bytes"):
						t.Errorf("seed %d: %v", seed, err)
					default:
						failed++
					}
				}
				if right == 0 {
					t.Errorf("seed %d: no read out of %d succeeded", seed, failed)
				}
				// Nothing that arrived stays on the way for ever.
				r.setSources([]blob.Source{blobtest.NewMemory(m.blob)})
				r.quiet(t)
				if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
					t.Errorf("seed %d, with a good source: %v", seed, err)
				}
			}
		})
	}
}

// script makes about every second call go wrong.
func script(seed uint64) func(blobtest.Call) blobtest.Fault {
	var mu sync.Mutex
	random := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // no secret
	return func(c blobtest.Call) blobtest.Fault {
		mu.Lock()
		defer mu.Unlock()
		f := blobtest.Fault{At: random.Int64N(c.Length)}
		switch random.IntN(10) {
		case 0:
			f.OpenErr = blob.Temporary(errors.New("server error"))
		case 1:
			f.OpenErr = blob.ErrNotFound
		case 2:
			f.ReadErr = errors.New("connection reset")
		case 3:
			f.Truncate = true
		case 4, 5:
			f.Flip = byte(1 + random.IntN(255))
		}
		return f
	}
}

func TestStatsNameTheLastError(t *testing.T) {
	m := chunked(t, 1)
	boom := errors.New("boom")
	r := newRig(t, m, rigOptions{}, faults(blobtest.NewMemory(m.blob), blobtest.Fault{OpenErr: boom}))
	if err := r.wait(t.Context(), base, 1); !errors.Is(err, boom) {
		t.Errorf("error %v", err)
	}
	s := r.Stats()
	if s.Failures != 1 || !strings.Contains(s.LastError, "boom") || s.Present != 0 {
		t.Errorf("stats are %+v", s)
	}
	if !bytes.Contains([]byte(s.LastError), []byte(r.desc.Digest)) {
		t.Errorf("error does not name the layer: %s", s.LastError)
	}
}
