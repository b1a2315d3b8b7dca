// SPDX-License-Identifier: Apache-2.0

package inflate

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"
)

func TestDecompressesWhatGzipDoes(t *testing.T) {
	z := NewReader(nil)
	for name, stream := range streams(t, gzip.HuffmanOnly, gzip.DefaultCompression, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9) {
		want, err := oracle(stream)
		if err != nil {
			t.Fatal(err)
		}
		z.Reset(bytes.NewReader(stream))
		got, err := io.ReadAll(z)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
		}
		if z.InputOffset() != int64(len(stream)) {
			t.Errorf("%s: used %d bytes of %d", name, z.InputOffset(), len(stream))
		}
		var copied bytes.Buffer
		z.Reset(bytes.NewReader(stream))
		n, err := z.WriteTo(&copied)
		if err != nil || n != int64(len(want)) || !bytes.Equal(copied.Bytes(), want) {
			t.Errorf("%s: wrote %d bytes, %v; want %d", name, n, err, len(want))
		}
	}
}

func TestReadsOfAnySizeFromSourcesOfAnyKind(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	sources := map[string]func(io.Reader) io.Reader{
		"one byte at once":    iotest.OneByteReader,
		"half of it":          iotest.HalfReader,
		"EOF with the last":   iotest.DataErrReader,
		"nothing in between":  func(r io.Reader) io.Reader { return &hesitant{r: r} },
		"as much as it likes": func(r io.Reader) io.Reader { return r },
	}
	z := NewReader(nil)
	for name, content := range contents() {
		stream := append(gzipped(t, content, 6, 0), gzipped(t, content, 0, 0)...)
		want := append(bytes.Clone(content), content...)
		for kind, source := range sources {
			z.Reset(source(bytes.NewReader(stream)))
			var got []byte
			buf := make([]byte, 70_000)
			var err error
			for err == nil {
				var n int
				n, err = z.Read(buf[:1+rng.IntN(1<<rng.IntN(17))])
				got = append(got, buf[:n]...)
			}
			if !errors.Is(err, io.EOF) || !bytes.Equal(got, want) {
				t.Errorf("%s from %s: %d bytes, %v; want %d", name, kind, len(got), err, len(want))
			}
		}
	}
}

// hesitant returns nothing now and then, which io.Reader permits.
type hesitant struct {
	r     io.Reader
	calls int
}

func (h *hesitant) Read(p []byte) (int, error) {
	if h.calls++; h.calls%3 > 0 {
		return 0, nil
	}
	return h.r.Read(p[:min(len(p), 1000)])
}

// What a writer has flushed can be read while it has not gone on.
func TestDataComesBeforeWaiting(t *testing.T) {
	r, w := io.Pipe()
	texts := make(chan string, 1) // the writer may still be writing what ends a flush
	go func() {
		zw := gzip.NewWriter(w)
		for text := range texts {
			_, _ = zw.Write([]byte(text)) // an error is one of the reader, too
			_ = zw.Flush()
		}
		_ = zw.Close()
		_ = w.Close()
	}()
	z := NewReader(r)
	for i := range 200 {
		text := fmt.Sprintf("part %d of the conversation; ", i*i*i)
		texts <- text
		got := make([]byte, len(text))
		if _, err := io.ReadFull(z, got); err != nil || string(got) != text {
			t.Fatalf("got %q, %v; want %q", got, err, text)
		}
	}
	close(texts)
	if n, err := z.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatal(n, err)
	}
}

