// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/testimage"
)

// built is what making the index of one layer has taken.
type built struct {
	Layer string        `json:"layer"` // file name
	Took  time.Duration `json:"took"`
	Plain int64         `json:"plain"` // bytes of the decompressed layer
	ZTOC  int64         `json:"ztoc"`  // bytes of the index
}

// measureBuild makes the index of each gzip layer, from a file in the page cache to
// the zTOC, with the content thrown away: blob digest, diff ID, the digests of spans
// and files are all computed.
func (b *bench) measureBuild(ctx context.Context) error {
	layers, err := b.large.Layers(ctx, testimage.Gzip)
	if err != nil {
		return err
	}
	for _, l := range layers {
		if _, err := gunzip(ctx, l.Path); err != nil { // fills the page cache
			return err
		}
		for range b.pairs {
			m, err := b.buildOnce(ctx, l)
			if err != nil {
				return err
			}
			b.log("index of %s: %.2f s, %.0f MB/s, %.2f %%", m.Layer, m.Took.Seconds(), float64(m.Plain)/1e6/m.Took.Seconds(), 100*float64(m.ZTOC)/float64(m.Plain))
			b.report.Build = append(b.report.Build, m)
		}
	}
	return nil
}

type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func (b *bench) buildOnce(ctx context.Context, l testimage.Layer) (m built, err error) {
	m.Layer = filepath.Base(l.Path)
	in, err := os.Open(l.Path)
	if err != nil {
		return m, fmt.Errorf("reading the sample: %w", err)
	}
	defer in.Close() //nolint:errcheck // read only
	var files [2]*os.File
	for i := range files {
		if files[i], err = os.CreateTemp(b.dir, "index-"); err != nil {
			return m, err
		}
		defer func() { err = joined(err, joined(files[i].Close(), os.Remove(files[i].Name()))) }()
	}
	start := time.Now()
	res, err := stream.Build(ctx, in, l.Descriptor.Size, nowhere{}, files[0])
	if err != nil {
		return m, err
	}
	if res.Blob != l.Descriptor.Digest || res.DiffID != l.DiffID {
		return m, fmt.Errorf("layer %s has digests %s and %s", m.Layer, res.Blob, res.DiffID)
	}
	if err := res.WriteZTOC(files[1], "bench"); err != nil {
		return m, err
	}
	m.Took, m.Plain = time.Since(start), res.Size
	info, err := files[1].Stat()
	if err == nil {
		m.ZTOC = info.Size()
	}
	return m, err
}

func (m built) rate() float64 { return float64(m.Plain) / 1e6 / m.Took.Seconds() }

// buildBar is the slowest layer's.
func (r *report) buildBar() bar {
	slowest := bar{What: "index build, uncompressed, the slowest layer", Unit: "MB/s", Want: 200}
	byLayer := map[string][]built{}
	for _, m := range r.Build {
		byLayer[m.Layer] = append(byLayer[m.Layer], m)
	}
	for name, all := range byLayer {
		if rate := median(all, built.rate).rate(); slowest.Detail == "" || rate < slowest.Measured {
			slowest.Measured, slowest.Detail = rate, name
		}
	}
	return slowest
}

// indexSizeBar is the layer's with the largest index.
func (r *report) indexSizeBar() bar {
	largest := bar{What: "index, of the uncompressed layer", Unit: "%", Want: 1.5}
	for _, m := range r.Build {
		if share := 100 * float64(m.ZTOC) / float64(m.Plain); share > largest.Measured {
			largest.Measured, largest.Detail = share, fmt.Sprintf("%s, %.1f MB", m.Layer, float64(m.ZTOC)/1e6)
		}
	}
	return largest
}
