// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/daemon"
)

// globals are the flags of all commands.
type globals struct {
	config string
	json   bool
}

func newRootCommand() *cobra.Command {
	g := &globals{}
	cmd := &cobra.Command{
		Use:   "holdfast",
		Short: "Start containers before their image is there",
		Long: `Holdfast makes CRI-O and Podman start containers before their image has been
downloaded, with unmodified images and unmodified runtimes.
` + exitCodes,
		Example: `  holdfast serve
  holdfast prepare quay.io/models/llama:8b
  podman run quay.io/models/llama:8b`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       daemon.Version,
	}
	cmd.PersistentFlags().StringVar(&g.config, "config", config.DefaultPath, "the daemon's configuration `file`")
	cmd.PersistentFlags().BoolVar(&g.json, "json", false, "print JSON")
	cmd.AddCommand(
		newServeCommand(g), newWorkerCommand(g), newPrepareCommand(g), newListCommand(g), newStatusCommand(g),
		newRemoveCommand(g), newGCCommand(g), newIndexCommand(g), newProfileCommand(g), newPinCommand(g), newUnpinCommand(g), newPinsCommand(g), newStoreCommand(g), newBundleCommand(g), newArtifactCommand(g), newRenderCommand(g), newUninstallCommand(g), newConfigCommand(g), newVersionCommand(g),
	)
	return cmd
}

// client returns a client of the daemon that the configuration describes.
func (g *globals) client() (*control.Client, error) {
	cfg, err := config.Load(g.config)
	if err != nil {
		return nil, err
	}
	return control.NewClient(cfg.SocketPath()), nil
}

// print writes v as JSON if that was asked for, and else calls text.
func (g *globals) print(w io.Writer, v any, text func() error) error {
	return cli.Print(w, g.json, v, text)
}

// isTerminal reports whether a file is a terminal.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}

// shortDigest is what tables have of a digest.
func shortDigest(d digest.Digest) string {
	if d.Validate() != nil {
		return "-"
	}
	return d.Encoded()[:12]
}
