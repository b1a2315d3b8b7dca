// SPDX-License-Identifier: Apache-2.0

package indexes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/soci"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/indexstore"
)

// Keep keeps the index of a layer that was read whole and had its digests. Of a
// layer that has no zTOC nothing is kept; that is no error.
func (f *Finder) Keep(ctx context.Context, l Layer, res *stream.Result) error {
	docs, done, err := f.documents(l, res)
	if errors.Is(err, soci.ErrNotExpressible) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("keeping index of layer %s: %w", l.Digest, err)
	}
	defer done()
	if err := f.own.Publish(ctx, indexstore.Publication{Layers: []indexstore.LayerDocuments{docs}}); err != nil {
		return fmt.Errorf("keeping index of layer %s: %w", l.Digest, err)
	}
	return f.own.Trim(ownLimit)
}

// documents writes what there is to keep about a layer to temporary files.
func (f *Finder) documents(l Layer, res *stream.Result) (docs indexstore.LayerDocuments, done func(), err error) {
	docs = indexstore.LayerDocuments{
		Layer: indexstore.Subject{Digest: l.Digest, Size: l.Size}, SpanSize: soci.SpanSize,
		Extended: res.Index.Compression == index.Zstd,
	}
	var files []*os.File
	closeAll := func() {
		for _, file := range files {
			_ = file.Close() // it has no name
		}
	}
	defer func() {
		if err != nil {
			closeAll()
		}
	}()
	write := func(write func(io.Writer) error) (indexstore.Content, error) {
		file, err := f.Temp()
		if err != nil {
			return nil, err
		}
		files = append(files, file)
		if err := write(file); err != nil {
			return nil, err
		}
		return content(file)
	}
	if docs.ZTOC, err = write(func(w io.Writer) error { return res.WriteZTOC(w, f.Tool) }); err != nil {
		return docs, nil, err
	}
	digests := Digests{Blob: res.Blob, DiffID: res.DiffID, Files: res.Files}
	docs.Digests, err = write(digests.Encode)
	return docs, closeAll, err
}

func content(file *os.File) (indexstore.Content, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	return io.NewSectionReader(file, 0, info.Size()), nil
}

// Publish publishes what this node has made for layers of the image to the places of
// the configuration. A place that refuses is named in the log, once.
func (i *Image) Publish(ctx context.Context, layers []indexstore.Subject) {
	if !i.f.Publishes() {
		return
	}
	p := indexstore.Publication{Image: i.subject, Created: time.Now().UTC().Truncate(time.Second)}
	var files []*os.File
	defer func() {
		for _, file := range files {
			_ = file.Close() // it has no name
		}
	}()
	for _, l := range layers {
		docs := indexstore.LayerDocuments{Layer: l, SpanSize: soci.SpanSize}
		for kind, to := range map[indexstore.Kind]*indexstore.Content{indexstore.ZTOC: &docs.ZTOC, indexstore.Digests: &docs.Digests} {
			file, err := i.f.Temp()
			if err != nil {
				i.f.Logger.Warn("publishing indexes", "image", i.subject.Digest.String(), "err", err)
				return
			}
			files = append(files, file)
			if err := i.f.own.Fetch(ctx, l.Digest, kind, soci.MaxBytes, file); err != nil {
				continue // not made here
			}
			*to, _ = content(file)
		}
		if docs.ZTOC != nil {
			docs.Extended = strings.HasSuffix(l.MediaType, "zstd") // SOCI knows nothing of it
			p.Layers = append(p.Layers, docs)
		}
	}
	if len(p.Layers) == 0 {
		return
	}
	for _, name := range i.f.Config.Publish {
		place := i.place(name)
		if place == nil {
			continue
		}
		if err := place.Publish(ctx, p); err != nil && ctx.Err() == nil {
			i.f.once("indexes cannot be published", place.String(), err)
			continue
		}
		i.f.Logger.Info("published indexes", "image", i.subject.Digest.String(), "layers", len(p.Layers), "to", place.String())
	}
}
