// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/cli"
)

func newInstallCommand(g *globals) *cobra.Command {
	o := nodeOptions{}
	var files []string
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install Holdfast on this node",
		Long: `Put programs and units on this node, or replace older ones, and start the agent as a service:
it starts before CRI-O at each boot. Programs go to /usr/local/bin or, where that is
read-only, to /opt/holdfast/bin or /var/lib/holdfast-agent/bin. The daemon itself is started when a
ContainerRuntimeConfig needs it.
` + exitCodes,
		Example: `  holdfast-operator install --file crc.yaml
  holdfast-operator install --root /mnt/image --file crc.yaml`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			options, err := o.options()
			if err != nil {
				return err
			}
			a, err := agent.New(options)
			if err != nil {
				return err
			}
			if err := a.Install(cmd.Context(), files); err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			return g.print(w, map[string]string{"objects": agent.ObjectsDir}, func() error {
				fmt.Fprintf(w, "installed; the agent follows the ContainerRuntimeConfigs in %s\n", agent.ObjectsDir)
				return nil
			})
		},
	}
	o.addFlags(cmd)
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "a `file` with ContainerRuntimeConfigs for the node; may be repeated")
	return cmd
}

func newUninstallCommand(g *globals) *cobra.Command {
	o := nodeOptions{}
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take Holdfast off this node",
		Long: `Stop the agent, put the node's files back to what they were, and remove programs, units and the
daemon's directories. While images in use come from the daemon's store, it and the daemon stay, so that
they go on working, and no more images get there; run it again when those are gone.
` + exitCodes,
		Example: "  holdfast-operator uninstall",
		Args:    cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			options, err := o.options()
			if err != nil {
				return err
			}
			options.Failures, options.Retry = 1, true
			options.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
			a, err := agent.New(options)
			if err != nil {
				return err
			}
			r, err := a.Uninstall(cmd.Context())
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			return g.print(w, r, func() error {
				fmt.Fprintln(w, "uninstalled; ContainerRuntimeConfigs in", agent.ObjectsDir, "and edited files, if there are any, are left")
				return nil
			})
		},
	}
	o.addFlags(cmd)
	return cmd
}
