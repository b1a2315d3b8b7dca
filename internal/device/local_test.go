// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/testimage"
)

// shelf is what of other devices is local.
type shelf struct {
	from []*rig
	lend func() // called before a chunk is lent; may be nil
	gone bool   // Lend finds nothing, although Has does

	mu    sync.Mutex // protects asked
	asked []index.Chunk
}

func (s *shelf) find(c index.Chunk) (*rig, int) {
	for _, r := range s.from {
		for i, o := range r.index.Chunks {
			if o.Digest == c.Digest && o.Size == c.Size && r.cache.Stored(i) {
				return r, i
			}
		}
	}
	return nil, 0
}

func (s *shelf) Has(c index.Chunk) bool {
	s.mu.Lock()
	s.asked = append(s.asked, c)
	s.mu.Unlock()
	r, _ := s.find(c)
	return r != nil
}

func (s *shelf) Lend(c index.Chunk) *cache.Loan {
	if s.lend != nil {
		s.lend()
	}
	if r, i := s.find(c); r != nil && !s.gone {
		return r.cache.Lend(i)
	}
	return nil
}

// versions are two layers that have all files in common but these.
func versions(t *testing.T, f testimage.Format, changed ...int) (old, newer made) {
	t.Helper()
	var one, two []testimage.File
	for i := range 20 {
		name, size := fmt.Sprintf("file-%02d", i), 3000+i*20_000
		one = append(one, file(name, size, uint64(i)))
		if slices.Contains(changed, i) {
			size += 100
		}
		two = append(two, file(name, size, uint64(i)))
	}
	return makeLayer(t, f, testimage.Options{}, one...), makeLayer(t, f, testimage.Options{}, two...)
}

// local is a device that is complete.
func local(t *testing.T, m made) *rig {
	t.Helper()
	r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
	if err := r.PrefetchBlob(t.Context(), 1<<40, Profile); err != nil {
		t.Fatal(err)
	}
	return r
}

func newBorrower(t *testing.T, m made, s *shelf, sources ...blob.Source) *rig {
	t.Helper()
	r := newRig(t, m, rigOptions{}, sources...)
	r.Device.local = s
	return r
}

// foreign are the chunks of a layer that another does not have.
func (m made) foreign(other made) (chunks []index.Chunk) {
	for _, c := range m.index.Chunks {
		if !slices.ContainsFunc(other.index.Chunks, func(o index.Chunk) bool { return o.Digest == c.Digest && o.Size == c.Size }) {
			chunks = append(chunks, c)
		}
	}
	return chunks
}

// All of a layer, however it is asked for, when most of it is local under another:
// only the rest is fetched, and every byte is right.
func TestCopiesWhatIsLocal(t *testing.T) {
	for _, format := range formats() {
		old, newer := versions(t, format, 3, 4, 11)
		from := local(t, old)
		want := newer.foreign(old)
		var size int64
		for _, c := range want {
			size += c.BlobSize
		}
		for name, get := range map[string]func(*rig) error{
			"read at once": func(r *rig) error { return r.check(t.Context(), 0, int(r.Size())) },
			"read in order": func(r *rig) error {
				for off := int64(0); off < r.Size(); off += 50_000 {
					if err := r.check(t.Context(), off, int(min(50_000, r.Size()-off))); err != nil {
						return err
					}
				}
				return nil
			},
			"read at random": func(r *rig) error {
				for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(r.table.Len()) { //nolint:gosec // no secret
					if c := r.table.At(i); r.check(t.Context(), c.Offset, int(c.Size)) != nil {
						return errors.New("it failed")
					}
				}
				return nil
			},
			"read by many": func(r *rig) error {
				var g errgroup.Group
				for range 8 {
					g.Go(func() error { return r.check(t.Context(), 0, int(r.Size())) })
				}
				return g.Wait()
			},
			"prefetched": func(r *rig) error { return r.Prefetch(t.Context(), 0, int(r.Size()), Profile) },
			"filled": func(r *rig) error {
				var paid int64
				err := r.FillMissing(t.Context(), func(_ context.Context, n int64) error { paid += n; return nil })
				if err == nil && (paid < size/2 || paid > size) {
					err = fmt.Errorf("paid for %d bytes, want %d", paid, size)
				}
				return err
			},
		} {
			t.Run(fmt.Sprintf("%s, %s", format, name), func(t *testing.T) {
				src := watch(blobtest.NewMemory(newer.blob))
				r := newBorrower(t, newer, &shelf{from: []*rig{from}}, src)
				if err := get(r); err != nil {
					t.Fatal(err)
				}
				r.quiet(t)
				if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
					t.Fatal(err)
				}
				s := r.Stats()
				if s.Present != s.Chunks || s.CopiedChunks != int64(s.Chunks-len(want)) || s.Copied == 0 {
					t.Errorf("%d chunks of %d were to be fetched: %+v", len(want), s.Chunks, s)
				}
				var fetched int64
				for _, call := range src.seen() {
					fetched += call.Length
				}
				if fetched != s.Fetched || fetched > size+int64(len(want))*maxCopiedGap {
					t.Errorf("%d bytes were asked for, want %d: %+v", fetched, size, s)
				}
			})
		}
	}
}

