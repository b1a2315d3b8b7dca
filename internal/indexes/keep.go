// SPDX-License-Identifier: Apache-2.0

package indexes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/soci"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/indexstore"
)

// Keep keeps the index of a layer that was read whole and had its digests, and
// returns its size in bytes. The error is [soci.ErrNotExpressible] if the layer has
// no zTOC.
func (f *Finder) Keep(ctx context.Context, l image.Layer, res *stream.Result) (int64, error) {
	docs, done, err := f.documents(l, res)
	if err != nil {
		return 0, fmt.Errorf("keeping index of layer %s: %w", l.Digest, err)
	}
	defer done()
	if err := f.own.Publish(ctx, indexstore.Publication{Layers: []indexstore.LayerDocuments{docs}}); err != nil {
		return 0, fmt.Errorf("keeping index of layer %s: %w", l.Digest, err)
	}
	size := docs.ZTOC.Size() + docs.Digests.Size()
	if f.Limit == 0 {
		return size, nil
	}
	return size, f.own.Trim(f.Limit)
}

// documents writes what there is to keep about a layer to temporary files.
func (f *Finder) documents(l image.Layer, res *stream.Result) (docs indexstore.LayerDocuments, done func(), err error) {
	docs = indexstore.LayerDocuments{Layer: subject(l), SpanSize: soci.SpanSize, Extended: res.Index.Compression == index.Zstd}
	files := &files{finder: f}
	defer func() {
		if err != nil {
			files.close()
		}
	}()
	sum := digest.SHA256.Digester()
	docs.ZTOC, err = files.add(func(w io.Writer) error { return res.WriteZTOC(io.MultiWriter(w, sum.Hash()), f.Tool) })
	if err != nil {
		return docs, nil, err
	}
	digests := Digests{Blob: res.Blob, DiffID: res.DiffID, ZTOC: sum.Digest(), Files: res.Files}
	docs.Digests, err = files.add(digests.Encode)
	return docs, files.close, err
}

func subject(l image.Layer) indexstore.Subject {
	return indexstore.Subject{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size}
}

// files are temporary files with documents.
type files struct {
	finder *Finder
	all    []*os.File
}

// add returns a document that write writes.
func (s *files) add(write func(io.Writer) error) (indexstore.Content, error) {
	file, err := s.finder.Temp()
	if err != nil {
		return nil, err
	}
	s.all = append(s.all, file)
	if err := write(file); err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	return io.NewSectionReader(file, 0, info.Size()), nil
}

func (s *files) close() {
	for _, file := range s.all {
		_ = file.Close() // it has no name
	}
}

// Publication is what was made here about layers of the image, for [indexstore.Place].
// done releases it.
func (i *Image) Publication(ctx context.Context, layers []image.Layer) (p indexstore.Publication, done func(), err error) {
	p = indexstore.Publication{Image: i.subject, Created: time.Now().UTC().Truncate(time.Second)}
	files := &files{finder: i.f}
	defer func() {
		if done == nil {
			files.close()
		}
	}()
	for _, l := range layers {
		docs := indexstore.LayerDocuments{
			Layer: subject(l), SpanSize: soci.SpanSize,
			Extended: strings.HasSuffix(l.MediaType, "zstd"), // SOCI knows nothing of it
		}
		for kind, to := range map[indexstore.Kind]*indexstore.Content{indexstore.ZTOC: &docs.ZTOC, indexstore.Digests: &docs.Digests} {
			got, err := files.add(func(w io.Writer) error { return i.f.own.Fetch(ctx, l.Digest, kind, soci.MaxBytes, w) })
			if errors.Is(err, fs.ErrNotExist) {
				continue // not made here
			}
			if err != nil {
				return p, nil, fmt.Errorf("collecting indexes to publish: %w", err)
			}
			*to = got
		}
		if docs.ZTOC != nil {
			p.Layers = append(p.Layers, docs)
		}
	}
	return p, files.close, nil
}

// Publish publishes what this node has made for layers of the image to the places of
// the configuration. A place that refuses is named in the log, once.
func (i *Image) Publish(ctx context.Context, layers []image.Layer) {
	if !i.f.Publishes() {
		return
	}
	p, done, err := i.Publication(ctx, layers)
	if err != nil {
		i.f.Logger.Warn("publishing indexes", "image", i.subject.Digest.String(), "err", err)
		return
	}
	defer done()
	if len(p.Layers) == 0 {
		return
	}
	for _, name := range i.f.Config.Publish {
		place, err := i.Open(name)
		if err == nil {
			err = place.Publish(ctx, p)
		}
		if err != nil && ctx.Err() == nil {
			i.f.once("publishing", name, err)
			continue
		}
		i.f.Logger.Info("published indexes", "image", i.subject.Digest.String(), "layers", len(p.Layers), "to", place.String())
	}
}
