// SPDX-License-Identifier: Apache-2.0

package zstdchunked

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/index/toc"
	"github.com/holdfast/holdfast/internal/testimage"
)

// The index of every layer of the corpus is the tree of a normal pull.
func TestOpen(t *testing.T) {
	for _, c := range testimage.Corpus() {
		for _, f := range []testimage.Format{testimage.ZstdChunked, testimage.ZstdChunkedStargz} {
			if !slices.Contains(c.Formats, f) {
				continue
			}
			t.Run(c.Name+"/"+string(f), func(t *testing.T) {
				l, err := testimage.ConvertBytes(t.Context(), c.Tar, f, testimage.Options{})
				if err != nil {
					t.Fatal(err)
				}
				src := &indextest.Source{Blob: l.Bytes}
				idx, err := Open(t.Context(), src, blob.Descriptor{Digest: l.Descriptor.Digest, Size: l.Descriptor.Size}, l.Descriptor.Annotations)
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
				round := indextest.Exact
				if f == testimage.ZstdChunkedStargz {
					round = indextest.Seconds
				}
				indextest.Check(t, idx, l.Bytes, round)
			})
		}
	}
}

// Zeros between data are holes in the device, not chunks.
func TestHoles(t *testing.T) {
	f := testimage.File{Content: bytes.Join([][]byte{testimage.Bytes(200_000, 1), make([]byte, 1<<20), testimage.Bytes(200_000, 2)}, nil)}
	f.Name = "holes"
	l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(f), testimage.ZstdChunked, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	idx, err := Open(t.Context(), &indextest.Source{Blob: l.Bytes}, blob.Descriptor{Size: l.Descriptor.Size}, l.Descriptor.Annotations)
	if err != nil {
		t.Fatal(err)
	}
	var covered int64
	for _, c := range idx.Chunks {
		covered += c.Size
	}
	if covered > 400_000+2048 {
		t.Errorf("chunks cover %d bytes of 400,000 that are not zero", covered)
	}
}

// built makes a blob whose TOC is the given text, and annotations for it.
func built(t testing.TB, text string) ([]byte, map[string]string) {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	compressed := z.EncodeAll([]byte(text), nil)
	p := append(make([]byte, 1000+skippableHeader), compressed...)
	return p, map[string]string{
		index.AnnotationZstdChunked: digest.FromBytes(compressed).String(),
		PositionAnnotation:          fmt.Sprintf("%d:%d:%d:1", 1000+skippableHeader, len(compressed), len(text)),
	}
}

const tocText = `{"version":1,"entries":[{"type":"reg","name":"f","size":3,"offset":10,"endOffset":90,` +
	`"digest":"sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}],"tarSplitDigest":"x"}`

func TestOpenErrors(t *testing.T) {
	p, annotations := built(t, tocText)
	if _, err := Open(t.Context(), &indextest.Source{Blob: p}, blob.Descriptor{Size: int64(len(p))}, annotations); err != nil {
		t.Fatal(err)
	}
	position := func(text string) func([]byte, map[string]string) {
		return func(_ []byte, a map[string]string) { a[PositionAnnotation] = text }
	}
	n := len(p) - 1000 - skippableHeader
	for _, c := range []struct {
		name   string
		change func(blob []byte, annotations map[string]string)
		want   error
	}{
		{"no annotation", func(_ []byte, a map[string]string) { clear(a) }, index.ErrNoIndex},
		{"no position", func(_ []byte, a map[string]string) { delete(a, PositionAnnotation) }, index.ErrInvalid},
		{"odd checksum", func(_ []byte, a map[string]string) { a[index.AnnotationZstdChunked] = "sha512:00" }, index.ErrInvalid},
		{"other checksum", func(_ []byte, a map[string]string) {
			a[index.AnnotationZstdChunked] = "sha256:" + strings.Repeat("0", 64)
		}, blob.ErrCorrupt},
		{"damaged", func(p []byte, _ map[string]string) { p[len(p)-1] ^= 1 }, blob.ErrCorrupt},
		{"too few fields", position("1008:1:1"), index.ErrInvalid},
		{"not numbers", position("1008:a:1:1"), index.ErrInvalid},
		{"negative", position("-1:1:1:1"), index.ErrInvalid},
		{"overflow", position("9223372036854775807:9223372036854775807:1:1"), index.ErrInvalid},
		{"past 64 bits", position("99999999999999999999:1:1:1"), index.ErrInvalid},
		{"past the end", position(fmt.Sprintf("1008:%d:1:1", n+1)), index.ErrInvalid},
		{"before the start", position("7:1:1:1"), index.ErrInvalid},
		{"another type", position(fmt.Sprintf("1008:%d:%d:2", n, len(tocText))), index.ErrInvalid},
		{"too long", position(fmt.Sprintf("1008:%d:%d:1", n, int64(toc.MaxBytes)+1)), index.ErrTooLarge},
		{"longer than it is", position(fmt.Sprintf("1008:%d:%d:1", n, len(tocText)+1)), index.ErrInvalid},
		{"shorter than it is", position(fmt.Sprintf("1008:%d:%d:1", n, len(tocText)-1)), index.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, annotations := bytes.Clone(p), maps.Clone(annotations)
			c.change(p, annotations)
			_, err := Open(t.Context(), &indextest.Source{Blob: p}, blob.Descriptor{Size: int64(len(p))}, annotations)
			if !errors.Is(err, c.want) {
				t.Errorf("error is %v, want %v", err, c.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, &indextest.Source{Blob: p}, blob.Descriptor{Size: int64(len(p))}, annotations); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

// A TOC that inflates without end is refused when it has told enough.
func TestOpenBomb(t *testing.T) {
	p, annotations := built(t, `{"version":1,"x":"`+strings.Repeat("a", 64<<20)+`"}`)
	_, err := Open(t.Context(), &indextest.Source{Blob: p}, blob.Descriptor{Size: int64(len(p))}, annotations)
	if !errors.Is(err, index.ErrTooLarge) {
		t.Errorf("error is %v", err)
	}
}

func FuzzTOC(f *testing.F) {
	f.Add([]byte(tocText))
	l, err := testimage.ConvertBytes(context.Background(), testimage.Corpus()[1].Tar, testimage.ZstdChunked, testimage.Options{})
	if err != nil {
		f.Fatal(err)
	}
	var at, n int
	if _, err := fmt.Sscanf(l.Descriptor.Annotations[PositionAnnotation], "%d:%d:", &at, &n); err != nil {
		f.Fatal(err)
	}
	f.Add(indextest.Decompress(f, l.Bytes[at:at+n], index.Zstd))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, annotations := built(t, string(text))
		idx, err := Open(t.Context(), &indextest.Source{Blob: p}, blob.Descriptor{Size: int64(len(p))}, annotations)
		if err != nil {
			return
		}
		for _, c := range idx.Chunks {
			if c.BlobOffset < 0 || c.BlobSize <= 0 || c.BlobOffset+c.BlobSize > 1000 || c.Offset < 0 || c.End() > idx.DeviceSize {
				t.Errorf("chunk %+v", c)
			}
		}
	})
}

// FuzzFooter is about the annotations, which take the footer's place.
func FuzzFooter(f *testing.F) {
	f.Add("1008:10:20:1")
	f.Add("::::")
	f.Fuzz(func(t *testing.T, text string) {
		const size = 1 << 40
		p, err := parsePosition(text)
		if err != nil || p.check(size) != nil {
			return
		}
		if p.offset < skippableHeader || p.compressed < 0 || p.uncompressed < 0 || p.offset+p.compressed > size {
			t.Errorf("%q is %+v", text, p)
		}
	})
}
