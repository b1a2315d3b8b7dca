// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"iter"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
)

// Batch is what is fetched at a time of one layer.
type Batch struct {
	Layer  digest.Digest
	Ranges []blob.Range // in the order in which they are wanted
}

// Batches cuts what is wanted into pieces of so many bytes, in order, and returns
// each layer's part of a piece.
func (p *Profile) Batches(size int64) iter.Seq[Batch] {
	return func(yield func(Batch) bool) {
		var piece []Batch
		room := size
		flush := func() bool {
			for _, b := range piece {
				if !yield(b) {
					return false
				}
			}
			piece, room = nil, size
			return true
		}
		for _, t := range p.Wanted() {
			for rest := t.Range; rest.Length > 0; {
				part := blob.Range{Offset: rest.Offset, Length: min(rest.Length, room)}
				piece = add(piece, p.Layers[t.Layer].Digest, part)
				rest.Offset, rest.Length, room = part.End(), rest.Length-part.Length, room-part.Length
				if room == 0 && !flush() {
					return
				}
			}
		}
		flush()
	}
}

// add puts a range to those of its layer.
func add(piece []Batch, layer digest.Digest, r blob.Range) []Batch {
	for i := range piece {
		if piece[i].Layer == layer {
			piece[i].Ranges = append(piece[i].Ranges, r)
			return piece
		}
	}
	return append(piece, Batch{layer, []blob.Range{r}})
}
