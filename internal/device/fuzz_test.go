// SPDX-License-Identifier: Apache-2.0

package device

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast/holdfast/internal/index"
)

// A stream of frames: whatever a source sends, a chunk is accepted only if it
// has the right digest, no more is written than its size, and what comes after
// it in the stream is found again.
func FuzzStream(f *testing.F) {
	text := bytes.Repeat([]byte("content of a file, "), 40)
	sum := sha256.Sum256(text[10:300])
	for _, frame := range [][]byte{text, gzipped(f, text), zstandard(f, text), {}, {0x1f, 0x8b}, {0x28, 0xb5, 0x2f, 0xfd}} {
		for c := index.None; c <= index.Zstd+1; c++ {
			f.Add(byte(c), frame, uint16(10), uint16(290), sum[:], uint16(0))
			f.Add(byte(c), bytes.Repeat(frame, 2), uint16(10), uint16(290), sum[:], uint16(len(frame))) //nolint:gosec // small
			f.Add(byte(c), frame, uint16(10), uint16(0xffff), sum[:], uint16(0))
		}
	}
	f.Fuzz(func(t *testing.T, compression byte, data []byte, inner, size uint16, sum []byte, at uint16) {
		if int(at) > len(data) {
			return
		}
		c := index.Chunk{
			Size: int64(size), BlobOffset: int64(at), BlobSize: int64(len(data)) - int64(at), InnerOffset: int64(inner),
		}
		copy(c.Digest[:], sum)
		w := workers.New().(*worker) //nolint:forcetypeassert // ours
		w.reset(index.Compression(compression%4), bytes.NewReader(data), 0)
		for range 2 { // the second one of a frame that is open, or broken
			var out bytes.Buffer
			err := w.chunk(c, &out)
			if int64(out.Len()) > c.Size {
				t.Fatalf("%d bytes of a chunk of %d", out.Len(), c.Size)
			}
			if err == nil && sha256.Sum256(out.Bytes()) != c.Digest {
				t.Fatal("accepted a chunk with another digest")
			}
			if err == nil && int64(out.Len()) != c.Size {
				t.Fatalf("accepted %d bytes of a chunk of %d", out.Len(), c.Size)
			}
		}
	})
}

func gzipped(t testing.TB, p []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zstandard(t testing.TB, p []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close() //nolint:errcheck // writes to nothing
	return w.EncodeAll(p, nil)
}
