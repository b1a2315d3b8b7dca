// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newRemoveCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "remove REFERENCE",
		Aliases: []string{"rm"},
		Short:   "Remove a prepared image",
		Long: `Remove a prepared image: its records, mounts and cached data, as far as no other
prepared image has them. Refused while a runtime refers to any of its layers.
` + exitCodes,
		Example: "  podman rmi quay.io/models/llama:8b\n  holdfast remove quay.io/models/llama:8b",
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			if err := client.Remove(cmd.Context(), a[0]); err != nil {
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
}
