// SPDX-License-Identifier: Apache-2.0

package index

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"sort"
)

// writeSpans writes the records of spans.
func writeSpans(w io.Writer, idx *Index) error {
	window := make([]byte, WindowSize)
	windows := uint32(0)
	for i, s := range idx.Spans {
		var rec [spanSize]byte
		for k, v := range []int64{s.BlobOffset, s.BlobSize, s.Start} {
			binary.LittleEndian.PutUint64(rec[8*k:], uint64(v))
		}
		copy(rec[24:], s.Digest[:])
		rec[56] = s.Bits
		if s.Window >= 0 {
			if err := readWindow(idx, s, window); err != nil {
				return fmt.Errorf("window of span %d: %w", i, err)
			}
			windows++
			binary.LittleEndian.PutUint32(rec[60:], windows)
			binary.LittleEndian.PutUint32(rec[64:], crc32.Checksum(window, castagnoli))
		}
		if _, err := w.Write(rec[:]); err != nil {
			return err
		}
	}
	return nil
}

// writeWindows writes the windows of spans.
func writeWindows(w io.Writer, idx *Index) error {
	window := make([]byte, WindowSize)
	for i, s := range idx.Spans {
		if s.Window < 0 {
			continue
		}
		if err := readWindow(idx, s, window); err != nil {
			return fmt.Errorf("window of span %d: %w", i, err)
		}
		if _, err := w.Write(window); err != nil {
			return err
		}
	}
	return nil
}

func readWindow(idx *Index, s Span, window []byte) error {
	_, err := io.ReadFull(io.NewSectionReader(idx.Windows, s.Window, WindowSize), window)
	return err
}

// Spans is the number of spans: 0 if each chunk has a digest of its own.
func (t *Table) Spans() int { return t.spans }

// spansAt is where the records of spans start in the file.
func (t *Table) spansAt() int { return headerSize + t.n*recordSize }

// Span returns span i, 0 <= i < Spans(). Its Window means nothing but whether it
// has one: see [Table.Window].
func (t *Table) Span(i int) Span {
	rec := t.mapped[t.spansAt()+i*spanSize:][:spanSize]
	field := func(k int) int64 { return int64(binary.LittleEndian.Uint64(rec[8*k:])) }
	s := Span{BlobOffset: field(0), BlobSize: field(1), Start: field(2), Bits: rec[56], Window: int64(binary.LittleEndian.Uint32(rec[60:])) - 1}
	copy(s.Digest[:], rec[24:])
	return s
}

// SpanOf returns the span that a chunk lies in, -1 if it is in none.
func (t *Table) SpanOf(c Chunk) int {
	i := sort.Search(t.spans, func(i int) bool { return t.Span(i).BlobOffset >= c.BlobOffset })
	if i == t.spans || t.Span(i).BlobOffset != c.BlobOffset {
		return -1
	}
	return i
}

// windowsAt is where the windows start in the file.
func (t *Table) windowsAt() int64 { return int64(t.spansAt()) + int64(t.spans)*spanSize }

// Window reads the bytes that span i refers to into buf, which has WindowSize bytes.
// It returns nil if the span needs none.
func (t *Table) Window(i int, buf []byte) ([]byte, error) {
	rec := t.mapped[t.spansAt()+i*spanSize:][:spanSize]
	number := int64(binary.LittleEndian.Uint32(rec[60:]))
	if number == 0 {
		return nil, nil
	}
	if t.file == nil {
		return nil, fmt.Errorf("chunk table has no window for span %d: %w", i, ErrInvalid)
	}
	window := buf[:WindowSize]
	if _, err := io.ReadFull(io.NewSectionReader(t.file, t.windowsAt()+(number-1)*WindowSize, WindowSize), window); err != nil {
		return nil, fmt.Errorf("reading window of span %d: %w", i, err)
	}
	if crc32.Checksum(window, castagnoli) != binary.LittleEndian.Uint32(rec[64:]) {
		return nil, fmt.Errorf("chunk table has a damaged window for span %d: %w", i, ErrInvalid)
	}
	return window, nil
}
