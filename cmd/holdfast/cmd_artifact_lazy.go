// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/parts"
	"github.com/holdfast/holdfast/internal/chunklist"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/indexstore"
)

func newArtifactPrepareCommand(g *globals) *cobra.Command {
	wait := false
	cmd := &cobra.Command{
		Use:   "prepare ARTIFACT...",
		Short: "Offer artifacts that are in a registry before they are here",
		Long: `Offer artifacts that are only in a registry to the runtimes of this node: at once, and
fetched when they are read. Where there is a list of the digests of an artifact's
chunks (holdfast artifact index) any part can be read on its own; otherwise the first
reader waits until all of a file is here and has its digest.

The artifacts stay offered until they are forgotten (holdfast artifact forget).
` + exitCodes,
		Example: "  holdfast artifact prepare quay.io/models/llama:70b\n  holdfast artifact prepare --wait quay.io/models/llama:8b",
		Args:    cli.Args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			for _, n := range a {
				if _, err := artifacts.Parse(n); err != nil {
					return cli.Usage(err)
				}
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			for _, n := range a {
				if err := client.PrepareArtifact(cmd.Context(), control.ArtifactRequest{Reference: n, Wait: wait}); err != nil {
					return err
				}
			}
			return g.printComposed(cmd, client, a)
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until all of them is here")
	return cmd
}

func newArtifactForgetCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "forget ARTIFACT...",
		Short: "Offer artifacts no longer that were prepared",
		Long: `Offer artifacts no longer that holdfast artifact prepare has added. What containers
have mounted stays; the rest of their files goes after some minutes.
` + exitCodes,
		Example: "  holdfast artifact forget quay.io/models/llama:70b",
		Args:    cli.Args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			if err := client.RemoveArtifacts(cmd.Context(), a...); err != nil {
				return err
			}
			done := struct {
				Forgotten []string `json:"forgotten"`
			}{a}
			return g.print(cmd.OutOrStdout(), done, func() error {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "forgotten", strings.Join(a, " "))
				return err
			})
		},
	}
}

func newArtifactStatusCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status [ARTIFACT...]",
		Short: "Show what the node offers, and from which store",
		Long: `Show the artifacts that this node offers to its runtimes: which store answers for each
name, how much of it is here, and what is wrong with a store.
` + exitCodes,
		Example: "  holdfast artifact status\n  holdfast artifact status quay.io/models/llama:8b --json",
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			return g.printComposed(cmd, client, a)
		},
	}
}

// printComposed prints the composed store, or what of it is named.
func (g *globals) printComposed(cmd *cobra.Command, client *control.Client, names []string) error {
	all, err := client.Artifacts(cmd.Context())
	if err != nil {
		return err
	}
	if len(names) > 0 {
		var some []artifacts.Status
		for _, n := range names {
			ref, err := artifacts.Parse(n)
			if err != nil {
				return cli.Usage(err)
			}
			found := false
			for _, s := range all.Artifacts {
				if s.Name == ref.String() {
					some, found = append(some, s), true
				}
			}
			if !found {
				return fmt.Errorf("artifact %s is not offered on this node; holdfast artifact status shows what is", ref)
			}
		}
		all.Artifacts = some
	}
	return g.print(cmd.OutOrStdout(), all, func() error { return printComposed(cmd.OutOrStdout(), all, len(names) == 0) })
}

func printComposed(w io.Writer, all *artifacts.All, stores bool) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if stores {
		if len(all.Stores) > 0 {
			fmt.Fprintln(t, "\nSTORE\tARTIFACTS\tFILTERED\tSHADOWED\tNOTE")
		}
		for _, s := range all.Stores {
			note := s.Error
			if note == "" && len(s.Problems) > 0 {
				note = "left out: " + strings.Join(s.Problems, "; ")
			}
			fmt.Fprintln(t, strings.TrimRight(fmt.Sprintf("%s\t%d\t%d\t%d\t%s", s.Path, s.Artifacts, s.Filtered, s.Shadowed, note), "\t"))
		}
		for p, why := range all.Patterns {
			fmt.Fprintf(t, "\npattern %s\t%s\n", p, why)
		}
		fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(t, "ARTIFACT\tDIGEST\tSIZE\tLOCAL\tSTATE\tFROM\tNOTE")
	for _, s := range all.Artifacts {
		dgst := "-"
		if s.Digest != "" {
			dgst = shortDigest(s.Digest)
		}
		fmt.Fprintln(t, strings.TrimRight(fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", s.Name, dgst, units.BytesSize(float64(s.Size)),
			units.BytesSize(float64(s.Local)), s.State, dash(s.From), s.Error), "\t"))
	}
	return t.Flush()
}

// indexed is a file that a chunk list was made for.
type indexed struct {
	Digest digest.Digest `json:"digest"`
	File   string        `json:"file,omitempty"`
	Size   int64         `json:"size"`
	Chunks int           `json:"chunks"`
	Made   bool          `json:"made"` // by this command; otherwise it was there
}

