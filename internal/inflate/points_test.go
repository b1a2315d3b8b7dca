// SPDX-License-Identifier: Apache-2.0

package inflate

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEveryPointResumes(t *testing.T) {
	z := NewReader(nil)
	for name, stream := range streams(t, gzip.HuffmanOnly, 0, 1, 9) {
		want, err := oracle(stream)
		if err != nil {
			t.Fatal(err)
		}
		for _, spacing := range []int64{0, 1000, 100_000, 1 << 40} {
			g := pointsOf(t, stream, spacing)
			if len(g.points) == 0 || g.points[0] != (Point{In: 10}) {
				t.Fatalf("%s, spacing %d: begins with %v", name, spacing, g.points)
			}
			for i, p := range g.points {
				if i%5 > 0 && len(g.points) > 20 {
					continue // each reads all that follows
				}
				checkPoint(t, z, name, stream, want, p, g.windows[i])
			}
		}
	}
}

func checkPoint(t *testing.T, z *Reader, name string, stream, want []byte, p Point, window []byte) {
	t.Helper()
	if p.Bits > 7 || p.In > int64(len(stream)) || p.Out > int64(len(want)) {
		t.Fatalf("%s: point %v", name, p)
	}
	padded := append(make([]byte, WindowSize), want[:p.Out]...)
	if !bytes.Equal(window, padded[len(padded)-WindowSize:]) {
		t.Fatalf("%s: window of %v", name, p)
	}
	for _, w := range [][]byte{window, window[max(0, WindowSize-int(p.Out)):]} {
		if err := z.Resume(from(stream, p), p.Bits, w); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(z)
		if err != nil || !bytes.Equal(got, want[p.Out:]) {
			t.Fatalf("%s: resumed at %v with a window of %d: %d bytes, %v; want %d", name, p, len(w), len(got), err, len(want)-int(p.Out))
		}
	}
}

// A point is more than the spacing after the last one, and the first place that is.
func TestSpacing(t *testing.T) {
	for _, stream := range [][]byte{
		gzipped(t, contents()["mixed"], 6, 3000),
		slices.Concat(gzipped(t, contents()["text"][:50_000], 1, 0), gzipped(t, nil, 6, 0), gzipped(t, contents()["text"], 0, 0)),
	} {
		all := pointsOf(t, stream, 0).points
		for _, spacing := range []int64{1, 2999, 3000, 3001, 65_535, 65_536, 200_000} {
			want := all[:1:1]
			for _, p := range all[1:] {
				if p.Out == 0 || p.Out-want[len(want)-1].Out > spacing {
					want = append(want, p)
				}
			}
			if diff := cmp.Diff(want, pointsOf(t, stream, spacing).points); diff != "" {
				t.Errorf("spacing %d: %s", spacing, diff)
			}
		}
	}
}

// Points are where zlib has them: after headers, between blocks, not after the
// last one of a member; and all that have nothing before them.
func TestPlacesOfPoints(t *testing.T) {
	flushed := gzipped(t, []byte("abc"), 0, 1) // stored: five bytes and the content
	empty := gzipped(t, nil, 0, 0)             // a header of ten bytes, an empty block, eight bytes
	for _, tt := range []struct {
		name   string
		stream []byte
		want   []Point
	}{
		{"empty", empty, []Point{{10, 0, 0}}},
		{"blocks, and empty ones", flushed, []Point{{10, 0, 0}, {16, 0, 1}, {27, 0, 2}, {38, 0, 3}}},
		{"members", slices.Concat(empty, empty, flushed), []Point{{10, 0, 0}, {33, 0, 0}, {56, 0, 0}, {62, 0, 1}, {73, 0, 2}, {84, 0, 3}}},
		{"in fixed blocks", slices.Concat(
			[]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0},
			pack(0, 1, 1, 2, 0, 7, 0, 1, 1, 2, 0, 7, 0, 1, 1, 2, 0x8c, 8, 0, 7, 1, 1, 1, 2, 0, 7),
			gzipped(t, []byte{0x31 + 0x30}, 0, 0)[16:],
		), []Point{{10, 0, 0}, {12, 6, 0}, {13, 4, 0}, {15, 2, 1}}},
	} {
		var got gathered
		z := NewReader(bytes.NewReader(tt.stream))
		z.Points(0, got.add)
		if _, err := io.Copy(io.Discard, z); err != nil && tt.name != "in fixed blocks" {
			t.Error(err)
		}
		if diff := cmp.Diff(tt.want, got.points); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}

