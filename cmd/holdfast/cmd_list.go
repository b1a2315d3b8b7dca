// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
)

func newListCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List prepared images",
		Long:    "List the images that have been prepared.\n" + exitCodes,
		Example: "  holdfast list\n  holdfast list --json",
		Args:    cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			all, err := client.Images(cmd.Context())
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), all, func() error { return printImages(cmd.OutOrStdout(), all) })
		},
	}
}

func printImages(w io.Writer, all []control.ImageStatus) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "REFERENCE\tDIGEST\tSIZE\tLAYERS\tLOCAL\tIN USE")
	for _, i := range all {
		var local int64
		lazy, used := 0, "no"
		for _, l := range i.Layers {
			local += l.Local
			if l.Action != prepare.Left {
				lazy++
			}
			if l.InUse {
				used = "yes"
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d/%d\t%s\t%s\n", strings.Join(i.References, ","), i.Digest.Encoded()[:12],
			units.BytesSize(float64(i.Size)), lazy, len(i.Layers), units.BytesSize(float64(local)), used)
	}
	return t.Flush()
}
