// SPDX-License-Identifier: Apache-2.0

package device

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/index/soci"
	indexstream "github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/testimage"
)

// spanFiles are files that lie in several spans, and spans that hold many files.
func spanFiles() []testimage.File {
	var files []testimage.File
	for i := range 60 {
		files = append(files, file(fmt.Sprintf("small%d", i), 100+i*517, uint64(i)))
	}
	files = append(files, file("large", 9<<20+5, 100))
	for i := range 60 {
		text := testimage.File{Content: bytes.Repeat(testimage.Bytes(100, uint64(i)), 1+i*40)}
		text.Name = fmt.Sprintf("text%d", i)
		files = append(files, text)
	}
	return files
}

// spanned returns layers whose chunks lie in spans, with the index of their zTOCs.
func spanned(t testing.TB) map[string]made {
	t.Helper()
	plain := testimage.Tar(spanFiles()...)
	var zipped, frames bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, err := z.Write(plain)
	enc, encErr := zstd.NewWriter(nil)
	if err := errors.Join(err, z.Close(), encErr); err != nil {
		t.Fatal(err)
	}
	for rest := plain; len(rest) > 0; {
		n := min(len(rest), 1_000_000)
		frames.Write(enc.EncodeAll(rest[:n], nil))
		rest = rest[n:]
	}
	layers := map[string]made{}
	for name, p := range map[string][]byte{"none": plain, "gzip": zipped.Bytes(), "zstd": frames.Bytes()} {
		windows, err := os.Create(filepath.Join(t.TempDir(), "windows"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = windows.Close() })
		res, err := indexstream.Build(t.Context(), bytes.NewReader(p), int64(len(p)), nowhere{}, windows)
		if err != nil {
			t.Fatal(err)
		}
		var document bytes.Buffer
		if err := res.WriteZTOC(&document, ""); err != nil {
			t.Fatal(err)
		}
		m := made{blob: p}
		if m.index, err = soci.Decode(document.Bytes(), int64(len(p))); err != nil {
			t.Fatal(err)
		}
		if len(m.index.Spans) < 3 {
			t.Fatalf("%s: %d spans", name, len(m.index.Spans))
		}
		m.device = indextest.Device(t, m.index, m.blob)
		layers[name] = m
	}
	return layers
}

