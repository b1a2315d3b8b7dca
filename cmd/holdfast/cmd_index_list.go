// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/indexer"
)

func newIndexListCommand(g *globals) *cobra.Command {
	o := &indexing{globals: g}
	cmd := &cobra.Command{
		Use:     "list [IMAGE]",
		Aliases: []string{"ls"},
		Short:   "List the indexes of this node, or those that there are for an image",
		Long: `List the indexes that were made on this node. With IMAGE, say for each of its layers
where there is an index, of which kind, and what it is worth: "found" beside the
image, "bound" by the image's own manifest, or "verified" on this node.
` + imageHelp + exitCodes,
		Example: "  holdfast index list\n  holdfast index list quay.io/app:v1",
		Args:    cli.Args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if len(a) == 0 {
				return o.listDirectory(cmd)
			}
			if o.dir != "" {
				return cli.Usage(errors.New("--from: want no IMAGE"))
			}
			o.name = a[0]
			return o.run(cmd.Context(), func(x *indexer.Indexer) error {
				results, err := x.List(cmd.Context())
				if err != nil {
					return err
				}
				return report(g, cmd.OutOrStdout(), x.Image, results, "LAYER\tSIZE\tINDEX\tWORTH\tFROM\tNOTE", listRows)
			})
		},
	}
	o.directory(cmd, "from", "list this `directory` instead of the node's own")
	o.flags(cmd)
	return cmd
}

// listRows is a row for each index of a layer.
func listRows(r indexer.ListResult) string {
	head := fmt.Sprintf("%s\t%s\t", r.Digest.Encoded()[:12], units.BytesSize(float64(r.Size)))
	if len(r.Indexes) == 0 {
		return head + "none"
	}
	var rows []string
	for _, f := range r.Indexes {
		kind := string(f.Kind)
		if f.Error != "" {
			kind = "unusable"
		}
		rows = append(rows, strings.TrimRight(fmt.Sprintf("%s%s\t%s\t%s\t%s", head, kind, f.Trust, f.From, f.Error), "\t"))
		head = "\t\t"
	}
	return strings.Join(rows, "\n")
}

// listDirectory lists what a directory has.
func (o *indexing) listDirectory(cmd *cobra.Command) error {
	finder, done, err := o.finder()
	if err != nil {
		return err
	}
	defer done()
	all, err := indexer.Contents(finder.Own())
	if err != nil {
		return err
	}
	return o.print(cmd.OutOrStdout(), all, func() error {
		t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "SUBJECT\tHAS\tSIZE\tUSED")
		for _, k := range all {
			var kinds []string
			for _, kind := range k.Kinds {
				kinds = append(kinds, string(kind))
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s ago\n", k.Subject, strings.Join(kinds, ","), units.BytesSize(float64(k.Size)), units.HumanDuration(time.Since(k.Used)))
		}
		return t.Flush()
	})
}
