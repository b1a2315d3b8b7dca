// SPDX-License-Identifier: Apache-2.0

package inflate

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	klauspost "github.com/klauspost/compress/gzip"
)

// contents are what streams are made of; only what is mixed is larger than what is decompressed at once.
func contents() map[string][]byte {
	rng := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 70_000)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	var text strings.Builder
	for text.Len() < 100_000 {
		fmt.Fprintf(&text, "line %d of %x\n", rng.IntN(100), rng.Uint64()>>(8*rng.IntN(8)))
	}
	// Symbols that are rarer and rarer have long codes.
	skewed := make([]byte, 90_000)
	for i := range skewed {
		skewed[i] = byte(min(255, int(rng.ExpFloat64()*9)))
	}
	// Matches of all lengths from all distances.
	matches := bytes.Clone(noise[:40_000])
	for len(matches) < 120_000 {
		at := len(matches) - 1 - rng.IntN(40_000)
		matches = append(matches, matches[at:min(len(matches), at+3+rng.IntN(300))]...)
		matches = append(matches, byte(rng.Uint32()))
	}
	return map[string][]byte{
		"empty":    {},
		"one byte": {'x'},
		"short":    []byte("hello, hello, hello"),
		"zeros":    make([]byte, 100_000),
		"period 3": bytes.Repeat([]byte("abc"), 20_000),
		"period 9": bytes.Repeat([]byte("abcdefghi"), 7000),
		"window":   noise[:WindowSize],
		"noise":    noise,
		"text":     []byte(text.String()),
		"skewed":   skewed,
		"matches":  matches,
		"mixed":    bytes.Join([][]byte{noise, skewed, make([]byte, 70_000), matches, skewed}, nil),
	}
}

// gzipped is the content as compress/gzip has it, flushed after each flush bytes unless that is 0.
func gzipped(t testing.TB, content []byte, level, flush int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, level)
	if err != nil {
		t.Fatal(err)
	}
	for ; flush > 0 && len(content) > flush; content = content[flush:] {
		if _, err := w.Write(content[:flush]); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// streams are the contents as these levels have them, flushed, and in several members.
func streams(t testing.TB, levels ...int) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for name, content := range contents() {
		for _, level := range levels {
			all[fmt.Sprintf("%s at level %d", name, level)] = gzipped(t, content, level, 0)
		}
		all[name+" with flushes"] = gzipped(t, content, 6, 10_000)
		var members []byte
		for i, part := range [][]byte{content[:len(content)/3], nil, content[len(content)/3:]} {
			members = append(members, gzipped(t, part, 3*i, 0)...)
		}
		all[name+" in members"] = members
	}
	return all
}

// oracle is what a stream is: its content, if both compress/gzip, which knows
// truncated headers, and klauspost's, which knows reserved flags, accept it.
func oracle(stream []byte) ([]byte, error) {
	zr, err := gzip.NewReader(bytes.NewReader(stream))
	if err != nil {
		return nil, err
	}
	content, err := io.ReadAll(zr)
	if err != nil {
		return nil, err
	}
	kr, err := klauspost.NewReader(bytes.NewReader(stream))
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(io.Discard, kr); err != nil {
		return nil, err
	}
	return content, nil
}

// gathered are the points of a stream, with their windows.
type gathered struct {
	points  []Point
	windows [][]byte
}

func (g *gathered) add(p Point, window []byte) error {
	g.points = append(g.points, p)
	g.windows = append(g.windows, bytes.Clone(window))
	return nil
}

func pointsOf(t testing.TB, stream []byte, spacing int64) gathered {
	t.Helper()
	var g gathered
	z := NewReader(bytes.NewReader(stream))
	z.Points(spacing, g.add)
	if _, err := io.Copy(io.Discard, z); err != nil {
		t.Fatal(err)
	}
	return g
}

// from returns what is to be given to Resume for p.
func from(stream []byte, p Point) io.Reader {
	if p.Bits > 0 {
		return bytes.NewReader(stream[p.In-1:])
	}
	return bytes.NewReader(stream[p.In:])
}
