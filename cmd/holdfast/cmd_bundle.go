// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/docker/go-units"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/bundle"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/image"
)

func newBundleCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Pack images and artifacts for sites without a network",
		Long: `A bundle is images and artifacts with all that belongs to them, in one directory or
one file: indexes, profiles, signatures. It is an OCI layout, which skopeo, podman and
others read, too. A node uses it as it is, as one of its sources, or it is imported
into an image store, an artifact store or another layout. The daemon need not run.
`,
		Example: `  holdfast bundle create -o /mnt/usb/models.tar quay.io/models/llama:8b
  holdfast bundle verify /mnt/usb/models.tar
  holdfast bundle import /mnt/usb/models.tar --image-store /mnt/images`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newBundleCreateCommand(g), newBundleListCommand(g), newBundleVerifyCommand(g), newBundleImportCommand(g))
	return cmd
}

// bundleAt is the bundle at a path.
func bundleAt(path string) (*ocidir.Layout, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if !bundle.Exists(path) {
		return nil, fmt.Errorf("there is no bundle at %s", path)
	}
	return ocidir.New(path), nil
}

func newBundleVerifyCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "verify BUNDLE",
		Short: "Compare everything in a bundle with its digests",
		Long: `Read all of a bundle, compare it with its digests, and say whether everything is there
that its images need. The exit code is 1 if anything is wrong.
` + exitCodes,
		Example: "  holdfast bundle verify /mnt/usb/models.tar",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			l, err := bundleAt(a[0])
			if err != nil {
				return err
			}
			bars := g.bars()
			r, err := bundle.Verify(cmd.Context(), l, bars.show)
			bars.stop()
			if err != nil {
				return err
			}
			err = g.print(cmd.OutOrStdout(), r, func() error { return printBundleReport(cmd.OutOrStdout(), r) })
			if err == nil && len(r.Problems) > 0 {
				err = fmt.Errorf("bundle %s: %d things are wrong", a[0], len(r.Problems))
			}
			return err
		},
	}
}

func printBundleReport(w io.Writer, r *bundle.Report) error {
	for _, p := range r.Problems {
		needed := ""
		if len(p.Images) > 0 {
			needed = ", needed by " + strings.Join(p.Images, ", ")
		}
		if _, err := fmt.Fprintf(w, "WRONG  %s%s: %s\n", p.What, needed, p.Wrong); err != nil {
			return err
		}
	}
	for _, n := range r.Notes {
		if _, err := fmt.Fprintf(w, "note   %s\n", n); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "%d names, %d blobs, %s compared: %d problems\n", len(r.Names), r.Blobs, units.BytesSize(float64(r.Bytes)), len(r.Problems))
	return err
}

func newBundleListCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "list BUNDLE",
		Aliases: []string{"ls"},
		Short:   "List what is in a bundle",
		Long:    "List the images and artifacts in a bundle.\n" + exitCodes,
		Example: "  holdfast bundle list /mnt/usb/models.tar",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			l, err := bundleAt(a[0])
			if err != nil {
				return err
			}
			all, err := bundle.List(cmd.Context(), l)
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), all, func() error { return printPacked(cmd.OutOrStdout(), all) })
		},
	}
}

func printPacked(w io.Writer, all []*bundle.Packed) error {
	if len(all) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tDIGEST\tSIZE\tPLATFORMS\tREFERRERS")
	for _, p := range all {
		platforms := "-"
		if p.Platforms > 0 {
			platforms = fmt.Sprint(p.Platforms)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\n", p.Name, shortDigest(p.Digest), units.BytesSize(float64(p.Bytes)), platforms, p.Referrers)
	}
	return t.Flush()
}

// packing is what flags say about packing.
type packing struct {
	platforms   []string
	all         bool
	noReferrers bool
}

func (o *packing) flags(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&o.platforms, "platform", []string{image.Machine().String()}, "a `platform` of an image that has several, OS/ARCHITECTURE[/VARIANT] (repeatable)")
	cmd.Flags().BoolVar(&o.all, "all-platforms", false, "all platforms of an image that has several")
	cmd.Flags().BoolVar(&o.noReferrers, "no-referrers", false, "leave out what refers to an image: indexes, profiles, signatures, attestations")
}

func (o *packing) options(bars *bars) (bundle.Options, error) {
	options := bundle.Options{NoReferrers: o.noReferrers, Progress: bars.show}
	for _, text := range o.platforms {
		p, err := image.ParsePlatform(text)
		if err != nil {
			return options, cli.Usage(err)
		}
		options.Platforms = append(options.Platforms, p)
	}
	if o.all {
		options.Platforms = nil
	}
	return options, nil
}