func TestHeaders(t *testing.T) {
	body := gzipped(t, []byte("body"), 6, 0)[10:]
	header := func(flags byte, rest ...string) []byte {
		h := []byte{0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 5, 6}
		for _, r := range rest {
			h = append(h, r...)
		}
		return append(h, body...)
	}
	// summed has a checksum after the header, in which the bits of flip are wrong.
	summed := func(flip uint16, flags byte, rest ...string) []byte {
		h := header(flags, rest...)
		h = h[:len(h)-len(body)]
		h = binary.LittleEndian.AppendUint16(h, uint16(crc32.ChecksumIEEE(h))^flip)
		return append(h, body...)
	}
	long := strings.Repeat("n", 511)
	for _, tt := range []struct {
		name   string
		stream []byte
		want   error
	}{
		{"plain", header(0), nil},
		{"text", header(1), nil},
		{"empty extra field", header(4, "\x00\x00"), nil},
		{"extra field", header(4, "\x02\x00ab"), nil},
		{"largest extra field", header(4, "\xff\xff", strings.Repeat("e", 65535)), nil},
		{"name", header(8, "name\x00"), nil},
		{"longest name", header(8, long, "\x00"), nil},
		{"longer name", header(8, long, "n\x00"), ErrCorrupt},
		{"comment", header(16, "comment\x00"), nil},
		{"longer comment", header(16, long, "n\x00"), ErrCorrupt},
		{"checksum", summed(0, 2), nil},
		{"wrong checksum", summed(1, 2), ErrCorrupt},
		{"everything", summed(0, 31, "\x02\x00ab", "name\x00", "comment\x00"), nil},
		{"everything, wrong checksum", summed(1<<15, 31, "\x02\x00ab", "name\x00", "comment\x00"), ErrCorrupt},
		{"a reserved flag", header(32), ErrCorrupt},
		{"another one", header(128), ErrCorrupt},
		{"magic", append([]byte{0x1f, 0x8c}, header(0)[2:]...), ErrCorrupt},
		{"method", append([]byte{0x1f, 0x8b, 7}, header(0)[3:]...), ErrCorrupt},
		{"nothing", nil, io.ErrUnexpectedEOF},
		{"header alone", header(0)[:10], io.ErrUnexpectedEOF},
		{"truncated name", header(8, "name")[:14], io.ErrUnexpectedEOF},
		{"truncated extra field", header(4, "\x09\x00")[:14], io.ErrUnexpectedEOF},
		{"zeros after the end", append(header(0), make([]byte, 512)...), ErrCorrupt},
		{"a zero after the end", append(header(0), 0), io.ErrUnexpectedEOF},
		{"other things after the end", append(header(0), "not a gzip header"...), ErrCorrupt},
		{"truncated name of a second member", append(header(0), header(8, "name")[:12]...), io.ErrUnexpectedEOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := io.ReadAll(NewReader(bytes.NewReader(tt.stream)))
			if !errors.Is(err, tt.want) || err == nil && string(got) != "body" {
				t.Errorf("got %q, %v; want %v", got, err, tt.want)
			}
			if _, refused := oracle(tt.stream); (refused != nil) != (err != nil) {
				t.Errorf("gzip says %v, and here it is %v", refused, err)
			}
		})
	}
}

// pack writes numbers as bits, lowest first: pairs of a number and its width.
func pack(pairs ...int) []byte {
	var out []byte
	var bits uint64
	var n int
	for i := 0; i < len(pairs); i += 2 {
		bits |= uint64(pairs[i]) << n
		for n += pairs[i+1]; n >= 8; n -= 8 {
			out = append(out, byte(bits))
			bits >>= 8
		}
	}
	if n > 0 {
		out = append(out, byte(bits))
	}
	return out
}

