// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
)

func newRemoveCommand(g *globals) *cobra.Command {
	all := false
	cmd := &cobra.Command{
		Use:     "remove {REFERENCE | --all}",
		Aliases: []string{"rm"},
		Short:   "Remove a prepared image",
		Long: `Remove a prepared image: its records, mounts and cached data, as far as no other
prepared image has them. Refused while a runtime refers to any of its layers; the
message says who does. With --all, remove all images that are not in use, and say
which are.
` + exitCodes,
		Example: "  podman rmi quay.io/models/llama:8b\n  holdfast remove quay.io/models/llama:8b\n  holdfast remove --all",
		Args: func(cmd *cobra.Command, a []string) error {
			if all {
				return cli.Args(cobra.NoArgs)(cmd, a)
			}
			return cli.Args(cobra.ExactArgs(1))(cmd, a)
		},
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			if all {
				res, err := removeAll(cmd.Context(), client)
				return errors.Join(g.print(cmd.OutOrStdout(), res, func() error { return res.print(cmd) }), err)
			}
			if err := client.Remove(cmd.Context(), a[0]); errors.Is(err, prepare.ErrInUse) {
				return fmt.Errorf("%w: remove what refers to it first (podman rmi, podman rm; crictl rmi, crictl rmp)", err)
			} else if err != nil {
				return err
			}
			removed := struct {
				Removed string `json:"removed"`
			}{a[0]}
			return g.print(cmd.OutOrStdout(), removed, func() error {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "removed", a[0])
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "remove all prepared images that are not in use")
	return cmd
}

// removal is what `remove --all` did.
type removal struct {
	Removed []string `json:"removed"`
	Kept    []kept   `json:"kept"`
}

type kept struct {
	Image  string `json:"image"`
	Reason string `json:"reason"`
}

// removeAll removes all images that are not in use. Other errors are joined.
func removeAll(ctx context.Context, client *control.Client) (removal, error) {
	r := removal{Removed: []string{}, Kept: []kept{}}
	all, err := client.Images(ctx)
	for _, img := range all {
		name := strings.Join(img.References, ", ")
		if name == "" {
			name = img.Digest.String()
		}
		switch e := client.Remove(ctx, img.Digest.String()); {
		case e == nil:
			r.Removed = append(r.Removed, name)
		case errors.Is(e, prepare.ErrInUse):
			r.Kept = append(r.Kept, kept{name, e.Error()})
		case errors.Is(e, prepare.ErrUnknown): // collected meanwhile
		default:
			err = errors.Join(err, e)
		}
	}
	return r, err
}

func (r removal) print(cmd *cobra.Command) error {
	for _, name := range r.Removed {
		fmt.Fprintln(cmd.OutOrStdout(), "removed", name)
	}
	for _, k := range r.Kept {
		fmt.Fprintf(cmd.OutOrStdout(), "kept %s: %s\n", k.Image, k.Reason)
	}
	return nil
}
