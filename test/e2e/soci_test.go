// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/awslabs/soci-snapshotter/ztoc/compression"
	"github.com/awslabs/soci-snapshotter/ztoc/fbs/ztoc"

	"github.com/holdfast/holdfast/internal/index/soci"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/testimage"
)

// TestSOCI compares our zTOCs with SOCI's own code, which is zlib: the checkpoints
// are the same to the byte, the span digests are those of the spans that it sees,
// and with our zTOC it decompresses each file.
func TestSOCI(t *testing.T) {
	plain := sociTar(t)
	for name, blob := range map[string][]byte{
		"stored": zipped(t, plain, gzip.NoCompression), "fast": zipped(t, plain, gzip.BestSpeed), "best": zipped(t, plain, gzip.BestCompression),
		"huffman": zipped(t, plain, gzip.HuffmanOnly),
		"members": append(zipped(t, plain[:17_000_001], 6), zipped(t, plain[17_000_001:], 1)...),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "layer.tar.gz")
			if err := os.WriteFile(path, blob, 0o600); err != nil {
				t.Fatal(err)
			}
			theirs, err := compression.NewZinfoFromFile(compression.Gzip, path, soci.SpanSize)
			if err != nil {
				t.Fatal(err)
			}
			defer theirs.Close()
			want, err := theirs.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			z := ztoc.GetRootAsZtoc(buildZTOC(t, blob), 0)
			info := z.CompressionInfo(nil)
			got := info.CheckpointsBytes()
			if !bytes.Equal(got, want) {
				t.Fatalf("checkpoints of %d bytes differ from %d of SOCI, first at %d", len(got), len(want), firstDifference(got, want))
			}
			ours, err := compression.NewZinfo(compression.Gzip, got)
			if err != nil {
				t.Fatal(err)
			}
			defer ours.Close()
			if info.MaxSpanId() != int32(ours.MaxSpanID()) || ours.MaxSpanID() < 4 {
				t.Errorf("last span %d, SOCI says %d", info.MaxSpanId(), ours.MaxSpanID())
			}
			for i := range ours.MaxSpanID() + 1 {
				bytesOf := blob[ours.StartCompressedOffset(i):ours.EndCompressedOffset(i, compression.Offset(len(blob)))]
				if want := fmt.Sprintf("sha256:%x", sha256.Sum256(bytesOf)); string(info.SpanDigests(int(i))) != want {
					t.Errorf("span %d has digest %s, want %s", i, info.SpanDigests(int(i)), want)
				}
			}
			var m ztoc.FileMetadata
			for i := range z.Toc(nil).MetadataLength() {
				z.Toc(nil).Metadata(&m, i)
				at, size := compression.Offset(m.UncompressedOffset()), compression.Offset(m.UncompressedSize())
				if size == 0 {
					continue
				}
				first, last := ours.UncompressedOffsetToSpanID(at), ours.UncompressedOffsetToSpanID(at+size-1)
				bytesOf := blob[ours.StartCompressedOffset(first):ours.EndCompressedOffset(last, compression.Offset(len(blob)))]
				content, err := ours.ExtractDataFromBuffer(bytesOf, size, at, first)
				if err != nil || !bytes.Equal(content, plain[at:at+size]) {
					t.Errorf("file %s: SOCI reads something else, %v", m.Name(), err)
				}
			}
		})
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// sociTar is a tar of some 36 MB: noise, text, and zeros.
func sociTar(t *testing.T) []byte {
	t.Helper()
	files := []testimage.File{{Header: tar.Header{Name: "noise"}, Content: testimage.Bytes(12<<20+7, 1)}}
	for i := range 100 {
		word := testimage.Bytes(40+i, uint64(i))
		files = append(files, testimage.File{Header: tar.Header{Name: fmt.Sprintf("text%d", i)}, Content: bytes.Repeat(word, 1000+i*30)})
	}
	files = append(files, testimage.File{Header: tar.Header{Name: "zeros"}, Content: make([]byte, 5<<20)})
	return testimage.Tar(files...)
}

func zipped(t *testing.T, p []byte, level int) []byte {
	t.Helper()
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, level)
	if err != nil {
		t.Fatal(err)
	}
	z.Name = "layer.tar"
	_, err = z.Write(p)
	if err := errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// buildZTOC makes the zTOC of a layer.
func buildZTOC(t *testing.T, blob []byte) []byte {
	t.Helper()
	windows, err := os.Create(filepath.Join(t.TempDir(), "windows"))
	if err != nil {
		t.Fatal(err)
	}
	defer windows.Close() //nolint:errcheck // of no use any more
	res, err := stream.Build(t.Context(), bytes.NewReader(blob), int64(len(blob)), discard{}, windows)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := res.WriteZTOC(&out, "test"); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

type discard struct{}

func (discard) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

var _ io.WriterAt = discard{}
