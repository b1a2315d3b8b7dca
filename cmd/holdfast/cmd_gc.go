// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
)

func newGCCommand(g *globals) *cobra.Command {
	var req control.CollectRequest
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove what no runtime refers to any more",
		Long: `Remove prepared images that no runtime has referred to for the grace period, and
records and layers that no prepared image has. Say for each what is done, and why.
The daemon does the same by itself. While a runtime's store cannot be read, all is kept.
` + exitCodes,
		Example: "  holdfast gc --dry-run\n  holdfast gc --grace 0s",
		Args:    cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if grace < 0 {
				return cli.Usage(fmt.Errorf("--grace %s: want 0s or more", grace))
			}
			if cmd.Flags().Changed("grace") {
				req.Grace = &grace
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			c, err := client.Collect(cmd.Context(), req)
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), c, func() error { return printCollection(cmd.OutOrStdout(), c) })
		},
	}
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "change nothing, only say what would be removed")
	cmd.Flags().DurationVar(&grace, "grace", 0, "remove what has been unused for so long (default gc_grace of the configuration)")
	return cmd
}

func printCollection(w io.Writer, c *prepare.Collection) error {
	removed, freed := "removed", "freed"
	if c.DryRun {
		removed, freed = "would be removed", "would free"
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, d := range c.Decisions {
		what := "kept"
		if d.Remove {
			what = removed
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", what, d.Kind, d.Name, d.Reason)
	}
	fmt.Fprintf(t, "%s %s\n", freed, units.BytesSize(float64(c.Freed)))
	return t.Flush()
}
