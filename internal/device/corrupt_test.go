// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/testimage"
)

// flip is a source that changes one byte of a chunk's frame in the calls named,
// or in all.
func flip(m made, chunk int, calls ...int) blob.Source {
	c := m.index.Chunks[chunk]
	at := c.BlobOffset + c.BlobSize/2
	return blobtest.Inject(blobtest.NewMemory(m.blob), func(call blobtest.Call) blobtest.Fault {
		f := blobtest.Fault{At: at - call.Offset, Flip: 1}
		if len(calls) > 0 && !slices.Contains(calls, call.N) || f.At < 0 || f.At >= call.Length {
			return blobtest.Fault{}
		}
		return f
	})
}

func TestCorruptChunk(t *testing.T) {
	for _, format := range formats() {
		m := makeLayer(t, format, testimage.Options{}, file("a", 10_000, 1), file("b", 20_000, 2), file("c", 30_000, 3))
		good := func() blob.Source { return blobtest.NewMemory(m.blob) }
		missing := faults(good(), blobtest.Fault{OpenErr: blob.ErrNotFound})
		bad := m.sizedChunk(20_000)
		for _, c := range []struct {
			name    string
			sources []blob.Source
			corrupt int64
			fails   bool
		}{
			{"the next source is right", []blob.Source{flip(m, bad), good()}, 1, false},
			{"the second round is right", []blob.Source{flip(m, bad, 1)}, 1, false},
			{"the second round is right, others have nothing", []blob.Source{flip(m, bad, 1), missing}, 1, false},
			{"always", []blob.Source{flip(m, bad)}, fetchRounds, true},
			{"everywhere", []blob.Source{flip(m, bad), named{flip(m, bad), "other"}}, 2 * fetchRounds, true},
		} {
			t.Run(string(format)+", "+c.name, func(t *testing.T) {
				r := newRig(t, m, rigOptions{}, c.sources...)
				at := m.index.Chunks[bad].Offset
				err := r.check(t.Context(), at, 20_000)
				r.quiet(t)
				s := r.Stats()
				if s.Corrupt != c.corrupt {
					t.Errorf("%d corrupt chunks, want %d", s.Corrupt, c.corrupt)
				}
				if !c.fails {
					if err != nil {
						t.Error(err)
					}
					return
				}
				if !errors.Is(err, blob.ErrCorrupt) || s.LastError == "" || r.cache.Has(bad) {
					t.Errorf("error %v, present %v, stats %+v", err, r.cache.Has(bad), s)
				}
				// The chunks beside it are fine.
				for _, i := range []int{bad - 1, bad + 1} {
					c := m.index.Chunks[i]
					if err := r.check(t.Context(), c.Offset, int(c.Size)); err != nil {
						t.Errorf("chunk %d: %v", i, err)
					}
				}
			})
		}
	}
}

// A blob that is another one altogether.
func TestForeignBlob(t *testing.T) {
	for _, format := range formats() {
		m := makeLayer(t, format, testimage.Options{}, file("a", 3*chunkSize, 1))
		other := makeLayer(t, format, testimage.Options{}, file("a", 3*chunkSize, 2))
		junk := blobtest.Bytes(len(m.blob), 3)
		copy(junk, other.blob)
		src := blobtest.Memory{blobtest.Memory{}.Add(m.blob).Digest: junk}
		r := newRig(t, m, rigOptions{}, src)
		if err := r.check(t.Context(), 0, int(r.Size())); !errors.Is(err, blob.ErrCorrupt) {
			t.Errorf("%s: error %v", format, err)
		}
		r.quiet(t)
		for i, c := range m.index.Chunks {
			if r.cache.Has(i) && c.Size > 1 { // the landmark is in both
				t.Errorf("%s: chunk %d is present", format, i)
			}
		}
	}
}

func TestBrokenSource(t *testing.T) {
	boom := errors.New("boom")
	for _, format := range formats() {
		m := makeLayer(t, format, testimage.Options{}, file("a", 3*chunkSize, 1))
		good := blobtest.NewMemory(m.blob)
		for name, c := range map[string]struct {
			fault blobtest.Fault
			want  error
		}{
			"refuses":             {blobtest.Fault{OpenErr: boom}, boom},
			"breaks at once":      {blobtest.Fault{ReadErr: boom}, boom},
			"breaks in a chunk":   {blobtest.Fault{At: 10_000, ReadErr: boom}, boom},
			"ends at once":        {blobtest.Fault{Truncate: true}, io.ErrUnexpectedEOF},
			"ends in a chunk":     {blobtest.Fault{At: 10_000, Truncate: true}, io.ErrUnexpectedEOF},
			"ends between chunks": {blobtest.Fault{At: m.index.Chunks[len(m.index.Chunks)-1].BlobOffset - m.index.Chunks[0].BlobOffset, Truncate: true}, io.ErrUnexpectedEOF},
		} {
			t.Run(string(format)+", "+name, func(t *testing.T) {
				r := newRig(t, m, rigOptions{}, faults(good, c.fault))
				if err := r.check(t.Context(), 0, int(r.Size())); !errors.Is(err, c.want) {
					t.Errorf("error %v, want %v", err, c.want)
				}
				r.quiet(t)
				if s := r.Stats(); s.Corrupt != 0 || s.Failures == 0 {
					t.Errorf("stats %+v", s)
				}
				r = newRig(t, m, rigOptions{}, faults(good, c.fault), good)
				if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
					t.Errorf("with a good source behind it: %v", err)
				}
			})
		}
	}
}

func TestSourceThatStalls(t *testing.T) {
	for _, at := range []int64{0, 5000} {
		m := chunked(t, 3)
		r := newRig(t, m, rigOptions{}, faults(blobtest.NewMemory(m.blob), blobtest.Fault{At: at, Stall: true}))
		patience := errors.New("no answer in time")
		ctx, cancel := context.WithCancelCause(t.Context())
		read := make(chan error, 1)
		go func() { read <- r.wait(ctx, base, 10) }()
		eventually(t, func() bool { return r.Stats().Requests == 1 })
		cancel(patience)
		if err := receive(t, read); !errors.Is(err, patience) {
			t.Errorf("error %v", err)
		}
		r.quiet(t) // nobody waits: nothing is being fetched
		if s := r.Stats(); s.LastError == "" || r.cache.Has(firstChunk) {
			t.Errorf("stats %+v", s)
		}
	}
}

// No other source helps against a cache that cannot be written.
func TestCacheThatFails(t *testing.T) {
	m := chunked(t, 2)
	first, second := watch(blobtest.NewMemory(m.blob)), watch(blobtest.NewMemory(m.blob))
	r := newRig(t, m, rigOptions{}, first, second)
	if err := r.cache.Close(); err != nil {
		t.Fatal(err)
	}
	var write *writeError
	if err := r.wait(t.Context(), base, 10); !errors.As(err, &write) {
		t.Errorf("error %v", err)
	}
	if len(first.seen()) != 1 || len(second.seen()) != 0 || r.cache.Has(firstChunk) {
		t.Errorf("requests %v and %v", first.seen(), second.seen())
	}
}
