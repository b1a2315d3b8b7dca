// SPDX-License-Identifier: Apache-2.0

package soci_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/awslabs/soci-snapshotter/ztoc/fbs/ztoc"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/soci"
)

const blobSize = 10_000_000

// spans are three of a layer, the second of which shares a byte with the first.
func spans() []index.Span {
	return []index.Span{
		{BlobOffset: 10, BlobSize: 1_000_000, Window: -1, Digest: [32]byte{1}},
		{BlobOffset: 1_000_009, BlobSize: 1_999_991, Start: 5_000_000, Bits: 3, Window: 0, Digest: [32]byte{2}},
		{BlobOffset: 3_000_000, BlobSize: blobSize - 3_000_000, Start: 11_000_000, Window: index.WindowSize, Digest: [32]byte{3}},
	}
}

func windows() *bytes.Reader {
	return bytes.NewReader(bytes.Repeat([]byte("window"), index.WindowSize))
}

func layer(c index.Compression, s []index.Span) soci.Layer {
	return soci.Layer{Tool: "test", Compression: c, BlobSize: blobSize, PlainSize: 20_000_000, Spans: s, Windows: windows()}
}

// headers are entries of all types.
func headers() []*tar.Header {
	stamp := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	return []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755, Uid: 1, Gid: 2, Uname: "u", Gname: "g", ModTime: stamp},
		{Typeflag: tar.TypeReg, Name: "d/file", Mode: 0o4644, Size: 9_000_000, ModTime: stamp, PAXRecords: map[string]string{
			"SCHILY.xattr.user.a": "value", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02", "mtime": "1"}},
		{Typeflag: tar.TypeSymlink, Name: "d/link", Linkname: "file", ModTime: stamp},
		{Typeflag: tar.TypeLink, Name: "d/hard", Linkname: "d/file", Mode: 0o4644, ModTime: stamp},
		{Typeflag: tar.TypeChar, Name: "d/null", Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: stamp},
		{Typeflag: tar.TypeBlock, Name: "d/disk", Mode: 0o660, Devmajor: 8, ModTime: stamp},
		{Typeflag: tar.TypeFifo, Name: "d/fifo", ModTime: stamp},
		{Typeflag: tar.TypeReg, Name: "d/.wh.gone", ModTime: stamp},
		{Typeflag: tar.TypeReg, Name: "last", Size: 1, ModTime: stamp},
	}
}

