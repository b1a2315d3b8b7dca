// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/indexer"
)

func newIndexBuildCommand(g *globals) *cobra.Command {
	o := &indexing{globals: g, writes: true}
	force := false
	cmd := &cobra.Command{
		Use:   "build IMAGE",
		Short: "Make an index for each layer of an image",
		Long: `Read each layer of an image once, compare it with its digest and its diff ID, and
make an index for it, which SOCI can read too unless the layer is compressed with
zstd. Indexes go to the node's own directory, where they serve for every image with
that layer, or to another directory, such as one that index.stores names. Layers
that have an index there, or carry one, are left out.
` + imageHelp + exitCodes,
		Example: `  holdfast index build quay.io/app:v1
  holdfast index build --output /mnt/indexes oci:./app`,
		Args: cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			o.name = a[0]
			return o.run(cmd.Context(), func(x *indexer.Indexer) error {
				bars := g.bars()
				x.Progress = bars.show
				results, err := x.Build(cmd.Context(), force)
				bars.stop()
				return errors.Join(report(g, cmd.OutOrStdout(), x.Image, results, "LAYER\tSIZE\tUNCOMPRESSED\tSPANS\tINDEX\tSPEED\tNOTE", buildRow), err)
			})
		},
	}
	o.directory(cmd, "output", "the `directory` that the indexes go to (default the node's own)")
	cmd.Flags().BoolVar(&force, "force", false, "also for layers that have an index, or carry one")
	o.flags(cmd)
	return cmd
}

func buildRow(r indexer.BuildResult) string {
	cells := []string{r.Digest.Encoded()[:12], units.BytesSize(float64(r.Size)), "-", "-", "-", "-", ""}
	if r.Uncompressed > 0 {
		cells[2] = units.BytesSize(float64(r.Uncompressed))
	}
	if r.Spans > 0 {
		cells[3] = fmt.Sprint(r.Spans)
	}
	if r.Outcome == indexer.Built {
		cells[4] = fmt.Sprintf("%s (%.2f%%)", units.BytesSize(float64(r.Index)), 100*float64(r.Index)/float64(r.Uncompressed))
		cells[5] = units.HumanSize(float64(r.Uncompressed)/r.Seconds) + "/s"
	}
	cells[6] = r.Reason
	if r.Outcome == indexer.Failed || r.Outcome == indexer.None {
		cells[6] = string(r.Outcome) + ": " + r.Reason
	}
	return strings.TrimRight(strings.Join(cells, "\t"), "\t")
}
