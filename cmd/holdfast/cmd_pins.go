// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/pins"
)

func newPinCommand(g *globals) *cobra.Command {
	noWait := false
	cmd := &cobra.Command{
		Use:   "pin REFERENCE...",
		Short: "Fetch images and artifacts whole, and keep them",
		Long: `Fetch images and artifacts whole, and keep them on this node until they are
unpinned: nothing of them is evicted or collected, and starting them needs no
network. When a tag moves, what it names then is fetched, too. They are kept in the
directory pin_root of the configuration.

Without --no-wait, wait until all are there, and say why if one is not. The daemon
goes on trying.
` + exitCodes,
		Example: "  holdfast pin quay.io/models/llama:8b\n  holdfast pins",
		Args:    cli.Args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			names, err := parsePins(a)
			if err != nil {
				return err
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			if err := client.Pin(cmd.Context(), names...); err != nil {
				return err
			}
			if noWait {
				return g.printPins(cmd, client, names)
			}
			waited := g.waitForPins(cmd.Context(), client, names)
			return errors.Join(g.printPins(cmd, client, names), waited)
		},
	}
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "do not wait until they have been fetched")
	return cmd
}

func parsePins(a []string) ([]string, error) {
	names := make([]string, len(a))
	for i, n := range a {
		ref, err := pins.Parse(n)
		if err != nil {
			return nil, cli.Usage(err)
		}
		names[i] = ref.String()
	}
	return names, nil
}

func newUnpinCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "unpin REFERENCE...",
		Short: "Let pinned images and artifacts go",
		Long: `Let images and artifacts go that were pinned by holdfast pin. Their disk space is
freed, but for what containers still use. Those that the configuration pins go when
they are taken out of it.
` + exitCodes,
		Example: "  holdfast unpin quay.io/models/llama:8b",
		Args:    cli.Args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			if err := client.Unpin(cmd.Context(), a...); err != nil {
				return err
			}
			done := struct {
				Unpinned []string `json:"unpinned"`
			}{a}
			return g.print(cmd.OutOrStdout(), done, func() error {
				for _, n := range a {
					if _, err := fmt.Fprintln(cmd.OutOrStdout(), "unpinned", n); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

func newPinsCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "pins",
		Short: "List pinned images and artifacts",
		Long: `List the images and artifacts that are pinned: whether they are here, which source
they came from, and what keeps those that are not.
` + exitCodes,
		Example: "  holdfast pins\n  holdfast pins --json",
		Args:    cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			return g.printPins(cmd, client, nil)
		},
	}
}

// waitForPins waits until all of the names are here, or one could not be fetched.
func (g *globals) waitForPins(ctx context.Context, client *control.Client, names []string) error {
	const often = 200 * time.Millisecond
	bars := g.bars()
	defer bars.stop()
	for {
		all, err := client.Pins(ctx)
		if err != nil {
			return err
		}
		busy := false
		var failed error
		for _, p := range all {
			if !slices.Contains(names, p.Name) {
				continue
			}
			bars.showNamed(p.Name, p.Done, p.Total)
			busy = busy || p.State == pins.Waiting || p.State == pins.Fetching
			if p.State == pins.Failed {
				failed = errors.Join(failed, fmt.Errorf("fetching %s: %s; the daemon goes on trying", p.Name, p.Error))
			}
		}
		if !busy {
			return failed
		}
		select {
		case <-time.After(often):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// printPins prints the pins with these names, or all.
func (g *globals) printPins(cmd *cobra.Command, client *control.Client, names []string) error {
	all, err := client.Pins(cmd.Context())
	if err != nil {
		return err
	}
	if names != nil {
		all = slices.DeleteFunc(all, func(p pins.Pin) bool { return !slices.Contains(names, p.Name) })
	}
	return g.print(cmd.OutOrStdout(), all, func() error { return printPinTable(cmd.OutOrStdout(), all) })
}

func printPinTable(w io.Writer, all []pins.Pin) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "IMAGE\tDIGEST\tSTATE\tFROM\tPINNED BY\tCHECKED")
	for _, p := range all {
		by, state, dgst, checked := "command", p.State, "-", "-"
		if p.Configured {
			by = "configuration"
		}
		if p.State == pins.Fetching && p.Total > 0 {
			state = fmt.Sprintf("%s %d%%", p.State, p.Done*100/p.Total)
		}
		if p.Digest != "" {
			dgst = p.Digest.Encoded()[:12]
		}
		if !p.Checked.IsZero() {
			checked = units.HumanDuration(time.Since(p.Checked)) + " ago"
		}
		if p.Error != "" {
			state += ": " + p.Error
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Name, dgst, state, dash(p.From), by, checked)
	}
	return t.Flush()
}

func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
