// SPDX-License-Identifier: Apache-2.0

// Command holdfast starts containers before their image is there: the node
// daemon, its pull hook (under the name holdfast-pull-hook) and its CLI.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/keeper"
	"github.com/holdfast/holdfast/internal/prepare"
)

// Exit codes, as in the help text.
const (
	exitFailure    = 1
	exitUsage      = 2
	exitNotRunning = 3
	exitUnknown    = 4
	exitInUse      = 5
)

const exitCodes = `
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the daemon is not running,
4 no such image has been prepared, 5 a runtime refers to the image.`

func main() { os.Exit(Main()) }

// Main runs the command and returns its exit code.
func Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if filepath.Base(os.Args[0]) == hookName {
		return runHook(ctx, os.Stdin, os.Stderr)
	}
	err := cli.Execute(ctx, newRootCommand())
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "holdfast: %v\n", err)
	return exitCode(err)
}

func exitCode(err error) int {
	switch {
	case cli.IsUsage(err):
		return exitUsage
	case errors.Is(err, control.ErrNotRunning), errors.Is(err, keeper.ErrNotRunning):
		fmt.Fprintln(os.Stderr, "Start it with `systemctl start holdfast`, or `holdfast serve`.")
		return exitNotRunning
	case errors.Is(err, prepare.ErrUnknown):
		fmt.Fprintln(os.Stderr, "`holdfast list` shows what has been prepared.")
		return exitUnknown
	case errors.Is(err, prepare.ErrNoProfile):
		fmt.Fprintln(os.Stderr, "It is recorded when a container first reads the image; `holdfast profile record` does it now.")
		return exitFailure
	case errors.Is(err, prepare.ErrInUse):
		return exitInUse
	default:
		return exitFailure
	}
}