// Blocks that no compressor writes. They are refused before the end of the
// input, which is long enough for the fast loop and for the careful one.
func TestBadBlocks(t *testing.T) {
	const final, stored, fixed, dynamic = 1, 0, 1, 2
	for _, tt := range []struct {
		name   string
		blocks []byte
	}{
		{"unknown kind", pack(final, 1, 3, 2)},
		{"lengths of a stored block", []byte{final, 1, 0, 0xff, 0xff}},
		{"match at the beginning", pack(final, 1, fixed, 2, 0x40, 7, 0, 5)},
		{"match before the beginning", pack(final, 1, fixed, 2, 0x0c, 8, 0x40, 7, 0x10, 5)},
		{"length symbol 286", pack(final, 1, fixed, 2, 0x0c, 8, 0x63, 8, 0, 5)},
		{"distance symbol 30", pack(final, 1, fixed, 2, 0x0c, 8, 0x40, 7, 0x0f, 5)},
		{"287 lengths", pack(final, 1, dynamic, 2, 30, 5, 0, 5, 15, 4)},
		{"31 distances", pack(final, 1, dynamic, 2, 0, 5, 30, 5, 15, 4)},
		{"no code lengths", pack(final, 1, dynamic, 2, 0, 5, 0, 5, 0, 4, 0, 12, 0, 40)},
		{"too many code lengths of one bit", pack(final, 1, dynamic, 2, 0, 5, 0, 5, 0, 4, 1, 3, 1, 3, 1, 3, 0, 3)},
		{"too few code lengths", pack(final, 1, dynamic, 2, 0, 5, 0, 5, 0, 4, 0, 3, 2, 3, 2, 3, 0, 3)},
		{"repeats nothing", pack(final, 1, dynamic, 2, 0, 5, 0, 5, 0, 4, 1, 3, 1, 3, 0, 3, 0, 3, 0, 1)},
		{"repeats too much", pack(final, 1, dynamic, 2, 0, 5, 0, 5, 0, 4, 0, 3, 0, 3, 1, 3, 0, 3, 0, 1, 127, 7, 0, 1, 127, 7)},
	} {
		for _, after := range []int{0, 100} {
			stream := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, tt.blocks...)
			stream = append(stream, make([]byte, after+8)...)
			got, err := io.ReadAll(NewReader(bytes.NewReader(stream)))
			if !errors.Is(err, ErrCorrupt) || len(got) > 1 {
				t.Errorf("%s, and %d bytes: got %q, %v", tt.name, after, got, err)
			}
			if _, refused := oracle(stream); refused == nil {
				t.Errorf("%s, and %d bytes: gzip accepts it", tt.name, after)
			}
		}
	}
}

// A code of distances may be empty, or have one symbol of one bit.
func TestDegenerateDistances(t *testing.T) {
	// Code lengths: 0 and 18 have two bits, 1 and 2 as well. Codes: one of one
	// bit for 'a', 256 and 257 of two.
	head := func(distLength int) []int {
		return []int{
			1, 1, 2, 2, 1, 5, 0, 5, 14, 4,
			0, 3, 0, 3, 2, 3, 2, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 2, 3, 0, 3, 2, 3,
			3, 2, 97 - 11, 7, 2, 2, 3, 2, 127, 7, 3, 2, 20 - 11, 7, 1, 2, 1, 2, distLength, 2,
		}
	}
	// Codes of two bits in the order of symbols, 0 1 2 18, but the first bit is
	// lowest: 0, 2, 1, 3. So 'a' has length 1 above, 256 and 257 have 2.
	for _, tt := range []struct {
		name string
		bits []int
		want string
		err  error
	}{
		{"empty, not used", append(head(0), 0, 1, 0, 1, 1, 2), "aa", nil},
		{"empty, used", append(head(0), 0, 1, 3, 2, 0, 1, 1, 2), "a", ErrCorrupt},
		{"one, used", append(head(2), 0, 1, 3, 2, 0, 1, 1, 2), "aaaa", nil},
		{"one, and the other bit", append(head(2), 0, 1, 3, 2, 1, 1, 1, 2), "a", ErrCorrupt},
	} {
		stream := gzipped(t, []byte(tt.want), 0, 0)
		trailer := stream[len(stream)-8:]
		stream = append(append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, pack(tt.bits...)...), trailer...)
		content, refused := oracle(stream)
		got, err := io.ReadAll(NewReader(bytes.NewReader(stream)))
		if string(got) != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%s: got %q, %v; want %q, %v; gzip has %q, %v", tt.name, got, err, tt.want, tt.err, content, refused)
		}
		if (refused == nil) != (err == nil) {
			t.Errorf("%s: gzip has %q, %v", tt.name, content, refused)
		}
	}
}