func newBundleImportCommand(g *globals) *cobra.Command {
	o := &packing{}
	to, imageStore, artifactStore := "", "", ""
	cmd := &cobra.Command{
		Use:   "import BUNDLE [NAME...] {--to DIRECTORY | --image-store PATH | --artifact-store PATH}",
		Short: "Copy what is in a bundle to where nodes use it",
		Long: `Copy images and artifacts of a bundle, or those of them that are named: to an OCI
layout, which is a source; to an image store, unpacked; to an artifact store of CRI-O.
Names that are there move. An import that was interrupted goes on when it is run again.

A bundle need not be imported to be used: name it in sources of the configuration.
` + exitCodes,
		Example: `  holdfast bundle import /mnt/usb/models.tar --to /var/lib/images
  holdfast bundle import /mnt/usb/models.tar quay.io/models/llama:8b --image-store /mnt/images
  holdfast bundle import /mnt/usb/models.tar quay.io/models/weights:v1 --artifact-store /mnt/models`,
		Args: cli.Args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			targets := 0
			for _, t := range []string{to, imageStore, artifactStore} {
				if t != "" {
					targets++
				}
			}
			if targets != 1 {
				return cli.Usage(errors.New("want one of --to, --image-store and --artifact-store"))
			}
			l, err := bundleAt(a[0])
			if err != nil {
				return err
			}
			names, err := bundle.Names(cmd.Context(), l, nilIfEmpty(a[1:]))
			if errors.Is(err, bundle.ErrNotThere) {
				return fmt.Errorf("%w: holdfast bundle list %s shows what there is", err, a[0])
			}
			if err != nil {
				return err
			}
			if imageStore != "" {
				return g.importImages(cmd, l, names, imageStore, o.platforms)
			}
			o.all = o.all || !cmd.Flags().Changed("platform")
			all, err := g.importBlobs(cmd.Context(), l, names, to, artifactStore, o)
			return errors.Join(g.print(cmd.OutOrStdout(), all, func() error { return printPacked(cmd.OutOrStdout(), all) }), err)
		},
	}
	o.flags(cmd)
	for flag, usage := range map[string]struct {
		value *string
		text  string
	}{
		"to": {&to, "the `directory` of an OCI layout"}, "image-store": {&imageStore, "the `path` of an image store (holdfast store create)"},
		"artifact-store": {&artifactStore, "the `path` of an artifact store, as in additional_artifact_stores of CRI-O"},
	} {
		cmd.Flags().StringVar(usage.value, flag, "", usage.text)
		_ = cmd.MarkFlagDirname(flag) // it exists
	}
	return cmd
}

func nilIfEmpty(a []string) []string {
	if len(a) == 0 {
		return nil
	}
	return a
}

// importBlobs copies what is in a bundle to a layout or an artifact store.
func (g *globals) importBlobs(ctx context.Context, l *ocidir.Layout, names []string, to, artifactStore string, o *packing) (all []*bundle.Packed, err error) {
	bars := g.bars()
	defer bars.stop()
	options, err := o.options(bars)
	if err != nil {
		return nil, err
	}
	if artifactStore != "" {
		return importArtifacts(ctx, l, names, artifactStore, options)
	}
	w, err := ocidir.Create(to)
	if err != nil {
		return nil, err
	}
	all, err = bundle.Import(ctx, l, names, w, options)
	return all, errors.Join(err, w.Close())
}

// importArtifacts copies artifacts of a bundle to an artifact store.
func importArtifacts(ctx context.Context, l *ocidir.Layout, names []string, path string, options bundle.Options) (all []*bundle.Packed, err error) {
	s, err := artifactstore.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	for _, n := range names {
		added, err := s.Add(ctx, bundle.Origin{Name: n, Asked: n, Reader: l, Sources: []blob.Source{l}}, image.Machine(), options)
		if errors.Is(err, artifactstore.ErrImage) {
			return all, fmt.Errorf("%w: import it into an image store (--image-store) or a source (--to)", err)
		}
		if err != nil {
			return all, err
		}
		all = append(all, &bundle.Packed{Name: added.Name, Digest: added.Digest, MediaType: v1.MediaTypeImageManifest, Bytes: added.Size})
	}
	return all, nil
}

// importImages adds images of a bundle to an image store.
func (g *globals) importImages(cmd *cobra.Command, l *ocidir.Layout, names []string, path string, platforms []string) error {
	images := make([]string, len(names))
	for i, n := range names {
		images[i] = "oci:" + l.Path() + ":" + n
	}
	o := &adding{globals: g, platforms: platforms}
	added, err := o.run(cmd.Context(), path, images)
	return errors.Join(g.print(cmd.OutOrStdout(), added, func() error { return printAdded(cmd.OutOrStdout(), added) }), err)
}
