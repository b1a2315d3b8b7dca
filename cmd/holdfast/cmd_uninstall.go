// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/mirrorconf"
	"github.com/holdfast/holdfast/internal/uninstall"
)

// uninstalled is what `uninstall` prints.
type uninstalled struct {
	*uninstall.Report
	Left []string `json:"left"` // files for the user to delete
}

func newUninstallCommand(g *globals) *cobra.Command {
	dryRun := false
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove Holdfast's directories from this machine",
		Long: `Remove Holdfast's directories (root and runroot), with the store and all prepared
layers, and say which files are left to delete. Refused while the daemon runs, while
a runtime refers to a layer, and while the storage.conf of a runtime lists the store.
Running it again does no harm.
` + exitCodes,
		Example: `  systemctl disable --now holdfast
  holdfast uninstall --dry-run
  holdfast uninstall`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(g.config)
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return fmt.Errorf("the directories are root's: run it as root")
			}
			r, err := uninstall.Run(uninstall.Options{Config: cfg, StorageConf: uninstall.StorageConf(), DryRun: dryRun})
			if err != nil {
				return fmt.Errorf("uninstalling: %w", err)
			}
			u := uninstalled{r, installedFiles(g.config, mirrorconf.Config{ConfDir: cfg.RegistriesConfDir})}
			return g.print(cmd.OutOrStdout(), u, func() error { return u.print(cmd.OutOrStdout()) })
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "change nothing, only say what would be removed")
	return cmd
}

// installedFiles are the files of `make install` that exist. First what others
// would start, or make again.
func installedFiles(configPath string, mirrors mirrorconf.Config) []string {
	all := []string{
		"/etc/containers/registries.conf.d/50-holdfast.conf",
		filepath.Join(mirrors.Dir(), mirrorconf.FileName), // gone, unless the daemon was killed
		"/etc/systemd/system/holdfast.service",
		"/etc/systemd/system/holdfast-agent.service",
		"/etc/tmpfiles.d/holdfast.conf",
		configPath,
	}
	if exe, err := os.Executable(); err == nil {
		all = append(all, filepath.Join(filepath.Dir(exe), hookName), filepath.Join(filepath.Dir(exe), "holdfast-operator"), exe)
	}
	left := []string{}
	for _, name := range all {
		if _, err := os.Lstat(name); err == nil {
			left = append(left, name)
		}
	}
	return left
}

func (u uninstalled) print(w io.Writer) error {
	verb := func(done, would string) string {
		if u.DryRun {
			return would
		}
		return done
	}
	for _, m := range u.Unmounted {
		fmt.Fprintln(w, verb("unmounted", "would unmount"), m)
	}
	for _, dir := range u.Removed {
		fmt.Fprintln(w, verb("removed", "would remove"), dir)
	}
	for _, dir := range u.Emptied {
		fmt.Fprintln(w, verb("emptied", "would empty"), dir, "(it is a mount point)")
	}
	if len(u.Removed)+len(u.Emptied) == 0 {
		fmt.Fprintln(w, "there are no directories to remove")
	}
	for _, name := range u.Left {
		fmt.Fprintln(w, "left for you to delete:", name)
	}
	return nil
}
