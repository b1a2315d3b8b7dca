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

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/sharedstore"
)

func newStoreCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Make and keep image stores that runtimes use without the daemon",
		Long: `An image store holds images unpacked, in a directory that any number of nodes mount,
read-only if they like: on NFS, on an SSD. Podman and CRI-O take images from there by
its path alone, in additionalimagestores of storage.conf, without downloading or
copying anything. They look into their own main store first, then into the additional
ones in the order of the configuration. The daemon need not run for any of this.
`,
		Example: `  holdfast store create /mnt/images
  holdfast store add /mnt/images quay.io/models/llama:8b
  podman --storage-opt additionalimagestore=/mnt/images run quay.io/models/llama:8b`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newStoreCreateCommand(g), newStoreAddCommand(g), newStoreListCommand(g), newStoreVerifyCommand(g), newStoreRemoveCommand(g), newStorePruneCommand(g))
	return cmd
}

// storeCommand completes a command whose first argument is the path of a store.
func storeCommand(cmd *cobra.Command) *cobra.Command {
	cmd.ValidArgsFunction = func(_ *cobra.Command, a []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(a) == 0 {
			return nil, cobra.ShellCompDirectiveFilterDirs
		}
		return nil, cobra.ShellCompDirectiveDefault
	}
	return cmd
}

func newStoreCreateCommand(g *globals) *cobra.Command {
	forNFS := false
	cmd := storeCommand(&cobra.Command{
		Use:   "create PATH",
		Short: "Make an image store",
		Long: `Make an image store in a directory that is empty or not there. Everything that a
runtime opens is made, so that the store can be used where it cannot be written to.
It is tried what the file system keeps, and said what it does not. On NFS export it
with no_root_squash to the node that writes. A store that is there stays as it is.

If you make a store on the disk of a server that exports it by NFS, say --nfs: NFS does
not show what a disk keeps besides.
` + exitCodes,
		Example: "  holdfast store create /mnt/images",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			s, err := sharedstore.Create(cmd.Context(), a[0], forNFS)
			if err != nil {
				return err
			}
			made := struct {
				Store string `json:"store"`
				Keeps any    `json:"keeps"`
			}{s.Root(), s.Keeps()}
			return g.print(cmd.OutOrStdout(), made, func() error {
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "image store %s\nits file system keeps %s\nstorage.conf of the nodes: additionalimagestores = [%q]\n", s.Root(), s.Keeps(), s.Root())
				return err
			})
		},
	})
	cmd.Flags().BoolVar(&forNFS, "nfs", false, "make it for nodes that read it by NFS")
	return cmd
}

func newStoreListCommand(g *globals) *cobra.Command {
	return storeCommand(&cobra.Command{
		Use:     "list PATH",
		Aliases: []string{"ls"},
		Short:   "List the images in a store",
		Long:    "List the images in a store.\n" + exitCodes,
		Example: "  holdfast store list /mnt/images",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			s, err := sharedstore.Open(a[0])
			if err != nil {
				return err
			}
			all, err := s.List()
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), all, func() error { return printStore(cmd.OutOrStdout(), all) })
		},
	})
}

func printStore(w io.Writer, all []sharedstore.Summary) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "IMAGE\tID\tDIGEST\tPLATFORM\tSIZE\tLAYERS\tCREATED")
	for _, i := range all {
		created := "-"
		if !i.Created.IsZero() {
			created = units.HumanDuration(time.Since(i.Created)) + " ago"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\t%s\n", dash(strings.Join(i.Names, ", ")), i.ID[:min(12, len(i.ID))], shortDigest(i.Digest),
			dash(i.Platform), units.BytesSize(float64(i.Size)), i.Layers, created)
	}
	return t.Flush()
}

