// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/daemon"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexer"
	"github.com/holdfast/holdfast/internal/indexes"
)

// imageHelp says in help texts what IMAGE is.
const imageHelp = `
IMAGE is a reference such as quay.io/app:v1 or docker://quay.io/app:v1, an OCI layout
(oci:DIRECTORY[:TAG], or just its directory), or an archive of one
(oci-archive:FILE[:TAG], or just the file). The daemon need not run.
`

func newIndexCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "index",
		Short: "Make, publish and check indexes for images that carry none",
		Example: `  holdfast index build quay.io/app:v1
  holdfast index push quay.io/app:v1`,
		Args: cli.Args(cobra.NoArgs), // or an unknown command would print the help and succeed
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newIndexBuildCommand(g), newIndexPushCommand(g), newIndexListCommand(g), newIndexVerifyCommand(g))
	return cmd
}

// indexing is what the commands about the indexes of an image have in common.
type indexing struct {
	*globals
	name     string // of the image
	platform string
	dir      string // instead of the node's own directory; "" is that one
	writes   bool   // to that directory
	upstream bool   // the image is read from its registry, not from a mirror
}

// flags adds the flags that all commands about an image have.
func (o *indexing) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.platform, "platform", image.Machine().String(), "the `platform` of an image that has several, OS/ARCHITECTURE[/VARIANT]")
}

// directory adds a flag for what stands in for the node's own directory.
func (o *indexing) directory(cmd *cobra.Command, name, usage string) {
	cmd.Flags().StringVar(&o.dir, name, "", usage)
	_ = cmd.MarkFlagDirname(name) // it exists
}

// run opens the image and calls do.
func (o *indexing) run(ctx context.Context, do func(*indexer.Indexer) error) (err error) {
	platform, err := image.ParsePlatform(o.platform)
	if err != nil {
		return cli.Usage(err)
	}
	finder, done, err := o.finder()
	if err != nil {
		return err
	}
	defer done()
	img, err := image.Opener{Registry: finder.Registry, Platform: platform, NoMirrors: o.upstream}.Open(ctx, o.name)
	if errors.Is(err, image.ErrName) {
		return cli.Usage(err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	return do(&indexer.Indexer{Image: img, Finder: finder})
}

// finder returns what the daemon would find indexes with, and has done called when
// it is not needed any more.
func (o *indexing) finder() (*indexes.Finder, func(), error) {
	cfg, err := config.Load(o.config)
	if err != nil {
		return nil, nil, err
	}
	log, err := newLogger("warn")
	if err != nil {
		return nil, nil, err
	}
	client := registry.New(daemon.RegistryConfig(cfg, log))
	c := daemon.IndexConfig(cfg, client, log)
	if o.dir != "" {
		c.Own, c.Limit = o.dir, 0
	}
	if o.dir != "" || !o.writes { // it may be read-only, or shared
		c.Temp = tempDir()
	}
	finder, err := indexes.New(c)
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w: the node's own indexes are root's; with --output they go elsewhere", err)
	}
	if err != nil {
		client.Close()
		return nil, nil, err
	}
	return finder, client.Close, nil
}

// place reads the name of a place for indexes as people type it: a directory may be
// relative.
func place(name string) (index.Place, error) {
	p := index.Place(name)
	if p == index.RegistryPlace || strings.HasPrefix(name, index.RepositoryPlace) {
		if err := config.ValidatePlace(p); err != nil {
			return "", cli.Usage(err)
		}
		return p, nil
	}
	if name == "" {
		return "", cli.Usage(errors.New("no place is named"))
	}
	dir, err := filepath.Abs(name)
	return index.Place(dir), err
}

// tempDir is for temporary files that may be large.
func tempDir() string {
	if dir := os.Getenv("TMPDIR"); dir != "" {
		return dir
	}
	return "/var/tmp"
}

// indexReport is what the commands about an image print.
type indexReport[T any] struct {
	Image    string        `json:"image"`
	Manifest digest.Digest `json:"manifest"`
	Layers   []T           `json:"layers"`
}

// report prints what is known of layers, as JSON or a row each, unless there is
// nothing.
func report[T any](g *globals, w io.Writer, img *image.Opened, layers []T, head string, row func(T) string) error {
	if layers == nil {
		return nil
	}
	return g.print(w, indexReport[T]{img.Name, img.Manifest.Digest, layers}, func() error {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, head)
		for _, l := range layers {
			fmt.Fprintln(t, row(l))
		}
		return t.Flush()
	})
}
