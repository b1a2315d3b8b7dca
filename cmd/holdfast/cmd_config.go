// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
)

func newConfigCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "config",
		Short:   "Check the configuration, or print the default one",
		Example: "  holdfast config check\n  holdfast config default > /etc/holdfast/config.toml",
		Args:    cli.Args(cobra.NoArgs), // or an unknown command would print the help and succeed
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(&cobra.Command{
		Use:     "check",
		Short:   "Check a configuration file",
		Long:    "Check a configuration file, and say what is wrong with it.\n" + exitCodes,
		Example: "  holdfast config check --config ./config.toml",
		Args:    cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(g.config)
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), cfg, func() error {
				verdict := "is good"
				if _, err := os.Stat(g.config); err != nil {
					verdict = "does not exist: all settings have their defaults"
				}
				_, err := fmt.Fprintln(cmd.OutOrStdout(), g.config, verdict)
				return err
			})
		},
	}, &cobra.Command{
		Use:     "default",
		Short:   "Print a configuration file with every setting and its default",
		Example: "  holdfast config default > /etc/holdfast/config.toml",
		Args:    cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), config.DefaultFile)
			return err
		},
	})
	return cmd
}
