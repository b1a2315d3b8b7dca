// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/cli"
)

func newArtifactCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "artifact",
		Short: "Keep stores of models and other artifacts, and read artifacts lazily",
		Long: `Artifacts are files in a registry that are mounted as they are, such as the weights of
models (in Kubernetes: volumes of type image). CRI-O takes them from its artifact
stores without downloading them.

add, list, verify, remove and prune keep a store on a disk, a stick or a network file
system; the daemon need not run. The daemon makes one store of all that the
configuration names, and of artifacts that are only in a registry: status shows it,
prepare adds to it, index makes it possible to read a part of an artifact on its own.
`,
		Example: `  holdfast artifact add /mnt/models quay.io/models/llama:8b
  holdfast artifact add /mnt/models ./llama --as quay.io/models/llama:8b
  holdfast artifact prepare quay.io/models/llama:70b
  holdfast artifact status`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newArtifactAddCommand(g), newArtifactListCommand(g), newArtifactVerifyCommand(g), newArtifactRemoveCommand(g),
		newArtifactPruneCommand(g), newArtifactPrepareCommand(g), newArtifactForgetCommand(g), newArtifactIndexCommand(g), newArtifactStatusCommand(g))
	return cmd
}

func newArtifactListCommand(g *globals) *cobra.Command {
	return storeCommand(&cobra.Command{
		Use:     "list STORE",
		Aliases: []string{"ls"},
		Short:   "List the artifacts in a store",
		Long:    "List the artifacts in a store.\n" + exitCodes,
		Example: "  holdfast artifact list /mnt/models",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			all, err := artifactstore.List(cmd.Context(), artifactstore.Layout(a[0]))
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), all, func() error { return printArtifacts(cmd.OutOrStdout(), all) })
		},
	})
}

func printArtifacts(w io.Writer, all []artifactstore.Summary) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ARTIFACT\tDIGEST\tTYPE\tSIZE\tFILES\tNOTE")
	for _, a := range all {
		note := a.Error
		if a.Listed != "" {
			note = "listed as " + shortDigest(a.Listed)
		}
		fmt.Fprintln(t, strings.TrimRight(fmt.Sprintf("%s\t%s\t%s\t%s\t%d\t%s", dash(a.Name), shortDigest(a.Digest), dash(a.Type), units.BytesSize(float64(a.Size)), len(a.Files), note), "\t"))
	}
	return t.Flush()
}

func newArtifactVerifyCommand(g *globals) *cobra.Command {
	return storeCommand(&cobra.Command{
		Use:   "verify STORE",
		Short: "Compare everything in a store with its digests",
		Long: `Read all of an artifact store, compare it with its digests, and say whether runtimes
can read it. It writes nothing. The exit code is 1 if anything is wrong.
` + exitCodes,
		Example: "  holdfast artifact verify /mnt/models",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			bars := g.bars()
			r, err := artifactstore.Verify(cmd.Context(), a[0], bars.show)
			bars.stop()
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			err = g.print(w, r, func() error {
				for _, p := range r.Problems {
					if _, err := fmt.Fprintf(w, "WRONG  %s: %s\n       %s\n", p.What, p.Wrong, p.Remedy); err != nil {
						return err
					}
				}
				_, err := fmt.Fprintf(w, "%d artifacts, %d blobs, %s compared: %d problems\n", r.Artifacts, r.Blobs, units.BytesSize(float64(r.Bytes)), len(r.Problems))
				return err
			})
			if err == nil && len(r.Problems) > 0 {
				err = fmt.Errorf("artifact store %s: %d things are wrong", a[0], len(r.Problems))
			}
			return err
		},
	})
}

func newArtifactRemoveCommand(g *globals) *cobra.Command {
	return storeCommand(&cobra.Command{
		Use:     "remove STORE ARTIFACT...",
		Aliases: []string{"rm"},
		Short:   "Take artifacts out of a store",
		Long: `Take artifacts out of a store, by name or digest: all of them, or none. Their files
stay, since containers may read them: see holdfast artifact prune.
` + exitCodes,
		Example: "  holdfast artifact remove /mnt/models quay.io/models/llama:8b",
		Args:    cli.Args(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) (err error) {
			s, err := openArtifacts(a[0], false)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.Close()) }()
			if err := s.Remove(cmd.Context(), a[1:]...); errors.Is(err, artifactstore.ErrUnknown) {
				return fmt.Errorf("%w: holdfast artifact list %s shows what there is", err, a[0])
			} else if err != nil {
				return err
			}
			done := struct {
				Removed []string `json:"removed"`
			}{a[1:]}
			return g.print(cmd.OutOrStdout(), done, func() error {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "removed", strings.Join(a[1:], " "))
				return err
			})
		},
	})
}

// openArtifacts opens a store for writing. One that is not there is made only if that is
// what is wanted.
func openArtifacts(path string, create bool) (*artifactstore.Store, error) {
	if !create && !artifactstore.Exists(path) {
		return nil, fmt.Errorf("there is no artifact store at %s: holdfast artifact add makes one", path)
	}
	return artifactstore.Open(path)
}

func newArtifactPruneCommand(g *globals) *cobra.Command {
	const week = 7 * 24 * time.Hour
	grace, dry := week, false
	cmd := storeCommand(&cobra.Command{
		Use:   "prune STORE",
		Short: "Remove files that no artifact of a store needs",
		Long: `Remove the files that no artifact of the store has needed for the grace period: what
is left of artifacts that were removed, and of tags that have moved. Containers of this
machine keep what they have mounted; of those on other nodes nothing is known here, so
let the grace period be longer than they run.
` + exitCodes,
		Example: "  holdfast artifact prune /mnt/models --dry-run\n  holdfast artifact prune /mnt/models --grace 720h",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) (err error) {
			if grace < 0 {
				return cli.Usage(fmt.Errorf("--grace %s: want 0s or more", grace))
			}
			s, err := openArtifacts(a[0], false)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.Close()) }()
			all, err := s.Prune(cmd.Context(), grace, dry)
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			return g.print(w, all, func() error {
				t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(t, "FILE\tSIZE\tACTION\tWHY")
				for _, d := range all {
					action := "kept"
					switch {
					case d.Remove && dry:
						action = "would go"
					case d.Remove:
						action = "removed"
					}
					fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", shortDigest(d.Digest), units.BytesSize(float64(d.Size)), action, d.Reason)
				}
				return t.Flush()
			})
		},
	})
	cmd.Flags().DurationVar(&grace, "grace", week, "how long a file has to be unneeded")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would go")
	return cmd
}
