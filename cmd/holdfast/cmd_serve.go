// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/daemon"
)

// memoryLimit makes the garbage collector work harder before the daemon grows
// past it; it is no hard limit.
const memoryLimit = 40 << 20

func newServeCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: `Run the daemon in the foreground, until SIGTERM or SIGINT. At its start it
mounts all layers that were published before, without a network.
` + exitCodes,
		Example: `  holdfast serve
  holdfast serve --config ./config.toml`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(g.config)
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return fmt.Errorf("the daemon mounts file systems: run it as root")
			}
			log, err := newLogger(cfg.LogLevel)
			if err != nil {
				return err
			}
			if os.Getenv("GOMEMLIMIT") == "" {
				debug.SetMemoryLimit(memoryLimit)
			}
			return daemon.Run(cmd.Context(), cfg, log, notifyReady)
		},
	}
}

func newLogger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log_level: %w", err)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}

// notifyReady tells systemd (Type=notify, sd_notify(3)), if it started us.
func notifyReady() {
	addr := os.Getenv("NOTIFY_SOCKET")
	if addr == "" {
		return
	}
	c, err := net.Dial("unixgram", addr)
	if err != nil {
		slog.Warn("telling systemd that we are ready", "err", err)
		return
	}
	defer c.Close() //nolint:errcheck // a datagram has been sent or not
	if _, err := c.Write([]byte("READY=1")); err != nil {
		slog.Warn("telling systemd that we are ready", "err", err)
	}
}
