// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"testing"

	"github.com/holdfast/holdfast/internal/blob/blobtest"
)

func TestPrefetch(t *testing.T) {
	m := chunked(t, 20)
	for _, until := range []int{0, 1, 7, 20, 21} { // chunks; 21: the TOC's as well
		src := watch(blobtest.NewMemory(m.blob))
		r := newRig(t, m, rigOptions{}, src)
		end := int64(len(m.blob))
		if until < len(m.index.Chunks) {
			end = m.index.Chunks[until].BlobOffset
		}
		if err := r.PrefetchBlob(t.Context(), end, Profile); err != nil {
			t.Fatal(err)
		}
		want := min(until, len(m.index.Chunks))
		if s := r.Stats(); s.Present != want || s.Touched != 0 {
			t.Errorf("up to chunk %d: stats %+v", until, s)
		}
		if n := len(src.seen()); n > 1 {
			t.Errorf("up to chunk %d: %d requests", until, n)
		}
		calls := len(src.seen())
		if err := r.PrefetchBlob(t.Context(), end, Fill); err != nil || len(src.seen()) != calls {
			t.Errorf("again: %d requests more, error %v", len(src.seen())-calls, err)
		}
	}
}

func TestPrefetchFails(t *testing.T) {
	m := chunked(t, 2)
	boom := errors.New("boom")
	r := newRig(t, m, rigOptions{}, faults(blobtest.NewMemory(m.blob), blobtest.Fault{OpenErr: boom}))
	if err := r.PrefetchBlob(t.Context(), 1<<40, Profile); !errors.Is(err, boom) {
		t.Errorf("error %v", err)
	}
}

func TestPrefetchEndsWithItsContext(t *testing.T) {
	m := chunked(t, 2)
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = always
	r := newRig(t, m, rigOptions{}, src)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.PrefetchBlob(ctx, 1<<40, Profile) }()
	receive(t, src.opened)
	cancel()
	if err := receive(t, done); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// What a reader began and then abandoned is prefetched none the less.
func TestPrefetchOutlivesAReader(t *testing.T) {
	m := chunked(t, 2)
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = func(c blobtest.Call) bool { return c.N == 1 }
	r := newRig(t, m, rigOptions{}, src)
	ctx, leave := context.WithCancel(t.Context())
	read := make(chan error, 1)
	go func() { read <- r.wait(ctx, base, 10) }()
	receive(t, src.opened)
	done := make(chan error, 1)
	started := make(chan struct{})
	go func() {
		close(started)
		done <- r.PrefetchBlob(t.Context(), int64(len(m.blob)), Profile)
	}()
	<-started
	leave()
	if err := receive(t, read); !errors.Is(err, context.Canceled) {
		t.Errorf("reader got %v", err)
	}
	if err := receive(t, done); err != nil {
		t.Fatal(err)
	}
	if s := r.Stats(); s.Present != s.Chunks {
		t.Errorf("stats %+v", s)
	}
}

// A reader waits neither for a connection that a prefetch holds, nor for its bytes.
func TestReaderOvertakesPrefetch(t *testing.T) {
	m := chunked(t, 40)
	far := m.index.Chunks[30]
	src := watch(blobtest.NewMemory(m.blob))
	src.hold = func(c blobtest.Call) bool { return c.N == 1 }
	r := newRig(t, m, rigOptions{limit: 1}, src)
	done := make(chan error, 1)
	go func() { done <- r.PrefetchBlob(t.Context(), m.index.Chunks[4].BlobOffset, Fill) }()
	receive(t, src.opened)
	if err := r.check(t.Context(), far.Offset, 100); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		t.Errorf("prefetch ended: %v", err)
	default:
	}
	close(src.release)
	if err := receive(t, done); err != nil {
		t.Error(err)
	}
}

// A prefetch that waits for a connection goes on at once when a reader wants
// what it is to bring.
func TestReaderPullsPrefetchAlong(t *testing.T) {
	m := chunked(t, 4)
	r := newRig(t, m, rigOptions{limit: 1}, blobtest.NewMemory(m.blob))
	release, err := r.sched.acquire(t.Context(), func() Priority { return Fill })
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.PrefetchBlob(t.Context(), int64(len(m.blob)), Fill) }()
	eventually(t, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.flights) > 0
	})
	if err := r.check(t.Context(), base+2*chunkSize, 100); err != nil {
		t.Error(err)
	}
	release()
	if err := receive(t, done); err != nil {
		t.Error(err)
	}
}
