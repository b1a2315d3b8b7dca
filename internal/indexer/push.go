// SPDX-License-Identifier: Apache-2.0

package indexer

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/indexstore"
)

// PushOutcome is what became of the index of a layer.
type PushOutcome string

// The outcomes of a push.
const (
	Published PushOutcome = "published"
	Missing   PushOutcome = "missing" // none has been made
	Unneeded  PushOutcome = "carried" // the layer's blob has one
	Unusable  PushOutcome = "unusable"
)

// PushResult is what became of the index of a layer.
type PushResult struct {
	Layer
	Outcome PushOutcome `json:"outcome"`
	Reason  string      `json:"reason,omitempty"`
}

// Pushed is what was published.
type Pushed struct {
	Place string `json:"place"`
	// Digest is that of the index that refers to the image; "" where there is none.
	Digest digest.Digest `json:"digest,omitempty"`
	Layers []PushResult  `json:"layers"`
}

// Push publishes what the Finder's own directory has for layers of the image. Layers
// that it has nothing for are left out; if it has nothing at all the error is
// [ErrNone]. Other errors are those of [indexstore.Place.Publish].
func (x *Indexer) Push(ctx context.Context, to index.Place) (*Pushed, error) {
	if len(x.Image.Repositories) == 0 && to == index.RegistryPlace {
		return nil, fmt.Errorf("%s is not in a registry: name the image there, or another place to publish to", x.Image.Name)
	}
	img := x.places()
	place, err := img.Open(to)
	if err != nil {
		return nil, err
	}
	pushed := &Pushed{Place: place.String(), Layers: []PushResult{}}
	var layers []image.Layer
	for _, l := range x.layers() {
		r := PushResult{Layer: Layer{l.Digest, l.Size}, Outcome: Published}
		switch err := x.sound(ctx, l); {
		case err == nil:
			layers = append(layers, l)
		case !absent(err):
			r.Outcome, r.Reason = Unusable, err.Error()
		case index.Annotated(l.Annotations):
			r.Outcome = Unneeded
		default:
			r.Outcome = Missing
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		pushed.Layers = append(pushed.Layers, r)
	}
	if len(layers) == 0 {
		return pushed, ErrNone
	}
	p, done, err := img.Publication(ctx, layers)
	if err != nil {
		return nil, err
	}
	defer done()
	if attached, ok := place.(*indexstore.Image); ok {
		pushed.Digest, err = attached.PublishIndex(ctx, p)
	} else {
		err = place.Publish(ctx, p)
	}
	if err != nil {
		return nil, fmt.Errorf("publishing to %s: %w", place, err)
	}
	return pushed, nil
}

// sound returns nil if the own directory has a sound index of the layer.
func (x *Indexer) sound(ctx context.Context, l image.Layer) error {
	idx, err := x.Finder.Fetch(ctx, indexes.Place{Place: x.Finder.Own(), Trust: index.Found}, l)
	if err != nil {
		return err
	}
	return idx.Close()
}
