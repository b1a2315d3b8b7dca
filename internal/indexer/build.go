// SPDX-License-Identifier: Apache-2.0

package indexer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/soci"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/indexes"
)

// Outcome is what building the index of a layer came to.
type Outcome string

// The outcomes.
const (
	Built   Outcome = "built"
	There   Outcome = "there"   // it was there before
	Carried Outcome = "carried" // the layer's blob has one
	None    Outcome = "none"    // there is no index for such a layer
	Failed  Outcome = "failed"
)

// BuildResult is what became of a layer. What was not measured is 0.
type BuildResult struct {
	Layer
	Outcome      Outcome `json:"outcome"`
	Reason       string  `json:"reason,omitempty"`       // why it was not built
	Uncompressed int64   `json:"uncompressed,omitempty"` // bytes
	Spans        int     `json:"spans,omitempty"`        // places where reading can begin
	Index        int64   `json:"indexSize,omitempty"`    // bytes, of all documents
	Seconds      float64 `json:"seconds,omitempty"`
}

// Build reads each layer that has no index in the Finder's own directory, and keeps
// the index that this makes there. With force, those that have one as well.
//
// The error is that of layers that could not be read or are not what the image says,
// or [ErrNone]; there are results for all layers nevertheless, unless ctx ends.
func (x *Indexer) Build(ctx context.Context, force bool) ([]BuildResult, error) {
	results, err := each(ctx, x.layers(), func(ctx context.Context, l image.Layer) BuildResult {
		r, err := x.build(ctx, l, force)
		r.Layer = Layer{l.Digest, l.Size}
		if err != nil {
			r.Outcome, r.Reason = Failed, err.Error()
		}
		return r
	})
	if err != nil {
		return nil, err
	}
	return results, failure(results)
}

// failure is what the results come to.
func failure(results []BuildResult) error {
	var failed []string
	some := false
	for _, r := range results {
		some = some || r.Outcome != None && r.Outcome != Failed
		if r.Outcome == Failed {
			failed = append(failed, r.Digest.String())
		}
	}
	switch {
	case len(failed) > 0:
		return fmt.Errorf("no index was made of layer %s", strings.Join(failed, ", "))
	case !some:
		return ErrNone
	}
	return nil
}

func (x *Indexer) build(ctx context.Context, l image.Layer, force bool) (BuildResult, error) {
	if !force && index.Annotated(l.Annotations) {
		return BuildResult{Outcome: Carried, Reason: "its blob carries an index"}, nil
	}
	if !force {
		have, err := x.Finder.Fetch(ctx, indexes.Place{Place: x.Finder.Own(), Trust: index.Verified}, l)
		if err == nil {
			return BuildResult{Outcome: There, Reason: "there is one already", Spans: len(have.Index.Spans)}, have.Close()
		}
		// One that is not sound, or not this layer's, is replaced.
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, index.ErrInvalid) && !errors.Is(err, index.ErrTooLarge) {
			return BuildResult{}, err
		}
	}
	return fromSources(ctx, x, l, func(blob io.Reader) (BuildResult, error) { return x.read(ctx, l, blob) })
}

// read makes and keeps the index of the layer whose blob is read.
func (x *Indexer) read(ctx context.Context, l image.Layer, blob io.Reader) (_ BuildResult, err error) {
	start := time.Now()
	windows, err := x.Finder.Temp()
	if err != nil {
		return BuildResult{}, err
	}
	defer windows.Close() //nolint:errcheck // it has no name
	res, err := stream.Build(ctx, blob, l.Size, discard{}, windows)
	if err != nil {
		return BuildResult{}, err
	}
	if err := res.Check(l.Digest, l.DiffID); err != nil {
		return BuildResult{}, err
	}
	r := BuildResult{Outcome: Built, Uncompressed: res.Size, Spans: res.Spans()}
	r.Index, err = x.Finder.Keep(ctx, l, res)
	if errors.Is(err, soci.ErrNotExpressible) {
		r.Outcome, r.Reason, err = None, err.Error(), nil
	}
	r.Seconds = time.Since(start).Seconds()
	return r, err
}

// discard is a device that nobody wants.
type discard struct{}

func (discard) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
