// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexer"
)

func newIndexVerifyCommand(g *globals) *cobra.Command {
	o := &indexing{globals: g}
	from, at := "", ""
	cmd := &cobra.Command{
		Use:   "verify IMAGE",
		Short: "Compare the indexes of an image with its layers",
		Long: `Read each layer of an image whole, and compare it with its index: the digests of all
chunks or spans, the places where reading can begin, the file tree, and where the
content of each file lies. Say for each layer "ok", or the first difference. The index
is the best that "holdfast index list" shows, unless a place is named.
` + imageHelp + exitCodes,
		Example: "  holdfast index verify quay.io/app:v1\n  holdfast index verify --place registry quay.io/app:v1",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			o.name = a[0]
			var where index.Place
			var err error
			switch {
			case from != "" && at != "":
				return cli.Usage(errors.New("--from and --place: want one of them"))
			case from+at != "":
				where, err = place(from + at)
			}
			if err != nil {
				return err
			}
			return o.run(cmd.Context(), func(x *indexer.Indexer) error {
				bars := g.bars()
				x.Progress = bars.show
				results, err := x.Verify(cmd.Context(), where)
				bars.stop()
				return errors.Join(report(g, cmd.OutOrStdout(), x.Image, results, "LAYER\tSIZE\tINDEX\tWORTH\tFROM\tVERDICT", verifyRow), err)
			})
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "the `directory` whose indexes are compared")
	_ = cmd.MarkFlagDirname("from") // it exists
	cmd.Flags().StringVar(&at, "place", "", "the `place` whose indexes are compared: registry, a directory, or docker://HOST/REPOSITORY")
	o.flags(cmd)
	return cmd
}

func verifyRow(r indexer.VerifyResult) string {
	kind, trust, from := "-", "-", "-"
	if r.Index != nil {
		trust, from = r.Index.Trust.String(), r.Index.From
		if r.Index.Kind != "" {
			kind = string(r.Index.Kind)
		}
	}
	verdict := string(r.Verdict)
	if r.Reason != "" {
		verdict += ": " + r.Reason
	}
	return fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", r.Digest.Encoded()[:12], units.BytesSize(float64(r.Size)), kind, trust, from, verdict)
}
