// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/index"
)

// frame is what a recorder notes of a chunk.
func (m made) frame(device, chunk int) Touch {
	c := m.index.Chunks[chunk]
	return Touch{device, blob.Range{Offset: c.BlobOffset, Length: c.BlobSize}}
}

func TestRecorder(t *testing.T) {
	m := chunked(t, 20)
	a := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
	b := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
	at := func(chunk int) int64 { return m.index.Chunks[chunk].Offset }
	read := func(r *rig, chunk, n int) {
		t.Helper()
		if err := r.check(t.Context(), at(chunk), n); err != nil {
			t.Fatal(err)
		}
	}
	read(a, 5, 1) // nobody records
	r := NewRecorder()
	stopA, stopB := a.Record(r, 0), b.Record(r, 7)
	select {
	case <-r.Began():
		t.Error("it began without a reader")
	default:
	}
	// What is brought in without a reader is not a touch.
	if err := a.PrefetchBlob(t.Context(), int64(len(m.blob)), Profile); err != nil {
		t.Fatal(err)
	}
	read(a, 5, 1) // local
	read(b, 9, chunkSize+1)
	read(a, 4, chunkSize+1) // one is new
	read(b, 9, 1)
	receive(t, r.Began())
	stopA()
	stopA() // harmless
	read(a, 1, 1)
	read(b, 2, 1)
	stopB()
	read(b, 3, 1)
	want := []Touch{m.frame(0, 5), m.frame(7, 9), m.frame(7, 10), m.frame(0, 4), m.frame(7, 2)}
	if d := cmp.Diff(want, r.Touches()); d != "" {
		t.Error(d)
	}
}

// Each recorder notes its own first touches.
func TestRecordersAreIndependent(t *testing.T) {
	m := chunked(t, 4)
	dev := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
	first, second := NewRecorder(), NewRecorder()
	defer dev.Record(first, 1)()
	if err := dev.check(t.Context(), base, 1); err != nil {
		t.Fatal(err)
	}
	defer dev.Record(second, 2)()
	if err := dev.check(t.Context(), base, 1); err != nil {
		t.Fatal(err)
	}
	for n, r := range []*Recorder{first, second} {
		if d := cmp.Diff([]Touch{m.frame(n+1, firstChunk)}, r.Touches()); d != "" {
			t.Errorf("recorder %d: %s", n+1, d)
		}
	}
}

func TestRecorderIsBounded(t *testing.T) {
	r := NewRecorder()
	rec := &recording{r, 0}
	for i := range int64(maxRecorded + 10) {
		rec.note(index.Chunk{BlobOffset: i, BlobSize: 1})
	}
	if n := len(r.Touches()); n != maxRecorded || len(r.seen) != maxRecorded {
		t.Errorf("%d touches, %d seen", n, len(r.seen))
	}
}

func TestSettle(t *testing.T) {
	const quiet, most = 10 * time.Second, 2 * time.Minute
	for _, c := range []struct {
		name  string
		every time.Duration // between touches
		n     int
		want  time.Duration
	}{
		{"one touch", time.Hour, 1, quiet},
		{"a few", quiet / 2, 5, quiet/2*4 + quiet},
		{"with a pause", quiet + 1, 2, quiet},
		{"without an end", quiet - 1, 1000, most},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := NewRecorder()
				rec := &recording{r, 0}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go func() {
					for i := range int64(c.n) {
						rec.note(index.Chunk{BlobOffset: i})
						select {
						case <-time.After(c.every):
						case <-ctx.Done():
							return
						}
					}
				}()
				<-r.Began()
				start := time.Now()
				if err := r.Settle(t.Context(), quiet, most); err != nil {
					t.Error(err)
				}
				if got := time.Since(start); got != c.want {
					t.Errorf("it took %s, want %s", got, c.want)
				}
			})
		})
	}
}

func TestSettleEndsWithItsContext(t *testing.T) {
	r := NewRecorder()
	(&recording{r, 0}).note(index.Chunk{})
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := r.Settle(ctx, time.Hour, time.Hour); !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
}
