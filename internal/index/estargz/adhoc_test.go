package estargz

import (
	"bytes"
	"os"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/index/zstdchunked"
	"github.com/holdfast/holdfast/internal/testimage"
)

type null struct{}

func (null) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func TestAdhoc(t *testing.T) {
	p, err := os.ReadFile(os.Getenv("ADHOC"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range testimage.Formats() {
		t0 := time.Now()
		l, err := testimage.ConvertBytes(t.Context(), p, f, testimage.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t1 := time.Now()
		src := &indextest.Source{Blob: l.Bytes}
		d := blob.Descriptor{Size: int64(len(l.Bytes))}
		var idx *index.Index
		round := indextest.Exact
		switch f {
		case testimage.EStargz:
			idx, err = Open(t.Context(), src, d, l.Descriptor.Annotations)
			round = indextest.Seconds
		case testimage.ZstdChunked, testimage.ZstdChunkedStargz:
			idx, err = zstdchunked.Open(t.Context(), src, d, l.Descriptor.Annotations)
			if f == testimage.ZstdChunkedStargz {
				round = indextest.Seconds
			}
		default:
			var r *stream.Result
			r, err = stream.Read(t.Context(), bytes.NewReader(l.Bytes), d.Size, null{})
			if err == nil {
				idx = r.Index
			}
		}
		if err != nil {
			t.Fatal(f, err)
		}
		t.Log(f, len(p), len(l.Bytes), "convert", t1.Sub(t0), "index", time.Since(t1), len(idx.Inodes), len(idx.Chunks), src.Requests, src.Bytes)
		indextest.Check(t, idx, l.Bytes, round)
	}
}
