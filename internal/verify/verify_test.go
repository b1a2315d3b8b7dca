// SPDX-License-Identifier: Apache-2.0

package verify_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/verify"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// content is a device that takes everything in.
type content struct {
	plain, blob []byte
	err         error
	mismatch    *device.Mismatch
}

func (c *content) WriteAt(p []byte, off int64) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	c.plain = append(c.plain[:min(off, int64(len(c.plain)))], make([]byte, max(0, off-int64(len(c.plain))))...)
	c.plain = append(c.plain, p...)
	return len(p), nil
}

func (c *content) Blob(p []byte)            { c.blob = append(c.blob, p...) }
func (c *content) Finish() *device.Mismatch { return c.mismatch }

// sample is a layer of several spans, and its index.
func sample(t *testing.T, f testimage.Format) (testimage.Layer, *index.Index) {
	t.Helper()
	l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(
		testimage.File{Header: tar.Header{Name: "a"}, Content: testimage.Bytes(5<<20, 1)},
		testimage.File{Header: tar.Header{Name: "b"}, Content: testimage.Bytes(7<<20, 2)},
	), f, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	windows, err := os.Create(filepath.Join(t.TempDir(), "windows"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = windows.Close() })
	res, err := stream.Build(t.Context(), bytes.NewReader(l.Bytes), int64(len(l.Bytes)), &content{}, windows)
	if err != nil {
		t.Fatal(err)
	}
	return l, res.Index
}

func table(t *testing.T, idx *index.Index) *index.Table {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "chunks"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(index.WriteTable(f, idx), f.Close()); err != nil {
		t.Fatal(err)
	}
	tab, err := index.OpenTable(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tab.Close() })
	return tab
}

// move moves where a span lies in the blob.
func move(idx *index.Index, span int, by int64) {
	old := idx.Spans[span].BlobOffset
	idx.Spans[span].BlobOffset += by
	for i := range idx.Chunks {
		if idx.Chunks[i].BlobOffset == old {
			idx.Chunks[i].BlobOffset += by
		}
	}
}

func TestContent(t *testing.T) {
	l, idx := sample(t, testimage.Gzip)
	last := len(idx.Spans) - 1
	if last < 2 {
		t.Fatalf("%d spans", last+1)
	}
	for name, c := range map[string]struct {
		change func(*index.Index)
		want   string
	}{
		"right":                {func(*index.Index) {}, ""},
		"starts elsewhere":     {func(i *index.Index) { i.Spans[1].Start++ }, "span 1 starts at"},
		"lies before":          {func(i *index.Index) { move(i, 1, -1) }, "no place to start at"},
		"lies behind":          {func(i *index.Index) { move(i, last, i.Spans[last].BlobSize-1) }, "after the last place"},
		"begins at other bits": {func(i *index.Index) { i.Spans[1].Bits = (i.Spans[1].Bits + 1) % 8 }, "no place to start at"},
		"other window":         {func(i *index.Index) { i.Windows = ones{} }, "span 1 has other bytes before it"},
		"other content":        {func(i *index.Index) { i.Chunks[1].InnerOffset++ }, "where the layer has that of"},
		"nothing at the end":   {func(i *index.Index) { i.Chunks = i.Chunks[:len(i.Chunks)-1] }, "nothing at"},
	} {
		t.Run(name, func(t *testing.T) {
			changed := *idx
			changed.Spans, changed.Chunks = slices.Clone(idx.Spans), slices.Clone(idx.Chunks)
			c.change(&changed)
			out := &content{}
			res, mismatch, err := verify.Content(t.Context(), bytes.NewReader(l.Bytes), int64(len(l.Bytes)), out, table(t, &changed))
			if err != nil || res.Blob != l.Descriptor.Digest || res.DiffID != l.DiffID {
				t.Fatalf("%+v, error %v", res, err)
			}
			if (mismatch == nil) != (c.want == "") || mismatch != nil && !strings.Contains(mismatch.Error(), c.want) {
				t.Errorf("mismatch %v, want %q", mismatch, c.want)
			}
			if !bytes.Equal(out.blob, l.Bytes) || !bytes.Equal(out.plain[:5<<20], testimage.Bytes(5<<20, 1)) || !bytes.Equal(out.plain[5<<20:], testimage.Bytes(7<<20, 2)) {
				t.Errorf("the device has got %d bytes of the blob, %d of the content", len(out.blob), len(out.plain))
			}
		})
	}
}

// ones reads as bytes that no layer here has.
type ones struct{}

func (ones) ReadAt(p []byte, _ int64) (int, error) {
	for i := range p {
		p[i] = 1
	}
	return len(p), nil
}

func TestOtherCompressions(t *testing.T) {
	for _, f := range []testimage.Format{testimage.Zstd, testimage.Uncompressed} {
		l, idx := sample(t, f)
		if _, mismatch, err := verify.Content(t.Context(), bytes.NewReader(l.Bytes), int64(len(l.Bytes)), &content{}, table(t, idx)); mismatch != nil || err != nil {
			t.Errorf("%s: %v, error %v", f, mismatch, err)
		}
	}
}

// What the device says comes first; what fails says nothing.
func TestErrors(t *testing.T) {
	l, idx := sample(t, testimage.Gzip)
	tab, size, broken := table(t, idx), int64(len(l.Bytes)), errors.New("broken")
	got := &device.Mismatch{Chunk: 3}
	if _, mismatch, err := verify.Content(t.Context(), bytes.NewReader(l.Bytes), size, &content{mismatch: got}, tab); !errors.Is(mismatch, got) || err != nil {
		t.Errorf("mismatch %v, error %v", mismatch, err)
	}
	for name, c := range map[string]struct {
		r    io.Reader
		out  *content
		want error
	}{
		"device":  {bytes.NewReader(l.Bytes), &content{err: broken}, broken},
		"source":  {io.MultiReader(bytes.NewReader(l.Bytes[:size/2]), iotest.ErrReader(broken)), &content{}, broken},
		"no tar":  {bytes.NewReader(testimage.Bytes(len(l.Bytes), 9)), &content{}, index.ErrInvalid},
		"shorter": {bytes.NewReader(l.Bytes[:size-1]), &content{}, index.ErrInvalid},
	} {
		if _, mismatch, err := verify.Content(t.Context(), c.r, size, c.out, tab); mismatch != nil || !errors.Is(err, c.want) {
			t.Errorf("%s: mismatch %v, error %v", name, mismatch, err)
		}
	}
}
