// SPDX-License-Identifier: Apache-2.0

package stream_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/klauspost/compress/zstd"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/index/soci"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/testimage"
)

func build(t testing.TB, p []byte, device *memory) *stream.Result {
	t.Helper()
	windows, err := os.Create(filepath.Join(t.TempDir(), "windows"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = windows.Close() })
	got, err := stream.Build(t.Context(), bytes.NewReader(p), int64(len(p)), device, windows)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// large is a tar of some 20 MB, with files of all sizes, that compresses by half.
func large() []byte {
	var files []testimage.File
	for i := range 60 {
		content := testimage.Bytes(1<<(i%20)+i, uint64(i))
		content = append(content, bytes.Repeat([]byte("compressible "), 1<<(i%17))...)
		files = append(files, testimage.File{Header: tar.Header{Name: fmt.Sprintf("f%d", i), Mode: 0o644, Uname: "u"}, Content: content})
	}
	files = append(files, testimage.File{Header: tar.Header{Name: "weights", Mode: 0o644}, Content: testimage.Bytes(9<<20+13, 99)})
	return testimage.Tar(files...)
}

// fileDigests are those of the files in a tar.
func fileDigests(t testing.TB, plain []byte) (all [][sha256.Size]byte) {
	t.Helper()
	for tr := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		content, readErr := io.ReadAll(tr)
		if err := errors.Join(err, readErr); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			all = append(all, sha256.Sum256(content))
		}
	}
}

// What Build makes describes the same layer as what Read makes, and so does the
// zTOC that is written from it and read again.
func TestBuild(t *testing.T) {
	plain := large()
	var frames bytes.Buffer
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for rest := plain; len(rest) > 0; {
		n := min(len(rest), 700_000)
		frames.Write(enc.EncodeAll(rest[:n], nil))
		rest = rest[n:]
	}
	for name, blob := range map[string][]byte{
		"none": plain, "gzip": gzipped(t, plain), "zstd frames": frames.Bytes(),
		"gzip members": append(gzipped(t, plain[:9<<20]), gzipped(t, plain[9<<20:])...),
	} {
		t.Run(name, func(t *testing.T) {
			device := &memory{t: t}
			built := build(t, blob, device)
			want, err := stream.Read(t.Context(), bytes.NewReader(blob), int64(len(blob)), &memory{t: t})
			if err != nil {
				t.Fatal(err)
			}
			if built.Blob != want.Blob || built.DiffID != want.DiffID || built.Size != int64(len(plain)) {
				t.Errorf("digests %s and %s, size %d", built.Blob, built.DiffID, built.Size)
			}
			if diff := cmp.Diff(want.Index.Inodes, built.Index.Inodes); diff != "" {
				t.Errorf("other tree (-want +got)\n%s", diff)
			}
			if n := len(built.Index.Spans); name != "none" && n < 3 {
				t.Errorf("%d spans", n)
			}
			if diff := cmp.Diff(fileDigests(t, plain), built.Files); diff != "" {
				t.Errorf("other files (-want +got)\n%s", diff)
			}
			content := indextest.Device(t, built.Index, blob)
			if !bytes.Equal(content, append(device.p, make([]byte, len(content)-len(device.p))...)) {
				t.Error("the device written differs from that of the index")
			}
			var document bytes.Buffer
			if err := built.WriteZTOC(&document, "test"); err != nil {
				t.Fatal(err)
			}
			read, err := soci.Decode(document.Bytes(), int64(len(blob)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want.Index.Inodes, read.Inodes); diff != "" {
				t.Errorf("the zTOC has another tree (-want +got)\n%s", diff)
			}
			if diff := cmp.Diff(built.Index.Spans, read.Spans, cmpopts.IgnoreFields(index.Span{}, "Window")); diff != "" && name != "none" {
				t.Errorf("the zTOC has other spans (-want +got)\n%s", diff)
			}
			if !bytes.Equal(content, indextest.Device(t, read, blob)) {
				t.Error("the device of the zTOC differs")
			}
			if share := float64(document.Len()) / float64(len(plain)); share > 0.015 {
				t.Errorf("the zTOC has %.2f %% of the layer's size", 100*share)
			}
		})
	}
}

// A zstd blob of one frame can only be read from its start.
func TestBuildSingleFrame(t *testing.T) {
	plain := testimage.Tar(testimage.File{Header: tar.Header{Name: "f"}, Content: bytes.Repeat(testimage.Bytes(1<<20, 1), 65)})
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	blob := enc.EncodeAll(plain, nil)
	device := &memory{t: t}
	built := build(t, blob, device)
	if !bytes.Equal(device.p, indextest.Device(t, built.Index, blob)) {
		t.Error("the device written differs from that of the index")
	}
	if err := built.WriteZTOC(&bytes.Buffer{}, "test"); !errors.Is(err, soci.ErrNotExpressible) {
		t.Errorf("its zTOC: %v", err)
	}
}

// Every layer of the corpus has the same tree by its zTOC as by a normal pull.
func TestBuildCorpus(t *testing.T) {
	for _, c := range testimage.Corpus() {
		t.Run(c.Name, func(t *testing.T) {
			for _, blob := range [][]byte{c.Tar, gzipped(t, c.Tar)} {
				built := build(t, blob, &memory{t: t})
				indextest.Check(t, built.Index, blob, indextest.Exact)
				var document bytes.Buffer
				err := built.WriteZTOC(&document, "test")
				if errors.Is(err, soci.ErrNotExpressible) && bytes.Contains(c.Tar, []byte("GNU.sparse")) {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				idx, err := soci.Decode(document.Bytes(), int64(len(blob)))
				if err != nil {
					t.Fatal(err)
				}
				indextest.Check(t, idx, blob, indextest.Exact)
			}
		})
	}
}
