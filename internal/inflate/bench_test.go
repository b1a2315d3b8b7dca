// SPDX-License-Identifier: Apache-2.0

package inflate

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	klauspost "github.com/klauspost/compress/gzip"
)

// BenchmarkLayer compares with klauspost/compress/gzip on what an image of a
// compiler would have: programs and source text.
func BenchmarkLayer(b *testing.B) {
	layer := goLayer(b, 64<<20)
	stream := gzipped(b, layer, 6, 0)
	b.Logf("%d bytes of %d", len(stream), len(layer))
	kr, err := klauspost.NewReader(bytes.NewReader(stream))
	if err != nil {
		b.Fatal(err)
	}
	z := NewReader(nil)
	for _, bb := range []struct {
		name  string
		begin func(io.Reader) error
		r     io.Reader
	}{
		{"klauspost", kr.Reset, kr},
		{"inflate", func(r io.Reader) error { z.Reset(r); return nil }, z},
		{"inflate, by Read", func(r io.Reader) error { z.Reset(r); return nil }, struct{ io.Reader }{z}},
		{"inflate, with points", func(r io.Reader) error {
			z.Reset(r)
			z.Points(4<<20, func(Point, []byte) error { return nil })
			return nil
		}, z},
	} {
		b.Run(bb.name, func(b *testing.B) { decompress(b, stream, len(layer), bb.begin, bb.r) })
	}
	stored := gzipped(b, layer, gzip.NoCompression, 0)
	b.Run("stored", func(b *testing.B) {
		decompress(b, stored, len(layer), func(r io.Reader) error { z.Reset(r); return nil }, z)
	})
}

func decompress(b *testing.B, stream []byte, size int, begin func(io.Reader) error, r io.Reader) {
	b.Helper()
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		if err := begin(bytes.NewReader(stream)); err != nil {
			b.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, r); err != nil || n != int64(size) {
			b.Fatal(n, err)
		}
	}
}

// goLayer is a tar of the Go installation, as far as it fits into size bytes.
func goLayer(b *testing.B, size int) []byte {
	b.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	root := strings.TrimSpace(string(out))
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, dir := range []string{"bin", "src"} { // the programs are a quarter
		err = filepath.WalkDir(filepath.Join(root, dir), func(name string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			content, err := os.ReadFile(name)
			if err != nil || buf.Len()+len(content)+1024 > size {
				return err
			}
			if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o644}); err != nil {
				return err
			}
			_, err = w.Write(content)
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	return buf.Bytes()
}