// Points that are gathered after Resume count from the beginning of its source.
func TestPointsAfterResume(t *testing.T) {
	stream := gzipped(t, contents()["text"], 6, 0)
	all := pointsOf(t, stream, 0)
	middle := slices.IndexFunc(all.points, func(p Point) bool { return p.Out > 0 && p.Bits > 0 })
	start := all.points[middle]
	z := NewReader(nil)
	if err := z.Resume(from(stream, start), start.Bits, all.windows[middle]); err != nil {
		t.Fatal(err)
	}
	var g gathered
	z.Points(0, g.add)
	if _, err := io.Copy(io.Discard, z); err != nil {
		t.Fatal(err)
	}
	for i := range g.points {
		g.points[i].In += start.In - 1
		g.points[i].Out += start.Out
	}
	if diff := cmp.Diff(all.points[middle:], g.points); diff != "" {
		t.Error(diff)
	}
	if !slices.EqualFunc(all.windows[middle:], g.windows, bytes.Equal) {
		t.Error("windows differ")
	}
}

// What lies between two points is all that is needed for what they have between them.
func TestBetweenPoints(t *testing.T) {
	content := contents()["mixed"]
	stream := gzipped(t, content, 6, 0)
	g := pointsOf(t, stream, 20_000)
	z := NewReader(nil)
	for i, p := range g.points[:len(g.points)-1] {
		next := g.points[i+1]
		if err := z.Resume(from(stream[:next.In], p), p.Bits, g.windows[i]); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(z)
		if !bytes.Equal(got, content[p.Out:next.Out]) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("from %v to %v: %d bytes, %v", p, next, len(got), err)
		}
	}
}

func TestResumeRefuses(t *testing.T) {
	z := NewReader(nil)
	if err := z.Resume(bytes.NewReader(nil), 8, nil); err == nil {
		t.Error("accepts eight bits")
	}
	if err := z.Resume(bytes.NewReader(nil), 0, make([]byte, WindowSize+1)); err == nil {
		t.Error("accepts a larger window")
	}
	// A match that reaches back further than the window.
	block := append(pack(1, 1, 1, 2, 0x40, 7, 0x08, 5, 0, 7), make([]byte, 8)...) // three bytes, from three back
	for window, want := range map[string]error{"": ErrCorrupt, "ab": ErrCorrupt, "xyz": nil, "wxyz": nil} {
		if err := z.Resume(bytes.NewReader(block), 0, []byte(window)); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(z)
		if !errors.Is(err, want) || err == nil && len(got) != 3 {
			t.Errorf("with window %q: %q, %v", window, got, err)
		}
	}
}

func TestErrorOfAtEndsTheReader(t *testing.T) {
	full := errors.New("full")
	content := contents()["text"]
	z := NewReader(bytes.NewReader(gzipped(t, content, 6, 0)))
	var last Point
	z.Points(0, func(p Point, _ []byte) error {
		last = p
		if p.Out > 70_000 {
			return full
		}
		return nil
	})
	got, err := io.ReadAll(z)
	if err != full || !bytes.Equal(got, content[:last.Out]) { //nolint:errorlint // as it is
		t.Errorf("%d bytes, %v", len(got), err)
	}
	z.Reset(bytes.NewReader(gzipped(t, content, 6, 0)))
	if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, content) {
		t.Errorf("after Reset: %d bytes, %v", len(got), err)
	}
}
