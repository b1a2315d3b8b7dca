// SPDX-License-Identifier: Apache-2.0

package indexer

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/indexstore"
)

// candidate is a place that may have an index of a layer.
type candidate struct {
	from  string
	trust index.Trust
	open  func(context.Context) (*opened, error)
}

// opened is an index of a layer. It must be closed when it has been used.
type opened struct {
	*index.Index
	digests indexes.Digests // what came with it; zero if nothing did
	close   func() error
}

// candidates are the places that may have an index of a layer of the image, the best
// first.
func (x *Indexer) candidates(img *indexes.Image, l image.Layer) []candidate {
	var all []candidate
	for _, p := range img.Places() {
		all = append(all, x.at(p, l))
	}
	if index.Annotated(l.Annotations) {
		own := slices.IndexFunc(all, func(c candidate) bool { return c.trust < index.Verified })
		if own < 0 {
			own = len(all)
		}
		all = slices.Insert(all, own, candidate{"the layer itself", index.Bound, func(ctx context.Context) (*opened, error) { return x.carried(ctx, l) }})
	}
	return all
}

// at is a place as a candidate.
func (x *Indexer) at(p indexes.Place, l image.Layer) candidate {
	return candidate{p.String(), p.Trust, func(ctx context.Context) (*opened, error) {
		got, err := x.Finder.Fetch(ctx, p, l)
		if err != nil {
			return nil, err
		}
		return &opened{got.Index, got.Digests, got.Close}, nil
	}}
}

// carried reads the index that a layer's blob carries, from the first source that
// works.
func (x *Indexer) carried(ctx context.Context, l image.Layer) (*opened, error) {
	var failed error
	for _, src := range x.Image.Sources() {
		idx, err := indexes.Carried(ctx, src, l)
		if err == nil {
			return &opened{Index: idx, close: func() error { return nil }}, nil
		}
		failed = both(failed, err)
	}
	return nil, failed
}

// absent reports whether an error says no more than that there is no index.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, index.ErrNoIndex)
}

// Found is an index of a layer, or what keeps one from being of use.
type Found struct {
	From  string      `json:"from"`
	Trust index.Trust `json:"trust"`
	Kind  index.Kind  `json:"kind,omitempty"`
	Error string      `json:"error,omitempty"`
}

// ListResult is the indexes of a layer, the best first.
type ListResult struct {
	Layer
	Indexes []Found `json:"indexes"`
}

// List says for each layer where there are indexes, and what they are worth. It
// reads them, to see whether they are sound.
func (x *Indexer) List(ctx context.Context) ([]ListResult, error) {
	img := x.places()
	return each(ctx, x.layers(), func(ctx context.Context, l image.Layer) ListResult {
		r := ListResult{Layer: Layer{l.Digest, l.Size}, Indexes: []Found{}}
		for _, c := range x.candidates(img, l) {
			f := Found{From: c.from, Trust: c.trust}
			got, err := c.open(ctx)
			switch {
			case err == nil:
				f.Kind = got.Kind
				_ = got.close() // it was only read
			case absent(err):
				continue
			default:
				f.Error = err.Error()
			}
			r.Indexes = append(r.Indexes, f)
		}
		return r
	})
}

// Kept is what a directory has about a layer or an image.
type Kept struct {
	Subject digest.Digest     `json:"subject"`
	Kinds   []indexstore.Kind `json:"kinds"`
	Size    int64             `json:"size"` // of all documents, in bytes
	Used    time.Time         `json:"used"` // last
}

// Contents lists what a directory has, what was used last first.
func Contents(dir *indexstore.Dir) ([]Kept, error) {
	entries, err := dir.List()
	if err != nil {
		return nil, err
	}
	all := []Kept{}
	for _, e := range slices.Backward(entries) {
		i := slices.IndexFunc(all, func(k Kept) bool { return k.Subject == e.Subject })
		if i < 0 {
			i = len(all)
			all = append(all, Kept{Subject: e.Subject, Used: e.Used})
		}
		all[i].Kinds = append(all[i].Kinds, e.Kind)
		all[i].Size += e.Size
	}
	for _, k := range all {
		slices.Sort(k.Kinds)
	}
	return all, nil
}