// TestSpans reads layers in spans here and there, by several readers at once.
func TestSpans(t *testing.T) {
	for name, m := range spanned(t) {
		t.Run(name, func(t *testing.T) {
			src := watch(blobtest.NewMemory(m.blob))
			r := newRig(t, m, rigOptions{}, src)
			var readers sync.WaitGroup
			for seed := range uint64(6) {
				readers.Go(func() {
					rnd := rand.New(rand.NewPCG(seed, 1))
					for range 60 {
						n := 1 << rnd.IntN(20)
						if err := r.check(t.Context(), rnd.Int64N(r.Size()-int64(n)), n); err != nil {
							t.Error(err)
						}
					}
				})
			}
			readers.Wait()
			for off := int64(0); off < r.Size(); off += 1 << 20 {
				if err := r.check(t.Context(), off, int(min(1<<20, r.Size()-off))); err != nil {
					t.Fatal(err)
				}
			}
			r.quiet(t)
			var fetched int64
			for _, c := range src.seen() {
				fetched += c.Length
			}
			if limit := int64(len(m.blob)) + 1000; fetched > limit {
				t.Errorf("%d bytes fetched of a blob of %d", fetched, len(m.blob))
			}
			if s := r.Stats(); s.Present != s.Chunks || s.Corrupt != 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// TestSpanIsVerified has a byte of the second span flipped: nothing of that span
// reaches a reader, and all of the others does.
func TestSpanIsVerified(t *testing.T) {
	for name, m := range spanned(t) {
		t.Run(name, func(t *testing.T) {
			s := m.index.Spans[1]
			bad := bytes.Clone(m.blob)
			bad[s.BlobOffset+s.BlobSize/2] ^= 1
			r := newRig(t, m, rigOptions{quick: true}, named{raw(bad), "bad"})
			for i, c := range m.index.Chunks {
				err := r.check(t.Context(), c.Offset, int(c.Size))
				if in := c.BlobOffset == s.BlobOffset; in != errors.Is(err, blob.ErrCorrupt) || !in && err != nil {
					t.Fatalf("chunk %d of the span %v: %v", i, in, err)
				}
			}
			r.AddSources([]blob.Source{named{blobtest.NewMemory(m.blob), "good"}})
			for i, c := range m.index.Chunks {
				if err := r.check(t.Context(), c.Offset, int(c.Size)); err != nil {
					t.Fatalf("chunk %d from a good source: %v", i, err)
				}
			}
		})
	}
}

// raw is a source of these bytes, whatever is asked for.
type raw []byte

func (r raw) Open(_ context.Context, _ blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(r[offset : offset+length])), nil
}

func (raw) String() string { return "raw" }

// TestSpanOfALyingIndex has spans that decompress to something else than the index
// says, or not at all.
func TestSpanOfALyingIndex(t *testing.T) {
	m := spanned(t)["gzip"]
	for name, lie := range map[string]func(s []index.Span){
		"no window":     func(s []index.Span) { s[1].Window = -1 },
		"bits":          func(s []index.Span) { s[1].Bits ^= 1 },
		"wrong place":   func(s []index.Span) { s[1].BlobOffset += 100; s[1].BlobSize -= 100 },
		"wrong digest":  func(s []index.Span) { s[1].Digest[0]++ },
		"beyond a span": func(s []index.Span) { s[1].BlobSize /= 2 },
	} {
		t.Run(name, func(t *testing.T) {
			lied := m
			idx := *m.index
			idx.Spans = append([]index.Span(nil), m.index.Spans...)
			idx.Chunks = append([]index.Chunk(nil), m.index.Chunks...)
			at := idx.Spans[1].BlobOffset
			lie(idx.Spans)
			var first index.Chunk
			for i := range idx.Chunks {
				if c := &idx.Chunks[i]; c.BlobOffset == at {
					c.BlobOffset, c.BlobSize = idx.Spans[1].BlobOffset, idx.Spans[1].BlobSize
					first = *c
				}
			}
			lied.index = &idx
			r := newRig(t, lied, rigOptions{quick: true}, blobtest.NewMemory(m.blob))
			if _, err := r.read(t.Context(), first.Offset, int(first.Size)); err == nil {
				t.Error("it was read")
			}
		})
	}
}

// TestFillingSpans takes in a layer in spans, in full and with some there already.
func TestFillingSpans(t *testing.T) {
	for name, m := range spanned(t) {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
			if err := r.check(t.Context(), r.Size()/2, 1000); err != nil {
				t.Fatal(err)
			}
			r.setSources(nil)
			f := filling(t, r)
			body := io.TeeReader(bytes.NewReader(m.blob), blobWriter{f})
			if _, err := indexstream.ReadTree(t.Context(), body, int64(len(m.blob)), f, nil); err != nil {
				t.Fatal(err)
			}
			if err := f.Finish(); err != nil {
				t.Fatal(err)
			}
			if s := r.Stats(); s.Present != s.Chunks {
				t.Errorf("stats %+v", s)
			}
			if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
				t.Error(err)
			}
		})
	}
}

type blobWriter struct{ f *Filling }

func (b blobWriter) Write(p []byte) (int, error) { b.f.Blob(p); return len(p), nil }

// TestFillingSpansFindsTheMismatch: the content of a span that is another one than
// the index says is not kept.
func TestFillingSpansFindsTheMismatch(t *testing.T) {
	m := spanned(t)["gzip"]
	idx := *m.index
	idx.Spans = append([]index.Span(nil), m.index.Spans...)
	idx.Spans[1].Digest[5]++
	m.index = &idx
	r := newRig(t, m, rigOptions{})
	f := filling(t, r)
	body := io.TeeReader(bytes.NewReader(m.blob), blobWriter{f})
	if _, err := indexstream.ReadTree(t.Context(), body, int64(len(m.blob)), f, nil); err != nil {
		t.Fatal(err)
	}
	if got := f.Finish(); got == nil || !got.Span || got.Chunk != 1 {
		t.Fatalf("mismatch %v", got)
	}
	for i := range r.table.Len() {
		if c := r.table.At(i); r.cache.Has(i) && c.BlobOffset >= idx.Spans[1].BlobOffset {
			t.Fatalf("chunk %d is present", i)
		}
	}
	r.quiet(t)
}
