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

func newPrepareCommand(g *globals) *cobra.Command {
	var offline bool
	cmd := &cobra.Command{
		Use:   "prepare REFERENCE",
		Short: "Make an image's layers available before they are downloaded",
		Long: `Make an image's layers available to the runtimes of this machine, and say for
each whether it is lazy (its content comes when it is read), fetched, or left to
the runtime, and why. Credentials are those of podman login.

The image is looked for in the sources of the configuration, in their order. With
--offline only attached OCI layouts are, and what they do not have is named.
` + exitCodes,
		Example: `  holdfast prepare quay.io/models/llama:8b
  podman run quay.io/models/llama:8b
  holdfast prepare --offline quay.io/models/llama:8b   # from a stick, say`,
		Args: cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			bars := g.bars()
			res, err := client.Prepare(cmd.Context(), control.PrepareRequest{Reference: a[0], Offline: offline}, func(e prepare.Event) {
				bars.show(e.Layer, e.Done, e.Total)
			})
			bars.stop()
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), res, func() error { return printResult(cmd.OutOrStdout(), res) })
		},
	}
	cmd.Flags().BoolVar(&offline, "offline", false, "ask no registry: only OCI layouts among the sources")
	return cmd
}

func printResult(w io.Writer, res *prepare.Result) error {
	if _, err := fmt.Fprintf(w, "%s\n%d of %d layers need no pull, after %s\n",
		res.Reference, res.Lazy(), len(res.Layers), res.Duration.Round(time.Millisecond)); err != nil {
		return fmt.Errorf("printing result: %w", err)
	}
	if res.Reason != "" && len(res.Layers) == 0 {
		_, err := fmt.Fprintf(w, "left to the runtime: %s\n", res.Reason)
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "LAYER\tSIZE\tACTION\tWHY")
	for _, l := range res.Layers {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", l.Digest.Encoded()[:12], units.BytesSize(float64(l.Size)), l.Action, l.Reason)
	}
	return t.Flush()
}
