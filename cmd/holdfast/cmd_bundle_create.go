// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/bundle"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/indexer"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/indexstore"
	"github.com/holdfast/holdfast/internal/profile"
)

// bundling is what holdfast bundle create does.
type bundling struct {
	*globals
	packing
	output string
	name   string
	index  bool
	config config.Config
	finder *indexes.Finder
}

func newBundleCreateCommand(g *globals) *cobra.Command {
	o := &bundling{globals: g}
	cmd := &cobra.Command{
		Use:   "create -o FILE|DIRECTORY IMAGE...",
		Short: "Pack images and artifacts into a bundle",
		Long: `Pack images and artifacts, with what refers to them, and with the indexes and the
profile that this node has made. If the output ends with .tar it is one file, which gets
its name when it is complete; otherwise a directory, to which images are added if it is
there, and in which an interrupted command goes on where it was. Everything is verified
while it is written. Signatures that are not kept in the registry (lookaside) do not
travel along.

With --index, indexes are made of layers that have none, so that they can be mounted
lazily from the bundle.
` + imageHelp + exitCodes,
		Example: `  holdfast bundle create -o /mnt/usb/models.tar quay.io/models/llama:8b quay.io/app:v1
  holdfast bundle create -o ./bundle --index quay.io/app:v1
  holdfast bundle create -o app.tar --name registry.example.com/team/app:v1 oci:./app`,
		Args: cli.Args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if o.output == "" {
				return cli.Usage(errors.New("--output: want the file or the directory to write"))
			}
			if o.name != "" && len(a) > 1 {
				return cli.Usage(errors.New("--name: want one image"))
			}
			all, err := o.run(cmd.Context(), a)
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), all, func() error { return printPacked(cmd.OutOrStdout(), all) })
		},
	}
	o.packing.flags(cmd)
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "the `file` (ending with .tar) or the directory to write")
	cmd.Flags().StringVar(&o.name, "name", "", "the full `name` of an image that has none, in an OCI layout or an archive")
	cmd.Flags().BoolVar(&o.index, "index", false, "make indexes of layers that have none")
	return cmd
}

func (o *bundling) run(ctx context.Context, names []string) (all []*bundle.Packed, err error) {
	if o.config, err = config.Load(o.globals.config); err != nil {
		return nil, err
	}
	x := &indexing{globals: o.globals, dir: filepath.Join(o.config.Root, "indexes")}
	if o.index {
		if x.dir, err = os.MkdirTemp(tempDir(), "holdfast-bundle-"); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(x.dir)) }()
	}
	finder, done, err := x.finder()
	if err != nil {
		return nil, err
	}
	defer done()
	o.finder = finder
	sink, closeSink, err := o.sink()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeSink()) }()
	bars := o.bars()
	defer bars.stop()
	options, err := o.options(bars)
	if err != nil {
		return nil, err
	}
	p := bundle.New(sink, options)
	for _, name := range names {
		packed, err := o.pack(ctx, p, name)
		if err != nil {
			return nil, err
		}
		all = append(all, packed)
	}
	return all, p.Finish(ctx)
}

// sink is what is written to.
func (o *bundling) sink() (ocidir.Sink, func() error, error) {
	if filepath.Ext(o.output) == ".tar" {
		a, err := ocidir.CreateArchive(o.output)
		if err != nil {
			return nil, nil, err
		}
		return a, a.Close, nil
	}
	w, err := ocidir.Create(o.output)
	if err != nil {
		return nil, nil, err
	}
	return w, w.Close, nil
}

func (o *bundling) pack(ctx context.Context, p *bundle.Packer, name string) (_ *bundle.Packed, err error) {
	opener := image.Opener{Registry: o.finder.Registry, Platform: image.Machine()}
	found, err := opener.Locate(ctx, name)
	if errors.Is(err, image.ErrName) {
		return nil, cli.Usage(err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, found.Close()) }()
	full := o.name
	if full == "" {
		if full, err = found.FullName(ctx); err != nil {
			return nil, err
		}
	}
	reader, ok := found.Reader().(indexstore.Reader)
	if !ok {
		return nil, fmt.Errorf("%s cannot be packed", name)
	}
	packed, err := p.Pack(ctx, bundle.Origin{Name: full, Asked: found.Asked, Reader: reader, Sources: found.Sources()})
	if err != nil || o.noReferrers {
		return packed, err
	}
	opened, err := opener.Open(ctx, name)
	if err != nil {
		return packed, nil // an artifact, or none of this machine's platform
	}
	defer func() { err = errors.Join(err, opened.Close()) }()
	return packed, o.documents(ctx, p.Publisher(reader), opened)
}

// documents packs the indexes and the profile that were made on this node.
func (o *bundling) documents(ctx context.Context, to indexstore.Pusher, opened *image.Opened) error {
	x := &indexer.Indexer{Image: opened, Finder: o.finder}
	if o.index {
		if _, err := x.Build(ctx, false); err != nil && !errors.Is(err, indexer.ErrNone) {
			return err
		}
	}
	img := o.finder.Image(opened.Image)
	publication, done, err := img.Publication(ctx, opened.Layers)
	if err != nil {
		return err
	}
	defer done()
	if o.config.Profile != "off" {
		if publication.Profile, err = o.profile(opened); err != nil {
			return err
		}
	}
	if len(publication.Layers) == 0 && publication.Profile == nil {
		return nil
	}
	return indexstore.NewImage(to, publication.Image, "").Publish(ctx, publication)
}

// profile is the document about the image's workload; nil if there is none.
func (o *bundling) profile(opened *image.Opened) ([]byte, error) {
	dir := filepath.Join(o.config.Root, "profiles")
	if _, err := os.Stat(dir); err != nil {
		return nil, nil //nolint:nilerr // no node, or another user's
	}
	store, err := profile.OpenStore(dir)
	if errors.Is(err, fs.ErrPermission) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p, err := store.Load(opened.Manifest.Digest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return p.Encode()
}
