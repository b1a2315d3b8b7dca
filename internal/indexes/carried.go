// SPDX-License-Identifier: Apache-2.0

package indexes

import (
	"context"
	"errors"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/estargz"
	"github.com/holdfast/holdfast/internal/index/zstdchunked"
)

// Carried reads the index that a layer's blob carries, by the word of the manifest.
// It returns [index.ErrNoIndex] if there is none; other errors are those of the
// decoders.
func Carried(ctx context.Context, src blob.Source, l image.Layer) (*index.Index, error) {
	idx, err := estargz.Open(ctx, src, l.Blob(), l.Annotations)
	if errors.Is(err, index.ErrNoIndex) {
		idx, err = zstdchunked.Open(ctx, src, l.Blob(), l.Annotations)
	}
	return idx, err
}