func newStoreRemoveCommand(g *globals) *cobra.Command {
	return storeCommand(&cobra.Command{
		Use:     "remove PATH IMAGE...",
		Aliases: []string{"rm"},
		Short:   "Take images out of a store",
		Long: `Take images out of a store, by name, id or digest. Of an image with several names
only the name goes. The layers stay, since containers may run from them on nodes that
this one knows nothing of: see holdfast store prune.
` + exitCodes,
		Example: "  holdfast store remove /mnt/images quay.io/models/llama:8b",
		Args:    cli.Args(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			s, err := sharedstore.Open(a[0])
			if err != nil {
				return err
			}
			if err := s.Remove(cmd.Context(), a[1:]...); errors.Is(err, sharedstore.ErrUnknown) {
				return fmt.Errorf("%w: holdfast store list %s shows what there is", err, s.Root())
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

func newStorePruneCommand(g *globals) *cobra.Command {
	const week = 7 * 24 * time.Hour
	o := sharedstore.PruneOptions{}
	cmd := storeCommand(&cobra.Command{
		Use:   "prune PATH",
		Short: "Remove layers that no image of a store needs",
		Long: `Remove layers that no image of the store has needed for the grace period, images that
have lost their last name for as long, and what interrupted commands have left.

What runtimes of this machine refer to stays. Other nodes cannot be seen: their
containers fail if they run from a layer that goes, and their image lists if an image
that they have pulled is built on one. So let the grace period be longer than images
are in use anywhere.
` + exitCodes,
		Example: "  holdfast store prune /mnt/images --dry-run\n  holdfast store prune /mnt/images --grace 720h",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if o.Grace < 0 {
				return cli.Usage(fmt.Errorf("--grace %s: want 0s or more", o.Grace))
			}
			s, err := sharedstore.Open(a[0])
			if err != nil {
				return err
			}
			if o.RuntimeRoots == nil {
				cfg, err := config.Load(g.config)
				if err != nil {
					return err
				}
				o.RuntimeRoots = cfg.RuntimeRoots
			}
			all, err := s.Prune(cmd.Context(), o)
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), all, func() error { return printPruned(cmd.OutOrStdout(), all, o.DryRun) })
		},
	})
	cmd.Flags().DurationVar(&o.Grace, "grace", week, "how long something has to be unneeded")
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "only say what would go")
	cmd.Flags().StringArrayVar(&o.RuntimeRoots, "runtime-root", nil, "a runtime's storage `directory` (repeatable); default: runtime_roots of the configuration")
	_ = cmd.MarkFlagDirname("runtime-root") // it exists
	return cmd
}

func printPruned(w io.Writer, all []sharedstore.Decision, dry bool) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KIND\tID\tACTION\tWHY")
	for _, d := range all {
		action := "kept"
		switch {
		case d.Remove && dry:
			action = "would go"
		case d.Remove:
			action = "removed"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", d.Kind, d.ID[:min(12, len(d.ID))], action, d.Reason)
	}
	return t.Flush()
}

func newStoreVerifyCommand(g *globals) *cobra.Command {
	return storeCommand(&cobra.Command{
		Use:   "verify PATH",
		Short: "Compare everything in a store with its digests",
		Long: `Read all of a store, and compare it with its digests: the layers, manifests and
configurations, the attributes of files, the records. It writes nothing, and says
exactly what is wrong and what to do. The exit code is 1 if anything is.
` + exitCodes,
		Example: "  holdfast store verify /mnt/images",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			s, err := sharedstore.Open(a[0])
			if err != nil {
				return err
			}
			bars := g.bars()
			r, err := s.Verify(cmd.Context(), bars.show)
			bars.stop()
			if err != nil {
				return err
			}
			err = g.print(cmd.OutOrStdout(), r, func() error { return printVerified(cmd.OutOrStdout(), r) })
			if err == nil && len(r.Problems) > 0 {
				err = fmt.Errorf("image store %s: %d things are wrong", s.Root(), len(r.Problems))
			}
			return err
		},
	})
}

func printVerified(w io.Writer, r *sharedstore.Report) error {
	for _, p := range r.Problems {
		if _, err := fmt.Fprintf(w, "WRONG  %s: %s\n       %s\n", p.What, p.Wrong, p.Remedy); err != nil {
			return err
		}
	}
	for _, n := range r.Notes {
		if _, err := fmt.Fprintf(w, "note   %s\n", n); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "%d images, %d layers, %s of content compared: %d problems\n", r.Images, r.Layers, units.BytesSize(float64(r.Bytes)), len(r.Problems))
	return err
}
