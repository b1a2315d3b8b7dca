// SPDX-License-Identifier: Apache-2.0

package estargz

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/testimage"
)

// layerOf is a layer in memory and its index's source.
func layerOf(t testing.TB, tar []byte, o testimage.Options) (testimage.Layer, *indextest.Source, blob.Descriptor) {
	t.Helper()
	l, err := testimage.ConvertBytes(context.Background(), tar, testimage.EStargz, o)
	if err != nil {
		t.Fatal(err)
	}
	return l, &indextest.Source{Blob: l.Bytes}, blob.Descriptor{Digest: l.Descriptor.Digest, Size: l.Descriptor.Size}
}

// The index of every layer of the corpus is the tree of a normal pull.
func TestOpen(t *testing.T) {
	for _, c := range testimage.Corpus() {
		if !slices.Contains(c.Formats, testimage.EStargz) {
			continue
		}
		for _, o := range []testimage.Options{{}, {ChunkSize: 100_000, MinChunkSize: 50_000}} {
			t.Run(fmt.Sprintf("%s/%+v", c.Name, o), func(t *testing.T) {
				l, src, desc := layerOf(t, c.Tar, o)
				idx, err := Open(t.Context(), src, desc, l.Descriptor.Annotations)
				if c.RawNames {
					if !errors.Is(err, index.ErrInvalid) {
						t.Errorf("error is %v, want ErrInvalid", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if src.Requests != 1 {
					t.Errorf("%d requests", src.Requests)
				}
				indextest.Check(t, idx, l.Bytes, indextest.Seconds)
			})
		}
	}
}

// A tar that is kept as it is ends before the TOC, so that extraction does not see
// the TOC; a tar that is written anew does not.
func TestOpenWithoutLandmark(t *testing.T) {
	for _, c := range testimage.Corpus() {
		if c.RawNames || c.Name == "converted before" || len(c.Tar) > 1<<20 {
			continue // there is no such index, or nothing new in it
		}
		for _, lossless := range []bool{true, false} {
			for _, minChunk := range []int{0, 50_000} {
				t.Run(fmt.Sprintf("%s/lossless %t/min %d", c.Name, lossless, minChunk), func(t *testing.T) {
					var buf bytes.Buffer
					w := stargz.NewWriterLevel(&buf, gzip.BestSpeed)
					w.MinChunkSize = minChunk
					appendTar := w.AppendTar
					if lossless {
						appendTar = w.AppendTarLossLess
					}
					if err := appendTar(bytes.NewReader(c.Tar)); err != nil {
						t.Fatal(err)
					}
					toc, err := w.Close()
					if err != nil {
						t.Fatal(err)
					}
					src := &indextest.Source{Blob: buf.Bytes()}
					desc := blob.Descriptor{Digest: digest.FromBytes(src.Blob), Size: int64(len(src.Blob))}
					idx, err := Open(t.Context(), src, desc, map[string]string{index.AnnotationEStargz: toc.String()})
					if err != nil {
						t.Fatal(err)
					}
					indextest.Check(t, idx, src.Blob, indextest.Seconds)
				})
			}
		}
	}
}

// A TOC longer than the guess takes one more request, for what is missing.
func TestOpenLongTOC(t *testing.T) {
	var files []testimage.File
	for i := range 20_000 {
		f := testimage.File{Content: []byte(fmt.Sprint(i))}
		f.Name = hex.EncodeToString(testimage.Bytes(50, uint64(i)))
		files = append(files, f)
	}
	l, src, desc := layerOf(t, testimage.Tar(files...), testimage.Options{MinChunkSize: 1 << 20})
	idx, err := Open(t.Context(), src, desc, l.Descriptor.Annotations)
	if err != nil {
		t.Fatal(err)
	}
	if len(idx.Inodes) != 20_000+3 {
		t.Errorf("%d inodes", len(idx.Inodes))
	}
	if src.Requests != 2 || src.Bytes > tailSize(desc.Size)+desc.Size {
		t.Errorf("%d requests of %d bytes together", src.Requests, src.Bytes)
	}
	if at, _, err := parseFooter(l.Bytes, desc.Size); err != nil || src.Bytes != desc.Size-at {
		t.Errorf("%d bytes read, but the TOC starts %d before the end (%v)", src.Bytes, desc.Size-at, err)
	}
}

func TestLandmark(t *testing.T) {
	tar := testimage.Corpus()[10].Tar
	l, src, desc := layerOf(t, tar, testimage.Options{Prioritized: []string{"size-4097"}})
	idx, err := Open(t.Context(), src, desc, l.Descriptor.Annotations)
	if err != nil {
		t.Fatal(err)
	}
	if idx.Landmark <= 0 || idx.Landmark > 10_000 {
		t.Errorf("landmark at %d, after about 4 kB of content", idx.Landmark)
	}
	l, src, desc = layerOf(t, tar, testimage.Options{})
	if idx, err = Open(t.Context(), src, desc, l.Descriptor.Annotations); err != nil || idx.Landmark != 0 {
		t.Errorf("landmark at %d without one (%v)", idx.Landmark, err)
	}
}

// small is a layer to be damaged.
func small(t testing.TB) (testimage.Layer, *indextest.Source, blob.Descriptor) {
	f := testimage.File{Content: testimage.Bytes(30_000, 1)}
	f.Name = "file"
	return layerOf(t, testimage.Tar(f), testimage.Options{ChunkSize: 10_000})
}

func TestOpenErrors(t *testing.T) {
	l, _, _ := small(t)
	tocAt, tocEnd, err := parseFooter(l.Bytes, l.Descriptor.Size)
	if err != nil {
		t.Fatal(err)
	}
	flip := func(at int64) func([]byte, map[string]string) []byte {
		return func(b []byte, _ map[string]string) []byte { b[at] ^= 0x10; return b }
	}
	for _, c := range []struct {
		name   string
		change func(blob []byte, annotations map[string]string) []byte
		want   error
	}{
		{"no annotation", func(b []byte, a map[string]string) []byte { delete(a, index.AnnotationEStargz); return b }, index.ErrNoIndex},
		{"odd annotation", func(b []byte, a map[string]string) []byte { a[index.AnnotationEStargz] = "md5:1"; return b }, index.ErrInvalid},
		{"other digest", func(b []byte, a map[string]string) []byte {
			a[index.AnnotationEStargz] = "sha256:" + strings.Repeat("0", 64)
			return b
		}, blob.ErrCorrupt},
		{"damaged TOC", flip((tocAt + tocEnd) / 2), blob.ErrCorrupt},
		{"damaged member", flip(tocAt), blob.ErrCorrupt},
		{"damaged footer", flip(tocEnd), index.ErrNoIndex},
		{"offset in footer past the end", func(b []byte, _ map[string]string) []byte { b[tocEnd+17] = 'f'; return b }, index.ErrInvalid},
		{"empty", func([]byte, map[string]string) []byte { return nil }, index.ErrNoIndex},
		{"footer alone", func(b []byte, _ map[string]string) []byte { return b[tocEnd:] }, index.ErrInvalid},
		{"plain gzip", func(b []byte, _ map[string]string) []byte { return b[:tocEnd] }, index.ErrNoIndex},
	} {
		t.Run(c.name, func(t *testing.T) {
			annotations := maps.Clone(l.Descriptor.Annotations)
			p := c.change(bytes.Clone(l.Bytes), annotations)
			_, err := Open(t.Context(), &indextest.Source{Blob: p}, blob.Descriptor{Digest: l.Descriptor.Digest, Size: int64(len(p))}, annotations)
			if !errors.Is(err, c.want) {
				t.Errorf("error is %v, want %v", err, c.want)
			}
		})
	}
}

// broken fails while the blob is read.
type broken struct{ indextest.Source }

var errBroken = errors.New("connection broken")

func (b *broken) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	r, err := b.Source.Open(ctx, desc, offset, length)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(io.MultiReader(io.LimitReader(r, length/2), failing{})), nil
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, blob.Temporary(errBroken) }

func TestOpenBrokenSource(t *testing.T) {
	l, src, desc := small(t)
	_, err := Open(t.Context(), &broken{Source: *src}, desc, l.Descriptor.Annotations)
	if !errors.Is(err, errBroken) || !blob.IsTemporary(err) {
		t.Errorf("error is %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, src, desc, l.Descriptor.Annotations); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

func TestLegacyFooter(t *testing.T) {
	extra := fmt.Sprintf("%016xSTARGZ", 1234)
	footer := stargz.CreateGzipFooter([]byte(extra))
	if len(footer) != legacyFooterSize {
		t.Fatalf("footer of %d bytes", len(footer))
	}
	at, end, err := parseFooter(footer, 5000)
	if err != nil || at != 1234 || end != 5000-legacyFooterSize {
		t.Errorf("got %d, %d, %v", at, end, err)
	}
}

func TestTailSize(t *testing.T) {
	for size, want := range map[int64]int64{0: 0, 1: 1, 512 << 10: 512 << 10, 50 << 20: 1 << 20, 150 << 20: 150 << 20 / 100, 10 << 30: 2 << 20} {
		if got := tailSize(size); got != want {
			t.Errorf("tailSize(%d) = %d, want %d", size, got, want)
		}
	}
}

func FuzzFooter(f *testing.F) {
	l, _, _ := small(f)
	f.Add(l.Bytes[len(l.Bytes)-footerSize:], int64(len(l.Bytes)))
	f.Add(stargz.CreateGzipFooter([]byte(fmt.Sprintf("%016xSTARGZ", 100))), int64(1000))
	f.Add([]byte{}, int64(0))
	f.Fuzz(func(t *testing.T, tail []byte, size int64) {
		if size < int64(len(tail)) {
			return
		}
		at, end, err := parseFooter(tail, size)
		if err == nil && (at < 0 || at >= end || end > size) {
			t.Errorf("TOC at [%d, %d) of %d", at, end, size)
		}
	})
}

// FuzzTOC opens layers whose end is anything. What is accepted must be sound.
func FuzzTOC(f *testing.F) {
	l, _, _ := small(f)
	f.Add(l.Bytes)
	f.Add(l.Bytes[:len(l.Bytes)/2])
	f.Fuzz(func(t *testing.T, p []byte) {
		at, end, err := parseFooter(p, int64(len(p)))
		if err != nil {
			return
		}
		m, err := newMember(bytes.NewReader(p[at:end]))
		if err != nil {
			return
		}
		plain, _ := io.ReadAll(io.LimitReader(m, 1<<20)) //nolint:errcheck // any bytes will do
		annotations := map[string]string{index.AnnotationEStargz: digest.FromBytes(plain[min(512, len(plain)):]).String()}
		idx, err := Open(t.Context(), &indextest.Source{Blob: p}, blob.Descriptor{Size: int64(len(p))}, annotations)
		if err == nil && len(idx.Inodes) == 0 {
			t.Error("no root")
		}
	})
}
