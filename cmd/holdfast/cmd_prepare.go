// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
)

func newPrepareCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "prepare REFERENCE",
		Short: "Make an image's layers available before they are downloaded",
		Long: `Make an image's layers available to the runtimes of this machine, and say for
each whether it is lazy (its content comes when it is read), fetched, or left to
the runtime, and why. Credentials are those of podman login.
` + exitCodes,
		Example: `  holdfast prepare quay.io/models/llama:8b
  podman run quay.io/models/llama:8b`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			bars := newBars(os.Stderr, isTerminal(os.Stderr) && !g.json)
			res, err := client.Prepare(cmd.Context(), control.PrepareRequest{Reference: a[0]}, bars.event)
			bars.stop()
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), res, func() error { return printResult(cmd.OutOrStdout(), res) })
		},
	}
}

// bars shows the progress of layers on a terminal.
type bars struct {
	progress *mpb.Progress
	byLayer  map[string]*mpb.Bar
}

func newBars(w io.Writer, show bool) *bars {
	b := &bars{byLayer: map[string]*mpb.Bar{}}
	if show {
		b.progress = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40), mpb.WithRefreshRate(100*time.Millisecond))
	}
	return b
}

func (b *bars) event(e prepare.Event) {
	if b.progress == nil || e.Done == 0 {
		return
	}
	key := e.Layer.String()
	bar := b.byLayer[key]
	if bar == nil {
		bar = b.progress.AddBar(e.Total,
			mpb.PrependDecorators(decor.Name(e.Layer.Encoded()[:12]+" ")),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f")))
		b.byLayer[key] = bar
	}
	bar.SetCurrent(e.Done)
}

func (b *bars) stop() {
	if b.progress == nil {
		return
	}
	for _, bar := range b.byLayer {
		bar.Abort(false) // what is not full by now never will be
	}
	b.progress.Wait()
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
