// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"bytes"
	"fmt"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/inflate"
)

// pointCheck compares the spans of a chunk table with the places where the
// decompression of the blob can really begin. A span's digest says that its bytes
// are right; whether they become what the layer holds also depends on what the
// index says about where they begin, and about what precedes them.
type pointCheck struct {
	table *index.Table
	next  int   // span
	wrong error // the first one
}

// points returns what is told each place, nil if there is nothing to check.
func (c *pointCheck) points() func(inflate.Point, []byte) error {
	if c.table.Spans() == 0 || c.table.Compression() == index.None {
		return nil
	}
	return c.at
}

func (c *pointCheck) at(p inflate.Point, window []byte) error {
	if c.wrong != nil || c.next == c.table.Spans() {
		return nil //nolint:nilerr // finish returns it
	}
	s := c.table.Span(c.next)
	in := s.BlobOffset
	if s.Bits > 0 {
		in++
	}
	switch {
	case p.In < in || p.In == in && p.Bits > s.Bits:
		return nil
	case p.In != in || p.Bits != s.Bits || p.Out != s.Start:
		c.wrong = fmt.Errorf("span %d starts at %d, bit %d, with byte %d of the content: that is no place to start at", c.next, in, s.Bits, s.Start)
		return nil
	}
	want, err := c.table.Window(c.next, make([]byte, index.WindowSize))
	if err != nil {
		return err
	}
	if c.table.Compression() == index.Gzip && p.Out > 0 && !bytes.Equal(window, want) {
		c.wrong = fmt.Errorf("span %d has other bytes before it than the index says", c.next)
	}
	c.next++
	return nil
}

// finish compares the rest, with the index of the layer as it is.
func (c *pointCheck) finish(idx *index.Index) error {
	if c.table.Spans() == 0 || c.wrong != nil {
		return c.wrong
	}
	if c.points() != nil && c.next < c.table.Spans() {
		return fmt.Errorf("span %d starts after the last place to start at", c.next)
	}
	return c.table.CheckContent(idx)
}
