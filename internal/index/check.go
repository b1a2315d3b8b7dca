// SPDX-License-Identifier: Apache-2.0

package index

import "fmt"

// CheckContent compares where a table of spans says that content lies with an index
// of the same layer that was made from its very tar, by decompressing it from its
// start. A difference is [ErrInvalid].
func (t *Table) CheckContent(idx *Index) error {
	k, covered := 0, int64(0) // chunk of idx, and how much of it has been found
	for i := range t.Len() {
		c := t.At(i)
		number := t.SpanOf(c)
		if number < 0 {
			return fmt.Errorf("chunk %d lies in no span: %w", i, ErrInvalid)
		}
		plain := t.Span(number).Start + c.InnerOffset
		for c.Size > 0 {
			if k == len(idx.Chunks) {
				return fmt.Errorf("chunk %d at %d of the device, where the layer has nothing: %w", i, c.Offset, ErrInvalid)
			}
			want := idx.Chunks[k]
			at := want.InnerOffset
			if idx.Compression == None {
				at = want.BlobOffset
			}
			if c.Offset != want.Offset+covered || plain != at+covered {
				return fmt.Errorf("content of %d at %d of the device, where the layer has that of %d at %d: %w",
					plain, c.Offset, at+covered, want.Offset+covered, ErrInvalid)
			}
			n := min(c.Size, want.Size-covered)
			c.Offset, c.Size, plain = c.Offset+n, c.Size-n, plain+n
			if covered += n; covered == want.Size {
				k, covered = k+1, 0
			}
		}
	}
	if k < len(idx.Chunks) {
		return fmt.Errorf("nothing at %d of the device, where the layer has content: %w", idx.Chunks[k].Offset, ErrInvalid)
	}
	return nil
}
