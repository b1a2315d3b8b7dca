// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexer"
)

func newIndexPushCommand(g *globals) *cobra.Command {
	o := &indexing{globals: g, upstream: true}
	to := ""
	cmd := &cobra.Command{
		Use:   "push IMAGE",
		Short: "Publish the indexes of an image for other nodes",
		Long: `Publish the indexes that "holdfast index build" has made for the layers of an image:
beside the image in its registry, as a SOCI index that refers to it, or to another
place, as in the setting index.publish. The image itself stays as it is. Credentials
are the node's own, such as those of podman login.
` + imageHelp + exitCodes,
		Example: `  holdfast index push quay.io/app:v1
  holdfast index push --from ./indexes --to docker://quay.io/team/indexes quay.io/app:v1`,
		Args: cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			o.name = a[0]
			where, err := place(to)
			if err != nil {
				return err
			}
			return o.run(cmd.Context(), func(x *indexer.Indexer) error {
				pushed, err := x.Push(cmd.Context(), where)
				switch {
				case errors.Is(err, blob.ErrUnauthorized):
					err = fmt.Errorf("%w: log in with an account that may push there (podman login), or publish to another place (--to)", err)
				case errors.Is(err, indexer.ErrNone):
					err = fmt.Errorf("%w to publish: run `holdfast index build %s` first", err, o.name)
				}
				if pushed == nil {
					return err
				}
				return errors.Join(g.print(cmd.OutOrStdout(), pushed, func() error { return printPushed(cmd.OutOrStdout(), o.name, pushed) }), err)
			})
		},
	}
	o.directory(cmd, "from", "the `directory` that the indexes are in (default the node's own)")
	cmd.Flags().StringVar(&to, "to", string(index.RegistryPlace), "the `place` to publish to: registry, a directory, or docker://HOST/REPOSITORY")
	o.flags(cmd)
	return cmd
}

func printPushed(w io.Writer, name string, p *indexer.Pushed) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "LAYER\tSIZE\tINDEX\tNOTE")
	published := 0
	for _, l := range p.Layers {
		note := l.Reason
		switch l.Outcome {
		case indexer.Published:
			published++
		case indexer.Missing, indexer.Unusable:
			if note != "" {
				note += "; "
			}
			note += fmt.Sprintf("run `holdfast index build %s`", name)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", l.Digest.Encoded()[:12], units.BytesSize(float64(l.Size)), l.Outcome, note)
	}
	if err := t.Flush(); err != nil || published == 0 {
		return err
	}
	_, err := fmt.Fprintf(w, "published to %s\n", p.Place)
	if p.Digest != "" {
		_, err = fmt.Fprintln(w, p.Digest)
	}
	return err
}