func newArtifactIndexCommand(g *globals) *cobra.Command {
	o := &indexing{globals: g, writes: true, upstream: true}
	to := ""
	push, force := false, false
	cmd := &cobra.Command{
		Use:   "index ARTIFACT",
		Short: "Make lists by which any part of an artifact can be verified",
		Long: `Read each file of an artifact once, compare it with its digest, and make a list of the
digests of its chunks: with it any part can be read lazily, and verified, on its own.
Lists go to the node's own directory, and with --push to where nodes look for them:
beside the artifact in its registry, or to another place, as in the setting
index.publish. The artifact itself stays as it is.
` + strings.ReplaceAll(imageHelp, "IMAGE", "ARTIFACT") + exitCodes,
		Example: `  holdfast artifact index quay.io/models/llama:8b --push
  holdfast artifact index quay.io/models/llama:8b --push --to docker://quay.io/team/indexes`,
		Args: cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			o.name = a[0]
			if to != string(index.RegistryPlace) {
				push = true
			}
			where, err := place(to)
			if err != nil {
				return err
			}
			done, err := o.indexArtifact(cmd.Context(), force, push, where)
			if errors.Is(err, blob.ErrUnauthorized) {
				err = fmt.Errorf("%w: log in with an account that may push there (podman login), or publish to another place (--to)", err)
			}
			if done == nil {
				return err
			}
			w := cmd.OutOrStdout()
			return errors.Join(err, g.print(w, done, func() error {
				t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(t, "FILE\tDIGEST\tSIZE\tCHUNKS\tNOTE")
				for _, d := range done {
					note := ""
					if !d.Made {
						note = "was there"
					}
					fmt.Fprintln(t, strings.TrimRight(fmt.Sprintf("%s\t%s\t%s\t%d\t%s", dash(d.File), shortDigest(d.Digest), units.BytesSize(float64(d.Size)), d.Chunks, note), "\t"))
				}
				if push && err == nil {
					fmt.Fprintf(t, "published to %s\n", where)
				}
				return t.Flush()
			}))
		},
	}
	o.directory(cmd, "output", "the `directory` that the lists go to (default the node's own)")
	cmd.Flags().BoolVar(&push, "push", false, "publish them for other nodes")
	cmd.Flags().StringVar(&to, "to", string(index.RegistryPlace), "the `place` to publish to: registry, a directory, or docker://HOST/REPOSITORY")
	cmd.Flags().BoolVar(&force, "force", false, "also for files that have a list")
	o.flags(cmd)
	return cmd
}

// indexArtifact makes the lists, and publishes them.
func (o *indexing) indexArtifact(ctx context.Context, force, push bool, where index.Place) (all []indexed, err error) {
	platform, err := image.ParsePlatform(o.platform)
	if err != nil {
		return nil, cli.Usage(err)
	}
	finder, done, err := o.finder()
	if err != nil {
		return nil, err
	}
	defer done()
	found, err := image.Opener{Registry: finder.Registry, Platform: platform, NoMirrors: true}.Locate(ctx, o.name)
	if errors.Is(err, image.ErrName) {
		return nil, cli.Usage(err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, found.Close()) }()
	m, err := image.Manifest(ctx, found.Reader(), found.Asked, platform)
	if err != nil {
		return nil, err
	}
	artifact, err := artifactstore.Parse(m)
	if errors.Is(err, artifactstore.ErrImage) {
		return nil, fmt.Errorf("%s: %w; holdfast index build makes indexes for images", o.name, artifactstore.ErrImage)
	}
	if err != nil {
		return nil, err
	}
	reader, ok := found.Reader().(indexstore.Reader)
	if !ok {
		return nil, fmt.Errorf("%s cannot be indexed", o.name)
	}
	places := finder.Artifact(m, reader)
	var lists []*chunklist.List
	seen := map[digest.Digest]bool{}
	for _, l := range artifact.Layers {
		if seen[l.Digest] {
			continue
		}
		seen[l.Digest] = true
		list, made, err := o.chunks(ctx, finder, places, found.Sources(), blob.Descriptor{Digest: l.Digest, Size: l.Size}, force)
		if err != nil {
			return all, fmt.Errorf("file %s of %s: %w", dash(artifactstore.FileName(l)), o.name, err)
		}
		lists = append(lists, list)
		all = append(all, indexed{Digest: l.Digest, File: artifactstore.FileName(l), Size: l.Size, Chunks: len(list.Chunks), Made: made})
	}
	if !push {
		return all, nil
	}
	place, err := places.Open(where)
	if err != nil {
		return all, err
	}
	return all, places.PublishChunks(ctx, place, lists)
}

// chunks is the chunk list of a blob: one that was made here before, or a new one.
func (o *indexing) chunks(ctx context.Context, finder *indexes.Finder, places *indexes.Image, from []blob.Source, d blob.Descriptor, force bool) (*chunklist.List, bool, error) {
	if !force {
		if list, _, err := places.Chunks(ctx, d, index.Verified); err == nil {
			return list, false, nil
		}
	}
	bars := o.bars()
	defer bars.stop()
	var failed error
	for _, src := range from {
		list, err := listFrom(ctx, src, d, bars)
		if err == nil {
			return list, true, finder.KeepChunks(ctx, list)
		}
		failed = errors.Join(failed, fmt.Errorf("from %s: %w", src, err))
	}
	return nil, false, failed
}

func listFrom(ctx context.Context, src blob.Source, d blob.Descriptor, bars *bars) (*chunklist.List, error) {
	body, err := parts.Open(ctx, src, d)
	if err != nil {
		return nil, err
	}
	defer body.Close() //nolint:errcheck // read only; a broken stream shows in Read
	b := chunklist.NewBuilder()
	buf := make([]byte, 1<<20)
	for done := int64(0); done < d.Size; {
		n, err := io.ReadFull(body, buf[:min(int64(len(buf)), d.Size-done)])
		if err != nil {
			return nil, err
		}
		if _, err := b.Write(buf[:n]); err != nil {
			return nil, err
		}
		done += int64(n)
		bars.show(d.Digest, done, d.Size)
	}
	list, err := b.Finish()
	if err == nil && list.Blob != d.Digest {
		err = fmt.Errorf("it has digest %s: %w", list.Blob, blob.ErrCorrupt)
	}
	return list, err
}
