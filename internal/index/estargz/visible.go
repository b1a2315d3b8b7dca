// SPDX-License-Identifier: Apache-2.0

package estargz

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"

	"github.com/klauspost/compress/gzip"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/toc"
)

// tocChunkSize is how the TOC's own content is cut; each piece has its digest from
// the same pass that checks the whole.
const tocChunkSize = 4 << 20

// tocContent hashes the TOC, whole and in pieces.
type tocContent struct {
	inner, blobOffset, blobEnd int64
	size                       int64
	whole, piece               hash.Hash
	pieces                     [][sha256.Size]byte
}

func newTOCContent(inner, blobOffset, blobEnd int64) *tocContent {
	return &tocContent{inner: inner, blobOffset: blobOffset, blobEnd: blobEnd, whole: sha256.New(), piece: sha256.New()}
}

// Write never fails.
func (t *tocContent) Write(p []byte) (int, error) {
	t.whole.Write(p)
	for rest := p; len(rest) > 0; {
		n := min(int64(len(rest)), tocChunkSize-t.size%tocChunkSize)
		t.piece.Write(rest[:n])
		rest = rest[n:]
		if t.size += n; t.size%tocChunkSize == 0 {
			t.endPiece()
		}
	}
	return len(p), nil
}

func (t *tocContent) endPiece() {
	t.pieces = append(t.pieces, [sha256.Size]byte(t.piece.Sum(nil)))
	t.piece.Reset()
}

func (t *tocContent) sum() [sha256.Size]byte { return [sha256.Size]byte(t.whole.Sum(nil)) }

// chunks returns the chunks of the TOC as a file. Nothing may be written later.
func (t *tocContent) chunks() []index.Chunk {
	if t.size%tocChunkSize != 0 {
		t.endPiece()
	}
	chunks := make([]index.Chunk, len(t.pieces))
	for i, sum := range t.pieces {
		at := int64(i) * tocChunkSize
		chunks[i] = index.Chunk{
			Offset: at, Size: min(tocChunkSize, t.size-at), InnerOffset: t.inner + at,
			BlobOffset: t.blobOffset, BlobSize: t.blobEnd - t.blobOffset, Digest: sum,
		}
	}
	return chunks
}

// tocHidden tells whether the tar ends before the TOC, so that extraction does not
// see it. estargz.Build drops the end marker of the tar that it converts, and
// leaves a landmark file; other users of the library (BuildKit) keep the tar as it
// was, with the marker: two blocks of zeros.
func (l *layer) tocHidden(ctx context.Context, facts toc.Facts) (bool, error) {
	if facts.HasLandmark {
		return false, nil
	}
	if l.tocOffset <= facts.Last.Offset {
		return false, nil
	}
	r, err := l.open(ctx, facts.Last.Offset, l.tocOffset)
	if err != nil {
		return false, err
	}
	defer r.Close() //nolint:errcheck // read only
	src := &stickyReader{r: r}
	gz, err := gzip.NewReader(src)
	if err != nil {
		return false, (&member{src: src}).explain(err)
	}
	const block, marker = 512, 2 * 512
	padded := facts.Last.End + (block-facts.Last.FileSize%block)%block
	if _, err := io.CopyN(io.Discard, gz, padded); err != nil && !errors.Is(err, io.EOF) {
		return false, (&member{src: src}).explain(err)
	}
	var zeros trailingZeros
	if _, err := io.Copy(&zeros, gz); err != nil {
		return false, (&member{src: src}).explain(err)
	}
	return zeros >= marker, nil
}

// trailingZeros counts the zero bytes at the end of what is written to it.
type trailingZeros int64

func (t *trailingZeros) Write(p []byte) (int, error) {
	i := len(p)
	for i > 0 && p[i-1] == 0 {
		i--
	}
	if i > 0 {
		*t = 0
	}
	*t += trailingZeros(len(p) - i)
	return len(p), nil
}
