// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
)

// newWaitCommand is what pods of a DaemonSet run once their init container has done what there
// was to do, since pods of a DaemonSet must not end: see deploy/kustomize/overlays/uninstall.
func newWaitCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "wait",
		Short:  "Do nothing until it is stopped",
		Hidden: true,
		Args:   cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			<-cmd.Context().Done()
			return nil
		},
	}
}