func TestCopyNeedsNoSource(t *testing.T) {
	m := chunked(t, 20)
	r := newBorrower(t, m, &shelf{from: []*rig{local(t, m)}})
	if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
		t.Fatal(err)
	}
	if s := r.Stats(); s.Requests != 0 || s.Fetched != 0 || s.CopiedChunks != int64(s.Chunks) {
		t.Errorf("%+v", s)
	}
}

// spoil changes chunk i on disk, behind the cache's back.
func (r *rig) spoil(t *testing.T, i int) {
	t.Helper()
	r.forget(t)
	w, err := r.cache.Begin(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, r.table.At(i).Size)); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
}

// What is local is not believed either, and may have gone.
func TestCopyFails(t *testing.T) {
	m := chunked(t, 3)
	for _, tt := range []struct {
		name  string
		spoil func(*shelf)
	}{
		{"damaged", func(s *shelf) { s.from[0].spoil(t, firstChunk) }},
		{"gone", func(s *shelf) { s.gone = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &shelf{from: []*rig{local(t, m)}}
			tt.spoil(s)
			r := newBorrower(t, m, s, blobtest.NewMemory(m.blob))
			if err := r.check(t.Context(), base, 100); err != nil {
				t.Fatal(err)
			}
			if s := r.Stats(); s.CopiedChunks != 0 || s.Requests != 1 || s.Fetched == 0 {
				t.Errorf("%+v", s)
			}
			alone := newBorrower(t, m, s)
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := alone.read(ctx, base, chunkSize); err == nil {
				t.Error("without a source it was read")
			}
			if alone.quiet(t); alone.cache.Has(firstChunk) {
				t.Error("it is in the cache")
			}
		})
	}
}

// A chunk without a digest of its own is like no other.
func TestNoDigestIsNotLookedUp(t *testing.T) {
	m := chunked(t, 3)
	m.index.Chunks[firstChunk].Digest = [32]byte{}
	s := &shelf{from: []*rig{local(t, chunked(t, 3))}}
	r := newBorrower(t, m, s)
	r.mu.Lock()
	copied, away := r.split([]int{firstChunk, firstChunk + 1})
	spared := r.spared(r.table.At(firstChunk))
	r.mu.Unlock()
	if !slices.Equal(copied, []int{firstChunk + 1}) || !slices.Equal(away, []int{firstChunk}) || spared {
		t.Errorf("copied %v, fetched %v, spared %v", copied, away, spared)
	}
	if slices.ContainsFunc(s.asked, func(c index.Chunk) bool { return !c.HasDigest() }) {
		t.Error("it was looked up")
	}
}

// A miss takes along no neighbours that are local elsewhere, but goes through them.
func TestNeighboursAreSpared(t *testing.T) {
	const n, size = 40, 1000
	var one, two []testimage.File
	for i := range uint64(n) {
		name, seed := fmt.Sprintf("file-%02d", i), i
		one = append(one, file(name, size, seed))
		if i%4 == 0 {
			seed += n
		}
		two = append(two, file(name, size, seed))
	}
	old, newer := makeLayer(t, testimage.EStargz, testimage.Options{}, one...), makeLayer(t, testimage.EStargz, testimage.Options{}, two...)
	src := watch(blobtest.NewMemory(newer.blob))
	r := newBorrower(t, newer, &shelf{from: []*rig{local(t, old)}}, src)
	first := slices.IndexFunc(newer.index.Chunks, func(c index.Chunk) bool { return c.Size == size })
	for _, i := range []int{first + 1, first + 8} { // one that is copied, one that is not
		if err := r.check(t.Context(), newer.index.Chunks[i].Offset, 100); err != nil {
			t.Fatal(err)
		}
	}
	r.quiet(t)
	for i := first + 2; i < first+n; i++ {
		// The others that are changed came along; what is local did not.
		if want := (i-first)%4 == 0; r.cache.Has(i) != want {
			t.Errorf("chunk %d: there %v", i-first, !want)
		}
	}
	if calls := src.seen(); len(calls) != 1 {
		t.Errorf("calls %v", calls)
	}
}

// A reader that leaves ends the copies that nobody else waits for.
func TestLeavingEndsCopies(t *testing.T) {
	m := chunked(t, 20)
	ctx, cancel := context.WithCancel(t.Context())
	src := watch(blobtest.NewMemory(m.blob))
	left := make(chan struct{})
	r := newBorrower(t, m, &shelf{from: []*rig{local(t, m)}, lend: func() { cancel(); <-left }}, src)
	if _, err := r.read(ctx, 0, int(r.Size())); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	close(left)
	r.quiet(t)
	if s := r.Stats(); s.CopiedChunks == int64(s.Chunks) || s.Fetched != 0 || len(src.seen()) > 0 {
		t.Errorf("%+v, calls %v", s, src.seen())
	}
	if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
		t.Error(err)
	}
}
