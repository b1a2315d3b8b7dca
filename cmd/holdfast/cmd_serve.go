// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/credentials"
	"github.com/holdfast/holdfast/internal/daemon"
	"github.com/holdfast/holdfast/internal/keeper"
)

// The garbage collector works harder before a process grows past these; they
// are no hard limits.
const (
	memoryLimit = 47 << 20
	keeperLimit = 4 << 20
)

// workerName is the command that the keeper runs.
const workerName = "worker"

func newServeCommand(g *globals) *cobra.Command {
	replace := false
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: `Run the daemon in the foreground, until SIGTERM or SIGINT. At its start it
mounts all layers that were published before, without a network.

The process itself only keeps the mount alive through which containers read. All
else is done by a worker process that it starts, and starts again should it die.

With --replace, swap the worker of the daemon that runs for one of this program,
which also reads the configuration anew; readers wait for a moment. If the new
worker does not get ready, the old program goes on.
` + exitCodes,
		Example: `  holdfast serve
  holdfast serve --config ./config.toml
  holdfast serve --replace`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if replace {
				return g.replaceWorker(cmd.Context(), cmd.OutOrStdout())
			}
			return g.serve(cmd.Context())
		},
	}
	cmd.Flags().BoolVar(&replace, "replace", false, "swap the worker of the daemon that runs for one of this program")
	return cmd
}

// serve is the keeper.
func (g *globals) serve(ctx context.Context) error {
	cfg, log, err := g.daemonConfig()
	if err != nil {
		return err
	}
	file, err := filepath.Abs(g.config)
	if err != nil {
		return fmt.Errorf("finding the configuration: %w", err)
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding our own program: %w", err)
	}
	limitMemory(keeperLimit)
	unlock, err := daemon.Lock(cfg)
	if err != nil {
		return err
	}
	defer unlock()
	// What pulls brought is on no disk, and outlives a worker.
	kept, err := credentials.NewMemfd()
	if err != nil {
		return err
	}
	defer kept.Close() //nolint:errcheck // memory
	return keeper.Run(ctx, keeper.Config{
		Devices: daemon.Devices(cfg), Socket: cfg.KeeperSocketPath(),
		Executable: program,
		Args:       []string{workerName, "--config", file},
		Check:      []string{"config", "check", "--config", file},
		Patience:   time.Duration(cfg.ReadTimeout),
		Dead:       func() error { return daemon.ClearMounts(cfg) },
		Files:      []*os.File{kept},
		Logger:     log,
	}, func() { tellSystemd("READY=1", log) })
}

// replaceWorker asks the keeper for a worker of this program.
func (g *globals) replaceWorker(ctx context.Context, out io.Writer) error {
	cfg, err := config.Load(g.config)
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding our own program: %w", err)
	}
	if err := keeper.Replace(ctx, cfg.KeeperSocketPath(), program); err != nil {
		return err
	}
	info, err := control.NewClient(cfg.SocketPath()).Info(ctx)
	if err != nil {
		return err
	}
	return g.print(out, info, func() error {
		_, err := fmt.Fprintf(out, "replaced the worker: version %s runs, process %d\n", info.Version, info.PID)
		return err
	})
}

// newWorkerCommand is what the keeper runs; it is of no use to anybody else.
func newWorkerCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:    workerName,
		Short:  "Do the daemon's work; started by `holdfast serve`",
		Hidden: true,
		Args:   cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, log, err := g.daemonConfig()
			if err != nil {
				return err
			}
			in, err := keeper.Inherit(1)
			if err != nil {
				return err
			}
			limitMemory(memoryLimit)
			ctx, cancel := in.UntilHandOver(cmd.Context())
			defer cancel()
			return daemon.Run(ctx, cfg, daemon.Inherited{Device: in.Device, Credentials: in.Files[0], Ready: in.Ready}, log)
		},
	}
}

// daemonConfig is what keeper and worker begin with.
func (g *globals) daemonConfig() (config.Config, *slog.Logger, error) {
	cfg, err := config.Load(g.config)
	if err != nil {
		return cfg, nil, err
	}
	if os.Geteuid() != 0 {
		return cfg, nil, errors.New("the daemon mounts file systems: run it as root")
	}
	log, err := newLogger(cfg.LogLevel)
	return cfg, log, err
}

func limitMemory(bytes int64) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(bytes)
	}
}

func newLogger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log_level: %w", err)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}

func tellSystemd(state string, log *slog.Logger) {
	if err := keeper.Notify(state); err != nil {
		log.Warn("telling systemd how we are", "err", err)
	}
}