// document makes a zTOC.
func document(t testing.TB, l soci.Layer, hs ...*tar.Header) []byte {
	t.Helper()
	w := soci.NewWriter()
	at := int64(512)
	for _, h := range hs {
		w.Add(h, at)
		at += (h.Size+511)/512*512 + 512
	}
	var out bytes.Buffer
	if err := w.WriteTo(&out, l); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestFormat reads what was written with the accessors that others use.
func TestFormat(t *testing.T) {
	z := ztoc.GetRootAsZtoc(document(t, layer(index.Gzip, spans()), headers()...), 0)
	if string(z.Version()) != "0.9" || string(z.BuildToolIdentifier()) != "test" || z.CompressedArchiveSize() != blobSize || z.UncompressedArchiveSize() != 20_000_000 {
		t.Errorf("version %q, tool %q, sizes %d and %d", z.Version(), z.BuildToolIdentifier(), z.CompressedArchiveSize(), z.UncompressedArchiveSize())
	}
	info := z.CompressionInfo(nil)
	if info.CompressionAlgorithm() != ztoc.CompressionAlgorithmGzip || info.MaxSpanId() != 2 || info.SpanDigestsLength() != 3 {
		t.Errorf("algorithm %v, last span %d, %d digests", info.CompressionAlgorithm(), info.MaxSpanId(), info.SpanDigestsLength())
	}
	if d := string(info.SpanDigests(1)); d != "sha256:02"+strings.Repeat("00", 31) {
		t.Errorf("digest %s", d)
	}
	// As gzip_zinfo.c has them: the offset is that of the first whole byte.
	c := info.CheckpointsBytes()
	if want := 12 + 3*(17+32768); len(c) != want || info.CheckpointsLength() != want {
		t.Fatalf("%d bytes of checkpoints, want %d", len(c), want)
	}
	second := c[12+17+32768:]
	if n := binary.LittleEndian.Uint32(c); n != 3 || binary.LittleEndian.Uint64(c[4:]) != 4<<20 {
		t.Errorf("%d spans of %d", n, binary.LittleEndian.Uint64(c[4:]))
	}
	if in, out := binary.LittleEndian.Uint64(second), binary.LittleEndian.Uint64(second[8:]); in != 1_000_010 || out != 5_000_000 || second[16] != 3 {
		t.Errorf("second span at %d for %d, %d bits", in, out, second[16])
	}
	if !bytes.HasPrefix(second[17:], []byte("windowwindow")) {
		t.Errorf("window %q", second[17:30])
	}
	var m ztoc.FileMetadata
	if z.Toc(nil).MetadataLength() != len(headers()) || !z.Toc(nil).Metadata(&m, 1) {
		t.Fatalf("%d entries", z.Toc(nil).MetadataLength())
	}
	if string(m.Name()) != "d/file" || string(m.Type()) != "reg" || m.Mode() != 0o4644 || m.UncompressedOffset() != 1024 ||
		m.UncompressedSize() != 9_000_000 || string(m.ModTime()) != "2026-01-02T03:04:05.000000678Z" || m.XattrsLength() != 3 {
		t.Errorf("entry %q of type %q, mode %o, at %d+%d, of %s, %d records", m.Name(), m.Type(), m.Mode(), m.UncompressedOffset(), m.UncompressedSize(), m.ModTime(), m.XattrsLength())
	}
}

func TestDecode(t *testing.T) {
	idx, err := soci.Decode(document(t, layer(index.Gzip, spans()), headers()...), blobSize)
	if err != nil {
		t.Fatal(err)
	}
	if idx.Kind != index.SOCI || idx.Compression != index.Gzip || len(idx.Spans) != 3 || len(idx.Inodes) != 9 {
		t.Errorf("kind %s, compression %d, %d spans, %d inodes", idx.Kind, idx.Compression, len(idx.Spans), len(idx.Inodes))
	}
	for i, want := range spans() {
		got := idx.Spans[i]
		if want.Window >= 0 {
			p := make([]byte, 10)
			if _, err := idx.Windows.ReadAt(p, got.Window); err != nil || !bytes.Contains([]byte("windowwindowwindow"), p) {
				t.Errorf("window of span %d: %q, %v", i, p, err)
			}
			want.Window = got.Window
		}
		if got != want {
			t.Errorf("span %d is %+v, want %+v", i, got, want)
		}
	}
	// The file is cut where spans begin.
	if n := len(idx.Chunks); n != 3 || idx.Chunks[1].InnerOffset != 0 || idx.Chunks[1].BlobOffset != 1_000_009 || idx.Chunks[0].InnerOffset != 1024 {
		t.Errorf("chunks %+v", idx.Chunks)
	}
}

// A zTOC of the first version does not have the first checkpoint.
func TestFirstVersion(t *testing.T) {
	p := document(t, layer(index.Gzip, spans()), headers()...)
	const record = 17 + 32768
	at := len(p) - 12 - 3*record
	old := append(bytes.Clone(p[:at+12]), p[at+12+record:]...)
	binary.LittleEndian.PutUint32(old[at-4:], uint32(12+2*record))
	idx, err := soci.Decode(old, blobSize)
	if err != nil {
		t.Fatal(err)
	}
	if s := idx.Spans; len(s) != 3 || s[0].BlobOffset != 10 || s[0].Window != -1 || s[1].BlobOffset != 1_000_009 {
		t.Errorf("spans %+v", s)
	}
}

// What is not sound is refused, by a clear error.
func TestRefuses(t *testing.T) {
	good := headers()
	change := func(f func(s []index.Span)) []byte {
		s := spans()
		f(s)
		return document(t, layer(index.Gzip, s), good...)
	}
	entry := func(h *tar.Header) []byte { return document(t, layer(index.Gzip, spans()), h) }
	whole := document(t, layer(index.Gzip, spans()), good...)
	for name, c := range map[string]struct {
		p    []byte
		size int64
		want string
	}{
		"nothing":                {nil, blobSize, "too short"},
		"zeros":                  {make([]byte, 1000), blobSize, "version"},
		"ones":                   {bytes.Repeat([]byte{0xff}, 1000), blobSize, "damaged"},
		"cut off":                {whole[:len(whole)-1000], blobSize, "damaged"},
		"other blob":             {whole, blobSize + 1, "that of a layer of"},
		"newer":                  {bytes.Replace(whole, []byte("0.9"), []byte("1.0"), 1), blobSize, `version "1.0"`},
		"no digest":              {bytes.Replace(whole, []byte("sha256:02"), []byte("sha256:0x"), 1), blobSize, "span 1: digest"},
		"other algorithm":        {bytes.Replace(whole, []byte("sha256:02"), []byte("sha384:02"), 1), blobSize, "span 1: digest"},
		"spans out of order":     {change(func(s []index.Span) { s[2].BlobOffset = 50 }), blobSize, "span"},
		"starts out of order":    {change(func(s []index.Span) { s[2].Start = 3 }), blobSize, "span"},
		"span behind the blob":   {change(func(s []index.Span) { s[2].BlobOffset = blobSize + 5 }), blobSize, "span"},
		"first one not first":    {change(func(s []index.Span) { s[0].Start, s[0].Window = 100, 0 }), blobSize, "span 0"},
		"bits":                   {change(func(s []index.Span) { s[1].Bits = 8 }), blobSize, "span 1"},
		"span without end":       {change(func(s []index.Span) { s[2].Start = 1 << 40 }), blobSize, "span 1"},
		"content behind the end": {document(t, layer(index.Gzip, spans()), &tar.Header{Typeflag: tar.TypeReg, Name: "f", Size: 1 << 35}), blobSize, "content"},
		"name":                   {entry(&tar.Header{Typeflag: tar.TypeReg, Name: "../f"}), blobSize, "leaves its directory"},
		"xattr":                  {entry(&tar.Header{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.redirect": "/"}}), blobSize, "overlayfs"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := soci.Decode(c.p, c.size)
			if !errors.Is(err, index.ErrInvalid) && !errors.Is(err, index.ErrTooLarge) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestNotExpressible(t *testing.T) {
	for name, h := range map[string]*tar.Header{
		"sparse": {Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{"GNU.sparse.major": "1"}},
		"type":   {Typeflag: 'V', Name: "f"},
	} {
		w := soci.NewWriter()
		w.Add(h, 512)
		if err := w.WriteTo(&bytes.Buffer{}, layer(index.Gzip, spans())); !errors.Is(err, soci.ErrNotExpressible) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOpen(t *testing.T) {
	name := filepath.Join(t.TempDir(), "ztoc")
	for content, good := range map[string]bool{"": false, "junk": false, string(document(t, layer(index.Gzip, spans()), headers()...)): true} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		z, err := soci.Open(f, blobSize)
		if (err == nil) != good {
			t.Errorf("%d bytes: %v", len(content), err)
		}
		if err == nil {
			err = z.Close()
		} else {
			err = nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Error(err)
		}
	}
}

// FuzzDecode: whatever it reads, the index is sound, or there is an error.
func FuzzDecode(f *testing.F) {
	f.Add(document(f, layer(index.Gzip, spans()), headers()...))
	f.Add(document(f, layer(index.Gzip, spans()[:1]), headers()[:1]...))
	f.Add(document(f, layer(index.Zstd, spans()[:1]), headers()[:2]...))
	f.Add(document(f, layer(index.None, []index.Span{
		{BlobSize: 4 << 20, Window: -1}, {BlobOffset: 4 << 20, BlobSize: 4 << 20, Start: 4 << 20, Window: -1},
		{BlobOffset: 8 << 20, BlobSize: blobSize - 8<<20, Start: 8 << 20, Window: -1}}), headers()...))
	f.Fuzz(func(t *testing.T, p []byte) {
		idx, err := soci.Decode(p, blobSize)
		if err != nil {
			if !errors.Is(err, index.ErrInvalid) && !errors.Is(err, index.ErrTooLarge) {
				t.Errorf("error %v", err)
			}
			return
		}
		for i, s := range idx.Spans {
			if s.BlobOffset < 0 || s.BlobSize <= 0 || s.BlobOffset+s.BlobSize > blobSize || s.Bits > 7 {
				t.Errorf("span %d is %+v", i, s)
			}
			if s.Window >= 0 {
				if n, err := idx.Windows.ReadAt(make([]byte, index.WindowSize), s.Window); n != index.WindowSize {
					t.Errorf("window of span %d: %d bytes, %v", i, n, err)
				}
			}
		}
		var end int64
		for i, c := range idx.Chunks {
			if c.Offset < end || c.Size <= 0 || c.End() > idx.DeviceSize || c.InnerOffset < 0 {
				t.Errorf("chunk %d is %+v, after one that ends at %d", i, c, end)
			}
			end = c.End()
		}
	})
}