func TestTruncated(t *testing.T) {
	z := NewReader(nil)
	first := gzipped(t, []byte(strings.Repeat("truncated text, ", 20)), 6, 0)
	for name, stream := range map[string][]byte{
		"one member":  first,
		"two members": append(bytes.Clone(first), gzipped(t, []byte("more"), 1, 0)...),
		"stored":      gzipped(t, []byte(strings.Repeat("text", 30)), 0, 0),
		"flushed":     gzipped(t, []byte(strings.Repeat("flushed text, ", 20)), 6, 70),
	} {
		whole, err := oracle(stream)
		if err != nil {
			t.Fatal(err)
		}
		for n := range stream {
			want := io.ErrUnexpectedEOF
			if name == "two members" && n == len(first) {
				want = nil
			}
			z.Reset(bytes.NewReader(stream[:n]))
			got, err := io.ReadAll(z)
			if !errors.Is(err, want) || !bytes.HasPrefix(whole, got) {
				t.Errorf("%s, %d bytes of %d: got %q, %v", name, n, len(stream), got, err)
			}
			if _, again := z.Read(make([]byte, 1)); want != nil && !errors.Is(again, want) {
				t.Errorf("%s, %d bytes of %d: then %v", name, n, len(stream), again)
			}
		}
	}
}

// Any bit of a stream matters, but those of a header that say nothing.
func TestFlippedBits(t *testing.T) {
	z := NewReader(nil)
	for _, level := range []int{0, 1, 6, gzip.HuffmanOnly} {
		content := []byte(strings.Repeat("flipped bits of a text that is short, ", 30))
		stream := gzipped(t, content, level, 400)
		for bit := range 8 * len(stream) {
			bad := bytes.Clone(stream)
			bad[bit/8] ^= 1 << (bit % 8)
			want, refused := oracle(bad)
			z.Reset(bytes.NewReader(bad))
			got, err := io.ReadAll(z)
			if (refused == nil) != (err == nil) || err == nil && !bytes.Equal(got, want) {
				t.Errorf("level %d, bit %d: got %d bytes, %v; gzip has %d, %v", level, bit, len(got), err, len(want), refused)
			}
			if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("level %d, bit %d: %v", level, bit, err)
			}
		}
	}
}

// The error of a source comes as it is, after what was decompressed before it.
func TestErrorsOfTheSource(t *testing.T) {
	broken := errors.New("broken")
	content := contents()["text"]
	stream := gzipped(t, content, 6, 0)
	for _, n := range []int{0, 5, 11, 1000, len(stream) / 2, len(stream) - 8, len(stream)} {
		z := NewReader(io.MultiReader(bytes.NewReader(stream[:n]), iotest.ErrReader(broken)))
		got, err := io.ReadAll(z)
		if err != broken || !bytes.HasPrefix(content, got) || n >= 1000 && len(got) < n { //nolint:errorlint // as it is
			t.Errorf("%d bytes: %d bytes, %v", n, len(got), err)
		}
	}
	z := NewReader(iotest.TimeoutReader(iotest.OneByteReader(bytes.NewReader(stream))))
	if _, err := io.ReadAll(z); !errors.Is(err, iotest.ErrTimeout) {
		t.Error(err)
	}
	if _, err := io.ReadAll(NewReader(silent{})); !errors.Is(err, io.ErrNoProgress) {
		t.Error(err)
	}
}

type silent struct{}

func (silent) Read([]byte) (int, error) { return 0, nil }

// The error of a writer ends WriteTo, and the rest can still be read.
func TestErrorsOfTheWriter(t *testing.T) {
	content := contents()["text"]
	z := NewReader(bytes.NewReader(gzipped(t, content, 6, 0)))
	var short bytes.Buffer
	n, err := z.WriteTo(&limited{w: &short, left: 1000})
	if n != 1000 || !errors.Is(err, io.ErrShortWrite) {
		t.Fatal(n, err)
	}
	rest, err := io.ReadAll(z)
	if err != nil || !bytes.Equal(append(short.Bytes(), rest...), content) {
		t.Error(len(rest), err)
	}
}

// limited takes no more than left bytes, and does not say so.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n, err := l.w.Write(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

func TestAllocatesOnce(t *testing.T) {
	stream := gzipped(t, contents()["text"], 6, 0)
	z := NewReader(nil)
	r := bytes.NewReader(stream)
	if n := testing.AllocsPerRun(5, func() {
		r.Reset(stream)
		z.Reset(r)
		if _, err := io.Copy(io.Discard, z); err != nil {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations a stream", n)
	}
}
