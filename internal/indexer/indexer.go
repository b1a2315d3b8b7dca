// SPDX-License-Identifier: Apache-2.0

// Package indexer is what people do with the indexes of an image, without the
// daemon: make them, publish them, see where there are some, and compare them with
// what the layers really are.
//
// It works on an [image.Opened] and on the places of an [indexes.Finder]. What goes
// to the node's own directory is trusted there: only what was compared with blob
// digest and diff ID does.
package indexer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/indexes"
)

// ErrNone means that no layer of an image has an index.
var ErrNone = errors.New("no layer has an index")

// Indexer works on the indexes of one image. Its methods are called one at a time.
type Indexer struct {
	Image  *image.Opened
	Finder *indexes.Finder
	// Progress, if it is not nil, is told how many bytes of a layer's blob have been
	// read. It is called by one goroutine at a time.
	Progress func(layer digest.Digest, done, total int64)

	telling sync.Mutex // held while Progress is called
}

// Layer is which layer a report is about.
type Layer struct {
	Digest digest.Digest `json:"layer"`
	Size   int64         `json:"size"` // of the blob, in bytes
}

// places are where the indexes of the image may be.
func (x *Indexer) places() *indexes.Image {
	if x.Image.Layout != nil {
		return x.Finder.Image(x.Image.Image, x.Image.Layout)
	}
	return x.Finder.Image(x.Image.Image, x.Image.Repositories[0])
}

// layers are the image's layers, each once.
func (x *Indexer) layers() []image.Layer {
	seen := map[digest.Digest]bool{}
	var all []image.Layer
	for _, l := range x.Image.Layers {
		if !seen[l.Digest] {
			seen[l.Digest] = true
			all = append(all, l)
		}
	}
	return all
}

// each does something for all layers, several at a time, and returns the results in
// the order of the layers, unless ctx ends.
func each[T any](ctx context.Context, layers []image.Layer, do func(context.Context, image.Layer) T) ([]T, error) {
	results := make([]T, len(layers))
	var g errgroup.Group
	g.SetLimit(min(max(runtime.GOMAXPROCS(0), 2), 4))
	for i, l := range layers {
		g.Go(func() error {
			if ctx.Err() == nil {
				results[i] = do(ctx, l)
			}
			return nil
		})
	}
	_ = g.Wait() // results have their errors
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return results, nil
}

// fromSources reads the blob of a layer from one source after the other, until read
// returns no error.
func fromSources[T any](ctx context.Context, x *Indexer, l image.Layer, read func(io.Reader) (T, error)) (T, error) {
	var failed error
	for _, src := range x.Image.Sources() {
		body, err := src.Open(ctx, l.Blob(), 0, l.Size)
		if err == nil {
			var got T
			got, err = read(&reporting{r: body, x: x, layer: l})
			_ = body.Close() // read only; a broken stream shows in read
			if err == nil {
				return got, nil
			}
		}
		failed = both(failed, fmt.Errorf("%s: %w", src, err))
		if ctx.Err() != nil {
			break
		}
	}
	var none T
	return none, failed
}

// both is errors.Join on one line.
func both(a, b error) error {
	if a == nil {
		return b
	}
	return fmt.Errorf("%w; %w", a, b)
}

// reporting reports what is read through it.
type reporting struct {
	r     io.Reader
	x     *Indexer
	layer image.Layer
	done  int64
}

func (r *reporting) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.done += int64(n); n > 0 && r.x.Progress != nil {
		r.x.telling.Lock()
		defer r.x.telling.Unlock()
		r.x.Progress(r.layer.Digest, r.done, r.layer.Size)
	}
	return n, err
}
