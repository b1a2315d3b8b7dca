// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/daemon"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/sharedstore"
)

// adding is what holdfast store add does.
type adding struct {
	*globals
	name      string
	from      string // another image store
	platforms []string
}

func newStoreAddCommand(g *globals) *cobra.Command {
	o := &adding{globals: g}
	cmd := storeCommand(&cobra.Command{
		Use:   "add PATH IMAGE...",
		Short: "Add images to a store",
		Long: `Add images to a store, under their full names. Layers are fetched and unpacked side
by side, verified, and recorded when they are complete and durable; signatures of
cosign go along. Runtimes that use the store see an image when all of it is there. An
interrupted command goes on where it was when it is run again.

Of an image for several platforms, name those that are wanted with --platform: the
first gets the name, the others are found by their digests.
` + imageHelp + exitCodes,
		Example: `  holdfast store add /mnt/images quay.io/models/llama:8b
  holdfast store add /mnt/images --from /mnt/other quay.io/models/llama:8b
  holdfast store add /mnt/images ./app.tar --name registry.example.com/team/app:v1
  holdfast store add /mnt/images quay.io/app:v1 --platform linux/amd64 --platform linux/arm64`,
		Args: cli.Args(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if o.name != "" && len(a) > 2 {
				return cli.Usage(errors.New("--name: want one image"))
			}
			added, err := o.run(cmd.Context(), a[0], a[1:])
			return errors.Join(g.print(cmd.OutOrStdout(), added, func() error { return printAdded(cmd.OutOrStdout(), added) }), err)
		},
	})
	cmd.Flags().StringVar(&o.from, "from", "", "the `path` of another image store that has the images")
	_ = cmd.MarkFlagDirname("from") // it exists
	cmd.Flags().StringVar(&o.name, "name", "", "the full `name` of an image that has none, in an OCI layout or an archive")
	cmd.Flags().StringArrayVar(&o.platforms, "platform", []string{image.Machine().String()}, "a `platform` of an image that has several, OS/ARCHITECTURE[/VARIANT] (repeatable)")
	return cmd
}

// run adds images until the first that fails.
func (o *adding) run(ctx context.Context, path string, names []string) ([]*sharedstore.Added, error) {
	all := []*sharedstore.Added{}
	s, err := sharedstore.Open(path)
	if err != nil {
		return all, err
	}
	if o.from != "" {
		return o.copy(ctx, s, names)
	}
	cfg, err := config.Load(o.config)
	if err != nil {
		return all, err
	}
	log, err := newLogger("warn")
	if err != nil {
		return all, err
	}
	client := registry.New(daemon.RegistryConfig(cfg, log))
	defer client.Close()
	for _, name := range names {
		for n, text := range slices.Compact(slices.Clone(o.platforms)) {
			platform, err := image.ParsePlatform(text)
			if err != nil {
				return all, cli.Usage(err)
			}
			added, err := o.add(ctx, s, image.Opener{Registry: client, Platform: platform}, name, n > 0)
			if err != nil {
				return all, err
			}
			all = append(all, added)
		}
	}
	return all, nil
}

// copy adds images of another store.
func (o *adding) copy(ctx context.Context, s *sharedstore.Store, names []string) ([]*sharedstore.Added, error) {
	all := []*sharedstore.Added{}
	from, err := sharedstore.Open(o.from)
	if err != nil {
		return all, err
	}
	bars := o.bars()
	defer bars.stop()
	for _, name := range names {
		img, err := from.Image(name)
		if err != nil {
			return all, err
		}
		added, err := s.Add(ctx, img, bars.show)
		if err != nil {
			return all, err
		}
		all = append(all, added)
	}
	return all, nil
}

// add adds an image for one platform: another one than the first by its digest alone.
func (o *adding) add(ctx context.Context, s *sharedstore.Store, opener image.Opener, name string, another bool) (_ *sharedstore.Added, err error) {
	opened, err := opener.Open(ctx, name)
	if errors.Is(err, image.ErrName) {
		return nil, cli.Usage(err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, opened.Close()) }()
	full, err := o.fullName(ctx, opened)
	if err != nil {
		return nil, err
	}
	if another {
		ref, err := reference.ParseNamed(full)
		if err != nil {
			return nil, cli.Usage(err)
		}
		byDigest, err := reference.WithDigest(reference.TrimNamed(ref), opened.Manifest.Digest)
		if err != nil {
			return nil, err
		}
		full = byDigest.String()
	}
	img, err := sharedstore.Load(ctx, opened, full)
	if err != nil {
		return nil, fmt.Errorf("reading image %s: %w", name, err)
	}
	bars := o.bars()
	defer bars.stop()
	return s.Add(ctx, img, bars.show)
}

// fullName is the name that an image gets.
func (o *adding) fullName(ctx context.Context, img *image.Opened) (string, error) {
	if o.name != "" {
		return o.name, nil
	}
	return img.FullName(ctx)
}

func printAdded(w io.Writer, all []*sharedstore.Added) error {
	if len(all) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "IMAGE\tID\tDIGEST\tLAYERS")
	for _, a := range all {
		layers := fmt.Sprintf("%d", a.Layers)
		if a.Made < a.Layers {
			layers += fmt.Sprintf(", %d of them were there", a.Layers-a.Made)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", a.Name, a.ID[:12], shortDigest(a.Digest), layers)
	}
	return t.Flush()
}
