// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/cli"
)

// Version is set when the program is built.
var Version = "devel"

// globals are the flags of all commands.
type globals struct{ json bool }

func newRootCommand() *cobra.Command {
	g := &globals{}
	cmd := &cobra.Command{
		Use:   "holdfast-operator",
		Short: "Apply ContainerRuntimeConfigs",
		Long: `The declarative side of Holdfast: on a node, the agent turns ContainerRuntimeConfigs
into the configuration of CRI-O, Podman and the Holdfast daemon. In a cluster, the controller
hands them out to the nodes of a pool, and a courier on each node brings them there, and reports
what became of them.
` + exitCodes,
		Example: `  holdfast-operator install --file crc.yaml
  holdfast-operator agent --once --file crc.yaml
  holdfast-operator agent status`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       Version,
	}
	cmd.PersistentFlags().BoolVar(&g.json, "json", false, "print JSON")
	cmd.AddCommand(newAgentCommand(g), newInstallCommand(g), newUninstallCommand(g), newCourierCommand(), newControllerCommand(),
		newProbeCommand(), newWaitCommand(), newVersionCommand(g))
	return cmd
}

// print writes v as JSON if that was asked for, and else calls text.
func (g *globals) print(w io.Writer, v any, text func() error) error {
	return cli.Print(w, g.json, v, text)
}

func newVersionCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  holdfast-operator version --json",
		Args:    cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			w := cmd.OutOrStdout()
			return g.print(w, map[string]string{"version": Version}, func() error {
				fmt.Fprintln(w, Version)
				return nil
			})
		},
	}
}

// newProbeCommand is what the agent runs to try an image store: see agent.ProbeImageStore.
func newProbeCommand() *cobra.Command {
	return &cobra.Command{
		Use:    agent.ProbeCommand + " ROOT PATH",
		Short:  "Open an image store as CRI-O does",
		Hidden: true,
		Args:   cli.Args(cobra.ExactArgs(2)),
		RunE:   func(_ *cobra.Command, a []string) error { return agent.ProbeImageStore(a[0], a[1]) },
	}
}

var errNotRoot = errors.New("the node's files are root's: run it as root")

func checkRoot() error {
	if os.Geteuid() != 0 {
		return errNotRoot
	}
	return nil
}
