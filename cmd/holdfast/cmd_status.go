// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/control"
)

// status is what `status --json` prints.
type status struct {
	Daemon    control.Info          `json:"daemon"`
	Images    []control.ImageStatus `json:"images"`
	Artifacts *artifacts.All        `json:"artifacts,omitempty"`
}

func newStatusCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status [REFERENCE]",
		Short: "Show the daemon and the layers of prepared images",
		Long: `Show the daemon, and for each layer of all prepared images, or of one, its
index, how much of it is local, what was fetched, and its last error.
` + exitCodes,
		Example: "  holdfast status\n  holdfast status quay.io/models/llama:8b --json",
		Args:    cli.Args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			s := status{}
			if s.Daemon, err = client.Info(cmd.Context()); err != nil {
				return err
			}
			if len(a) == 1 {
				img, err := client.Image(cmd.Context(), a[0])
				if err != nil {
					return err
				}
				s.Images = []control.ImageStatus{*img}
			} else if s.Images, err = client.Images(cmd.Context()); err != nil {
				return err
			} else if s.Artifacts, err = client.Artifacts(cmd.Context()); err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), s, func() error { return printStatus(cmd.OutOrStdout(), s) })
		},
	}
}

func printStatus(w io.Writer, s status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "daemon\t%s, process %d, since %s\n", s.Daemon.Version, s.Daemon.PID, s.Daemon.Started.Format(time.DateTime))
	fmt.Fprintf(t, "mounts\t%s\n", s.Daemon.Mount)
	fmt.Fprintf(t, "cache\t%s\n", describeCache(s.Daemon.Cache))
	if s.Daemon.Disabled != "" {
		fmt.Fprintf(t, "DISABLED\t%s\n", s.Daemon.Disabled)
	}
	if a := s.Artifacts; a != nil && len(a.Artifacts)+len(a.Stores) > 0 {
		fmt.Fprintf(t, "artifacts\t%s\n", describeArtifacts(a))
	}
	for _, i := range s.Images {
		fmt.Fprintf(t, "\n%s\t%s\n", strings.Join(i.References, ", "), i.Digest)
		fmt.Fprintln(t, "  LAYER\tSIZE\tSTATE\tINDEX\tLOCAL\tREQUESTS\tFETCHED\tNOTE")
		for _, l := range i.Layers {
			printLayer(t, l)
		}
	}
	return t.Flush()
}

// describeArtifacts tells how many artifacts are offered, and which stores are not there.
func describeArtifacts(a *artifacts.All) string {
	text := fmt.Sprintf("%d, of %d stores and registries (holdfast artifact status)", len(a.Artifacts), len(a.Stores))
	for _, s := range a.Stores {
		if s.Error != "" {
			text += fmt.Sprintf("; %s: %s", s.Path, s.Error)
		}
	}
	return text
}

func describeCache(c cache.SpaceStats) string {
	text := units.BytesSize(float64(c.Used))
	if c.Limit > 0 {
		text += " of " + units.BytesSize(float64(c.Limit))
	}
	if c.Full {
		text += ", FULL: what is read is fetched and not stored"
	}
	return text
}

func printLayer(w io.Writer, l control.LayerStatus) {
	note := ""
	percent, requests, fetched := "-", "-", "-"
	if d := l.Device; d != nil {
		percent = fmt.Sprintf("%.1f%%", l.Percent)
		requests, fetched = fmt.Sprint(d.Requests), units.BytesSize(float64(d.Fetched))
		if d.Corrupt > 0 {
			note = fmt.Sprintf("%d corrupt chunks; ", d.Corrupt)
		}
		note += d.LastError
		if d.LastError == "" && len(d.Troubles) > 0 {
			t := d.Troubles[0]
			note += fmt.Sprintf("since %s: %s", t.Since.Format(time.DateTime), t.Error)
		}
		if note == "" {
			note = l.Fill
		}
		if note == "" && l.Verified {
			note = "verified"
		}
	} else {
		note = l.Reason
	}
	fmt.Fprintf(w, "  %s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Digest.Encoded()[:12], units.BytesSize(float64(l.Size)),
		l.State, l.Index, percent, requests, fetched, note)
}
