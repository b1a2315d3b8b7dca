// SPDX-License-Identifier: Apache-2.0

package fill

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/testimage"
)

// spanned is a layer of several spans, with the index that reading it makes.
func spanned(t *testing.T, f testimage.Format) (testimage.Layer, *index.Index) {
	t.Helper()
	files := []testimage.File{{Header: tar.Header{Name: "d", Typeflag: tar.TypeDir}}}
	for _, name := range []string{"a", "b", "c"} {
		text := bytes.Repeat(testimage.Bytes(1000, uint64(name[0])), 3000)
		files = append(files, testimage.File{Header: tar.Header{Name: "d/" + name}, Content: append(text, testimage.Bytes(2<<20, 7)...)})
	}
	plain := testimage.Tar(files...)
	l := convert(t, plain, testimage.Gzip)
	if f == testimage.Zstd {
		l = inFrames(t, plain)
	}
	windows, err := os.Create(filepath.Join(t.TempDir(), "windows"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = windows.Close() })
	res, err := stream.Build(t.Context(), bytes.NewReader(l.Bytes), l.Descriptor.Size, nowhere{}, windows)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Index.Spans) < 3 {
		t.Fatalf("%d spans", len(res.Index.Spans))
	}
	return l, res.Index
}

// inFrames is a layer of several zstd frames.
func inFrames(t *testing.T, plain []byte) testimage.Layer {
	t.Helper()
	l := convert(t, plain, testimage.Uncompressed)
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for rest := plain; len(rest) > 0; {
		n := min(len(rest), 1<<20)
		out = enc.EncodeAll(rest[:n], out)
		rest = rest[n:]
	}
	l.Bytes = out
	l.Descriptor.Digest, l.Descriptor.Size = digest.FromBytes(out), int64(len(out))
	return l
}

type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// addIndex adds a lazy layer with an index.
func (r *rig) addIndex(l testimage.Layer, idx *index.Index) *layer.Layer {
	r.t.Helper()
	st, err := r.Layers.Stage(l.Descriptor.Digest)
	if err != nil {
		r.t.Fatal(err)
	}
	got, err := st.Commit(r.t.Context(), layer.Meta{
		Digest: l.Descriptor.Digest, Size: l.Descriptor.Size, DiffID: l.DiffID, BlobCompression: idx.Compression,
	}, idx, false)
	if err != nil {
		r.t.Fatal(err)
	}
	got.Device().AddSources([]blob.Source{blobtest.NewMemory(l.Bytes)})
	return got
}

// TestSpansVerified fills layers in spans.
func TestSpansVerified(t *testing.T) {
	for _, f := range []testimage.Format{testimage.Gzip, testimage.Zstd} {
		t.Run(string(f), func(t *testing.T) {
			r := newRig(t)
			content, idx := spanned(t, f)
			l := r.addIndex(content, idx)
			if _, err := os.ReadFile(filepath.Join(l.MountDirectory(), "diff/d/b")); err != nil { // some is there already
				t.Fatal(err)
			}
			if err := r.fillOnce(l); err != nil {
				t.Fatal(err)
			}
			if v := l.Verdict(); !v.Verified || !l.Complete() {
				t.Errorf("verdict %+v, complete %v", v, l.Complete())
			}
		})
	}
}

// TestSpansThatLie fills layers whose spans have the right digests, and would be read
// wrong all the same.
func TestSpansThatLie(t *testing.T) {
	for name, c := range map[string]struct {
		format testimage.Format
		lie    func(idx *index.Index)
		want   string
	}{
		"window":          {testimage.Gzip, func(idx *index.Index) { idx.Windows = bytes.NewReader(make([]byte, 1<<20)) }, "other bytes before it"},
		"no window":       {testimage.Gzip, func(idx *index.Index) { idx.Spans[1].Window = -1 }, "other bytes before it"},
		"start":           {testimage.Gzip, func(idx *index.Index) { idx.Spans[1].Start += 512 }, "no place to start"},
		"bits":            {testimage.Gzip, func(idx *index.Index) { idx.Spans[1].Bits = (idx.Spans[1].Bits + 1) % 8 }, "span 1"},
		"frame's start":   {testimage.Zstd, func(idx *index.Index) { idx.Spans[1].Start += 512 }, "no place to start"},
		"digest":          {testimage.Gzip, func(idx *index.Index) { idx.Spans[1].Digest[0]++ }, "span 1"},
		"content shifted": {testimage.Gzip, func(idx *index.Index) { idx.Chunks[0].InnerOffset++ }, "content of"},
		"content swapped": {testimage.Zstd, func(idx *index.Index) {
			idx.Chunks[0].InnerOffset, idx.Chunks[1].InnerOffset = idx.Chunks[1].InnerOffset, idx.Chunks[0].InnerOffset
		}, "content of"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			content, idx := spanned(t, c.format)
			c.lie(idx)
			l := r.addIndex(content, idx)
			if err := r.fillOnce(l); err != nil {
				t.Fatal(err)
			}
			if v := l.Verdict(); v.Verified || !strings.Contains(v.Quarantined, c.want) {
				t.Errorf("verdict %+v, want %q", v, c.want)
			}
		})
	}
}
