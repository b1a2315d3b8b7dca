// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/profile"
)

func newProfileCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profile",
		Short: "Show and manage what workloads read of their images at first",
		Long: `A profile is what the workload of an image reads until it is ready, and in which
order. The daemon records it at the first start, and fetches just that, in that
order, when the image is prepared again. An image is named by its reference, or by
its manifest digest, also after it has been removed.
` + exitCodes,
		Example: "  holdfast profile show quay.io/models/llama:8b\n  holdfast profile record quay.io/models/llama:8b --for 1m",
		Args:    cli.Args(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newProfileShowCommand(g), newProfileRecordCommand(g), newProfilePushCommand(g), newProfileDropCommand(g))
	return cmd
}

func newProfileShowCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "show REFERENCE",
		Short: "Show the profile of an image",
		Long: `Show how much of each layer the workload of an image reads until it is ready, and
what it reads first. With --json: the document itself.
` + exitCodes,
		Example: "  holdfast profile show quay.io/models/llama:8b\n  holdfast profile show quay.io/models/llama:8b --json",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			p, err := client.Profile(cmd.Context(), a[0])
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), p, func() error { return printProfile(cmd.OutOrStdout(), p) })
		},
	}
}

func newProfileRecordCommand(g *globals) *cobra.Command {
	var long time.Duration
	cmd := &cobra.Command{
		Use:   "record REFERENCE",
		Short: "Record a profile now, in the place of the one there is",
		Long: `Record what is read of a prepared image from now on, for a while, and keep that as
its profile. Start the container meanwhile. What the kernel has of the image in
memory is dropped before, as far as no program runs from it.
` + exitCodes,
		Example: "  holdfast profile record quay.io/models/llama:8b --for 1m",
		Args:    cli.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if long <= 0 {
				return cli.Usage(fmt.Errorf("--for %s: want more than 0s", long))
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			p, err := client.RecordProfile(cmd.Context(), control.RecordRequest{Reference: a[0], For: long})
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), p, func() error { return printProfile(cmd.OutOrStdout(), p) })
		},
	}
	cmd.Flags().DurationVar(&long, "for", 30*time.Second, "how long to record")
	return cmd
}

func newProfilePushCommand(g *globals) *cobra.Command {
	return profileAction(g, "push", "pushed", (*control.Client).PushProfile, &cobra.Command{
		Short: "Publish the profile of an image for other nodes",
		Long: `Publish the profile of an image in the place that the configuration names
(index.publish), where other nodes find it when they prepare the image.
` + exitCodes,
	})
}

func newProfileDropCommand(g *globals) *cobra.Command {
	return profileAction(g, "drop", "dropped", (*control.Client).DropProfile, &cobra.Command{
		Short: "Forget the profile of an image",
		Long: `Forget the profile of an image on this node. The next start of a container after
the image has been prepared anew records another.
` + exitCodes,
	})
}

// profileAction completes a command that does one thing with the profile of an image.
func profileAction(g *globals, name, done string, do func(*control.Client, context.Context, string) error, cmd *cobra.Command) *cobra.Command {
	cmd.Use = name + " REFERENCE"
	cmd.Example = "  holdfast profile " + name + " quay.io/models/llama:8b"
	cmd.Args = cli.Args(cobra.ExactArgs(1))
	cmd.RunE = func(cmd *cobra.Command, a []string) error {
		client, err := g.client()
		if err != nil {
			return err
		}
		if err := do(client, cmd.Context(), a[0]); err != nil {
			return err
		}
		return g.print(cmd.OutOrStdout(), map[string]string{done: a[0]}, func() error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s the profile of %s\n", done, a[0])
			return err
		})
	}
	return cmd
}

// mostShown is how many of the touches are printed; --json has all.
const mostShown = 10

func printProfile(w io.Writer, p *profile.Profile) error {
	wanted := p.Wanted()
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "image\t%s\n", p.Image)
	fmt.Fprintf(t, "recorded\t%s, runs merged: %d\n\n", p.Created.Local().Format(time.DateTime), p.Runs)
	fmt.Fprintln(t, "LAYER\tSIZE\tFETCHED\tRANGES\tRUNS")
	for i, l := range p.Layers {
		ranges, bytes := 0, int64(0)
		for _, touch := range wanted {
			if touch.Layer == i {
				ranges, bytes = ranges+1, bytes+touch.Length
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\n", l.Digest.Encoded()[:12], units.BytesSize(float64(l.Size)), units.BytesSize(float64(bytes)), ranges, l.Runs)
	}
	fmt.Fprintln(t, "\nFIRST\tAT\tBYTES\t\tRUNS")
	for i, touch := range wanted[:min(len(wanted), mostShown)] {
		fmt.Fprintf(t, "%d. %s\t%d\t%d\t\t%d\n", i+1, p.Layers[touch.Layer].Digest.Encoded()[:12], touch.Offset, touch.Length, touch.Runs)
	}
	if more := len(wanted) - mostShown; more > 0 {
		fmt.Fprintf(t, "and %d more\n", more)
	}
	return t.Flush()
}
