// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/testimage"
)

// bytesOf are the bytes of the blob that chunks lie in, a range each.
func (m made) bytesOf(chunks ...int) []blob.Range {
	var ranges []blob.Range
	for _, i := range chunks {
		ranges = append(ranges, m.frame(0, i).Range)
	}
	return ranges
}

func present(r *rig) []int {
	var all []int
	for i := range r.table.Len() {
		if r.cache.Has(i) {
			all = append(all, i)
		}
	}
	return all
}

func TestFetchInOrder(t *testing.T) {
	m := chunked(t, 20)
	inside := func(i int) blob.Range { return blob.Range{Offset: m.index.Chunks[i].BlobOffset + 1, Length: 1} }
	last := len(m.index.Chunks) - 1
	for _, c := range []struct {
		name     string
		ranges   []blob.Range
		local    []int // before
		want     []int // local afterwards
		requests int
	}{
		{name: "nothing"},
		{name: "an empty range", ranges: []blob.Range{{Offset: inside(3).Offset}}},
		{name: "one chunk", ranges: m.bytesOf(3), want: []int{3}, requests: 1},
		{name: "neighbours, in any order", ranges: m.bytesOf(5, 4, 6), want: []int{4, 5, 6}, requests: 1},
		{name: "far apart", ranges: m.bytesOf(2, 12), want: []int{2, 12}, requests: 2},
		{name: "the same twice", ranges: m.bytesOf(2, 2), want: []int{2}, requests: 1},
		{name: "one byte is enough", ranges: []blob.Range{inside(7)}, want: []int{7}, requests: 1},
		{name: "all", ranges: []blob.Range{{Offset: 0, Length: math.MaxInt64}}, want: all(last), requests: 1},
		{name: "behind the blob", ranges: []blob.Range{{Offset: math.MaxInt64 - 1, Length: 1}}},
		{name: "what is local already", ranges: m.bytesOf(2, 3, 4), local: []int{2, 4}, want: []int{2, 3, 4}, requests: 1},
		{name: "a small gap in much", ranges: m.bytesOf(1, 2, 3, 4, 5, 6, 7, 8, 10), want: []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, requests: 1},
		{name: "not over what is local", ranges: m.bytesOf(1, 2, 3, 4, 5, 6, 7, 8, 10), local: []int{9}, want: []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, requests: 2},
		{name: "a small gap in little", ranges: m.bytesOf(8, 10), want: []int{8, 10}, requests: 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			src := watch(blobtest.NewMemory(m.blob))
			r := newRig(t, m, rigOptions{}, src)
			if err := r.fetchInOrder(t.Context(), m.bytesOf(c.local...)); err != nil {
				t.Fatal(err)
			}
			before := len(src.seen())
			if err := r.fetchInOrder(t.Context(), c.ranges); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, present(r)); d != "" {
				t.Errorf("local: %s", d)
			}
			if n := len(src.seen()) - before; n != c.requests {
				t.Errorf("%d requests, want %d", n, c.requests)
			}
			if s := r.Stats(); s.Touched != 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

func all(last int) []int {
	var chunks []int
	for i := range last + 1 {
		chunks = append(chunks, i)
	}
	return chunks
}

// What another node recorded fits, whatever its index looks like.
func TestFetchInOrderInAllFormats(t *testing.T) {
	for _, f := range formats() {
		t.Run(string(f), func(t *testing.T) {
			m := makeLayer(t, f, testimage.Options{}, file("a", 10*chunkSize, 1), file("b", 3, 2), file("c", 5*chunkSize, 3))
			r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
			ranges := m.bytesOf(len(m.index.Chunks)/2, 0)
			if err := r.fetchInOrder(t.Context(), ranges); err != nil {
				t.Fatal(err)
			}
			for i, c := range m.index.Chunks {
				covered := slices.ContainsFunc(ranges, func(r blob.Range) bool {
					return c.BlobOffset < r.End() && r.Offset < c.BlobOffset+c.BlobSize
				})
				if covered && !r.cache.Has(i) {
					t.Errorf("chunk %d is missing", i)
				}
			}
		})
	}
}

// All requests are under way at the same time, and a reader joins them.
func TestFetchInOrderIsShared(t *testing.T) {
	m := chunked(t, 20)
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = always
	r := newRig(t, m, rigOptions{}, src)
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- r.fetchInOrder(t.Context(), m.bytesOf(2, 12)) }()
	}
	receive(t, src.opened)
	receive(t, src.opened)
	read := make(chan error, 1)
	go func() { read <- r.check(t.Context(), m.index.Chunks[2].Offset, 10) }()
	eventually(t, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		f := r.flights[2]
		return f != nil && f.fetch.waiting == 1
	})
	close(src.release)
	for _, c := range []chan error{read, done, done} {
		if err := receive(t, c); err != nil {
			t.Error(err)
		}
	}
	if n := len(src.seen()); n != 2 {
		t.Errorf("%d requests", n)
	}
}

