// SPDX-License-Identifier: Apache-2.0

package inflate

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"strings"
	"testing"
)

// Whatever gzip accepts is accepted, with the same content, and nothing else.
func FuzzReader(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	text := []byte(strings.Repeat("a text that is short, ", 20))
	for level := gzip.HuffmanOnly; level <= gzip.BestCompression; level++ {
		f.Add(gzipped(f, text, level, 100))
		f.Add(append(gzipped(f, text, level, 0), gzipped(f, text[:100], level, 0)...))
	}
	z := NewReader(nil)
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) > 1<<16 {
			return
		}
		want, refused := oracle(stream)
		z.Reset(bytes.NewReader(stream))
		got, err := io.ReadAll(z)
		if (refused == nil) != (err == nil) || err == nil && !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, %v; gzip has %d, %v", len(got), err, len(want), refused)
		}
		checkError(t, err)
		// The careful loop alone has to say the same.
		slow := NewReader(oneByOne{bytes.NewReader(stream)})
		again, errAgain := io.ReadAll(slow)
		if !bytes.Equal(got, again) || (err == nil) != (errAgain == nil) {
			t.Fatalf("byte by byte %d bytes, %v; at once %d, %v", len(again), errAgain, len(got), err)
		}
	})
}

type oneByOne struct{ r io.Reader }

func (o oneByOne) Read(p []byte) (int, error) { return o.r.Read(p[:1]) }

// Whatever Resume is told, it gives no more than the input can say.
func FuzzResume(f *testing.F) {
	f.Add([]byte{3, 0, 0, 0, 0, 0, 0, 0, 0, 0}, byte(0), []byte(nil))
	stream := gzipped(f, []byte(strings.Repeat("a text that is short, ", 20)), 6, 100)
	g := pointsOf(f, stream, 0)
	for i, p := range g.points {
		f.Add(stream[p.In-min(int64(p.Bits), 1):], p.Bits, g.windows[i][WindowSize-p.Out:])
	}
	z := NewReader(nil)
	f.Fuzz(func(t *testing.T, stream []byte, bits byte, window []byte) {
		if len(stream) > 1<<16 {
			return
		}
		if err := z.Resume(bytes.NewReader(stream), bits, window); err != nil {
			if bits < 8 && len(window) <= WindowSize {
				t.Fatal(err)
			}
			return
		}
		var points gathered
		z.Points(100, points.add)
		n, err := z.WriteTo(io.Discard)
		if n > int64(8*len(stream)*maxMatch) {
			t.Fatalf("%d bytes out of %d", n, len(stream))
		}
		checkError(t, err)
		last := Point{}
		for _, p := range points.points {
			if p.Bits > 7 || p.In < last.In || p.Out < last.Out || p.In > int64(len(stream)) || p.Out > n {
				t.Fatalf("after %v, %v", last, p)
			}
			last = p
		}
	})
}

func checkError(t *testing.T, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("neither corrupt nor short: %v", err)
	}
}
