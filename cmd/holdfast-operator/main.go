// SPDX-License-Identifier: Apache-2.0

// Command holdfast-operator applies ContainerRuntimeConfigs: the node agent, and in a cluster
// its courier, and the controller.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/cli"
)

// Exit codes, as in the help text.
const (
	exitFailure  = 1
	exitUsage    = 2
	exitNeverRan = 3
	exitInUse    = 5
	exitPartly   = 6
)

const exitCodes = `
Exit codes: 0 done, 1 failed or undone, 2 wrong usage, 3 no agent has run here,
5 images in use need what is to be removed, 6 done in part: stores are withheld, or
objects want different things.`

func main() { os.Exit(Main()) }

// Main runs the command and returns its exit code.
func Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := cli.Execute(ctx, newRootCommand())
	if err == nil {
		return 0
	}
	if !errors.Is(err, errPartly) {
		fmt.Fprintf(os.Stderr, "holdfast-operator: %v\n", err)
	}
	switch {
	case cli.IsUsage(err):
		return exitUsage
	case errors.Is(err, agent.ErrNeverRan):
		return exitNeverRan
	case errors.Is(err, agent.ErrInUse):
		return exitInUse
	case errors.Is(err, errPartly):
		return exitPartly
	}
	return exitFailure
}

// errPartly means that what was asked for is not all there. What is missing has been
// said.
var errPartly = errors.New("not all of it could be had")