func TestFetchInOrderFails(t *testing.T) {
	m := chunked(t, 2)
	boom := errors.New("boom")
	r := newRig(t, m, rigOptions{}, faults(blobtest.NewMemory(m.blob), blobtest.Fault{OpenErr: boom}))
	if err := r.fetchInOrder(t.Context(), m.bytesOf(1)); !errors.Is(err, boom) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = always
	r = newRig(t, m, rigOptions{}, src)
	if err := r.fetchInOrder(ctx, m.bytesOf(1)); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	r.Close()
	if err := r.fetchInOrder(t.Context(), m.bytesOf(1)); !errors.Is(err, errClosed) {
		t.Errorf("error %v", err)
	}
}

// Requests go to the devices in the order in which what they bring is wanted.
func TestFetchInOrderOfDevices(t *testing.T) {
	m := chunked(t, 40)
	src := watch(blobtest.NewMemory(m.blob))
	sched := NewScheduler(8)
	a, b := newRig(t, m, rigOptions{sched: sched}, src), newRig(t, m, rigOptions{sched: sched}, src)
	var piece piece
	for p := range pieces([]Want{
		{b.Device, m.frame(0, 30).Range}, {a.Device, m.frame(0, 20).Range}, {a.Device, m.frame(0, 1).Range},
		{b.Device, m.frame(0, 10).Range}, {b.Device, m.frame(0, 31).Range}, {a.Device, m.frame(0, 20).Range},
	}) {
		piece = p
	}
	var got []string
	for _, r := range piece.requests() {
		got = append(got, fmt.Sprint(map[*Device]string{a.Device: "a", b.Device: "b"}[r.Device], r.chunks))
	}
	if d := cmp.Diff([]string{"b[30 31]", "a[20]", "a[1]", "b[10]"}, got); d != "" {
		t.Error(d)
	}
}

// A hostile index can put all chunks in one frame, and a hostile profile can want
// each byte of that by itself.
func TestPiecesOfManyChunksInAFrame(t *testing.T) {
	const chunks, wants = 1 << 16, 1 << 16
	m := chunked(t, 1)
	c := m.index.Chunks[firstChunk]
	m.index = &index.Index{Compression: index.Gzip, DeviceSize: chunks * index.BlockSize}
	for i := range int64(chunks) {
		c.Offset, c.Size, c.InnerOffset, c.BlobOffset, c.BlobSize = i*index.BlockSize, 1, i, 0, wants
		m.index.Chunks = append(m.index.Chunks, c)
	}
	r := newRig(t, m, rigOptions{})
	var all []Want
	for i := range int64(wants) {
		all = append(all, Want{r.Device, blob.Range{Offset: i, Length: 1}})
	}
	n := 0
	for p := range pieces(all) {
		n += len(p[r.Device])
	}
	if n != chunks {
		t.Errorf("%d chunks", n)
	}
}

// Without room, what is fetched would only displace what is read.
func TestFetchInOrderOnAFullDisk(t *testing.T) {
	m := chunked(t, 20)
	src := watch(blobtest.NewMemory(m.blob))
	r := newRig(t, m, rigOptions{space: cache.NewSpace(1, slog.New(slog.DiscardHandler))}, src)
	defer guide([]Want{{Device: r.Device}})() // nothing comes along
	if err := r.check(t.Context(), base, 1); err != nil {
		t.Fatal(err)
	}
	r.quiet(t)
	before := len(src.seen())
	if err := r.fetchInOrder(t.Context(), m.bytesOf(10)); !errors.Is(err, cache.ErrFull) || len(src.seen()) != before {
		t.Errorf("%d requests, error %v", len(src.seen())-before, err)
	}
}

// While what is wanted is fetched in order, a reader takes nothing along.
func TestReadersGuessLessMeanwhile(t *testing.T) {
	m := chunked(t, 20)
	r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
	end := guide([]Want{{Device: r.Device}, {Device: r.Device}})
	if err := r.check(t.Context(), m.index.Chunks[3].Offset, 1); err != nil {
		t.Fatal(err)
	}
	r.quiet(t)
	if got := present(r); !slices.Equal(got, []int{3}) {
		t.Errorf("local: %v", got)
	}
	end()
	if err := r.check(t.Context(), m.index.Chunks[10].Offset, 1); err != nil {
		t.Fatal(err)
	}
	r.quiet(t)
	if got := present(r); len(got) < 5 {
		t.Errorf("local: %v", got)
	}
}
