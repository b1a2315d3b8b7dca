// SPDX-License-Identifier: Apache-2.0

package device

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"testing"

	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/cache"
	indexstream "github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/testimage"
)

func filling(t testing.TB, r *rig) *Filling {
	t.Helper()
	f, err := r.Filling()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

// pour writes content as a stream does: in pieces, and no blocks of zeros.
func pour(t testing.TB, f *Filling, content []byte, seed uint64) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // no secret
	for off := 0; off < len(content); {
		n := min(len(content)-off, 1+random.IntN(100_000))
		if p := content[off : off+n]; len(bytes.Trim(p, "\x00")) > 0 {
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		off += n
	}
}

func fillFiles() []testimage.File {
	zeros := testimage.File{Header: file("zeros", 0, 0).Header, Content: make([]byte, 3*chunkSize)}
	return []testimage.File{
		file("a", 10_000, 1), zeros, file("b", 1, 2), file("c", 3*chunkSize+1, 3), file("d", 4096, 4),
	}
}

func TestFilling(t *testing.T) {
	for _, format := range formats() {
		m := makeLayer(t, format, testimage.Options{}, fillFiles()...)
		for seed := range uint64(5) {
			t.Run(fmt.Sprint(format, seed), func(t *testing.T) {
				r := newRig(t, m, rigOptions{}) // without a source
				f := filling(t, r)
				pour(t, f, r.device, seed)
				if bad := f.Finish(); bad != nil {
					t.Fatal(bad)
				}
				if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
					t.Error(err)
				}
				if err := r.cache.Flush(); err != nil || !r.cache.Complete() {
					t.Errorf("error %v, complete is %v", err, r.cache.Complete())
				}
			})
		}
	}
}

// A layer that has no index of its own has the one that the stream makes.
func TestFillingFromAStream(t *testing.T) {
	m := makeLayer(t, testimage.Uncompressed, testimage.Options{}, fillFiles()...)
	r := newRig(t, m, rigOptions{})
	f := filling(t, r)
	if _, err := indexstream.Read(t.Context(), bytes.NewReader(m.blob), int64(len(m.blob)), f); err != nil {
		t.Fatal(err)
	}
	if bad := f.Finish(); bad != nil {
		t.Fatal(bad)
	}
	if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
		t.Error(err)
	}
}

func TestFillingFindsTheFirstMismatch(t *testing.T) {
	m := makeLayer(t, testimage.EStargz, testimage.Options{}, file("a", 10_000, 1), file("b", 2*chunkSize, 2), file("c", 9000, 3))
	a, b := m.sizedChunk(10_000), m.sizedChunk(chunkSize)
	for _, c := range []struct {
		name  string
		at    int64 // which byte is another
		chunk int
	}{
		{"none", -1, 0},
		{"first byte", m.index.Chunks[a].Offset, a},
		{"last byte", m.index.Chunks[a].End() - 1, a},
		{"second chunk of a file", m.index.Chunks[b+1].Offset + 5, b + 1},
		{"after a file", m.index.Chunks[a].End(), -1},
		{"last byte of the device", int64(len(m.device)) - 1, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
			f := filling(t, r)
			content := bytes.Clone(m.device)
			if c.at >= 0 {
				content[c.at] ^= 1
			}
			pour(t, f, content, 1)
			bad := f.Finish()
			if c.at < 0 {
				if bad != nil {
					t.Error(bad)
				}
				return
			}
			if bad == nil || bad.Chunk != c.chunk || bad.Error() == "" {
				t.Fatalf("mismatch %v, want chunk %d", bad, c.chunk)
			}
			if c.chunk >= 0 && (bad.Got == bad.Want || r.cache.Has(c.chunk)) {
				t.Errorf("%v, present is %v", bad, r.cache.Has(c.chunk))
			}
			for i, chunk := range m.index.Chunks {
				if chunk.Offset > c.at && r.cache.Has(i) {
					t.Errorf("chunk %d was stored after the mismatch", i)
				}
			}
			if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestReadersJoinAFilling(t *testing.T) {
	m := chunked(t, 3)
	src := watch(blobtest.NewMemory(m.blob))
	r := newRig(t, m, rigOptions{}, src)
	f := filling(t, r)
	read := make(chan error, 1)
	half := int64(base + chunkSize/2)
	if _, err := f.WriteAt(m.device[:half], 0); err != nil {
		t.Fatal(err)
	}
	if f.Priority() != Fill {
		t.Errorf("priority %d", f.Priority())
	}
	go func() { read <- r.check(t.Context(), base, 100) }()
	eventually(t, func() bool { return f.Priority() == BlockedRead })
	if _, err := f.WriteAt(m.device[half:base+chunkSize], half); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, read); err != nil {
		t.Error(err)
	}
	if n := len(src.seen()); n != 0 {
		t.Errorf("%d requests", n)
	}
	// One that waits for what never comes fetches it.
	if _, err := f.WriteAt(m.device[base+chunkSize:base+chunkSize+10], base+chunkSize); err != nil {
		t.Fatal(err)
	}
	go func() { read <- r.check(t.Context(), base+chunkSize, 100) }()
	eventually(t, func() bool { return f.Priority() == BlockedRead })
	f.Close()
	if err := receive(t, read); err != nil {
		t.Error(err)
	}
	if n := len(src.seen()); n != 1 {
		t.Errorf("%d requests", n)
	}
}

func TestFillingTakesNothingFromReaders(t *testing.T) {
	m := chunked(t, 64)
	space := cache.NewSpace(16*chunkSize, slog.New(slog.DiscardHandler))
	r := newRig(t, m, rigOptions{space: space}, blobtest.NewMemory(m.blob))
	last := r.Size() - 8*chunkSize
	if err := r.check(t.Context(), last, 8*chunkSize); err != nil {
		t.Fatal(err)
	}
	r.quiet(t)
	before := space.Stats()
	f := filling(t, r)
	pour(t, f, m.device, 1)
	if bad := f.Finish(); bad != nil {
		t.Error(bad)
	}
	after := space.Stats()
	if after.Evicted != before.Evicted || after.Used <= before.Used || after.Full {
		t.Errorf("stats %+v, then %+v", before, after)
	}
}

func TestFillingOutOfOrder(t *testing.T) {
	m := chunked(t, 2)
	r := newRig(t, m, rigOptions{})
	f := filling(t, r)
	if _, err := f.WriteAt(m.device[:100], 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(m.device[:100], 99); err == nil {
		t.Error("what had come already was taken again")
	}
	f.Close()
	r.Device.Close()
	if _, err := f.WriteAt(m.device[100:200], 100); err == nil {
		t.Error("a closed device was filled")
	}
	if _, err := r.Filling(); err == nil {
		t.Error("a closed device can be filled")
	}
}
