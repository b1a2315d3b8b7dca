// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/control"
)

// hookName is the name under which this program is a pull hook:
// additional-layer-store-auth-helper in registries.conf. A runtime runs it once
// a pull, after the manifest was read and before any layer is looked up, waits
// for it without a timeout, and drops what it prints.
const hookName = "holdfast-pull-hook"

// configEnv names the configuration file for the hook, which gets no arguments.
const configEnv = "HOLDFAST_CONFIG"

// runHook has the image on stdin prepared. It always succeeds: whatever goes
// wrong, the runtime's own pull goes on.
func runHook(ctx context.Context, stdin io.Reader, stderr io.Writer) int {
	if err := hook(ctx, stdin); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", hookName, err)
	}
	return 0
}

func hook(ctx context.Context, stdin io.Reader) error {
	path := os.Getenv(configEnv)
	if path == "" {
		path = config.DefaultPath
	}
	cfg, err := config.Load(path)
	if err != nil {
		return err
	}
	parent, err := parentName()
	if err != nil {
		return err
	}
	if !slices.Contains(cfg.Runtimes, parent) {
		return nil // somebody only looks at an image
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(cfg.HookTimeout),
		fmt.Errorf("not prepared within hook_timeout, %s", time.Duration(cfg.HookTimeout)))
	defer cancel()
	images, err := readImages(ctx, stdin)
	if err != nil {
		return fmt.Errorf("reading what the runtime says: %w", err)
	}
	client := control.NewClient(cfg.SocketPath())
	for ref, creds := range images {
		if _, prepErr := client.Prepare(ctx, control.PrepareRequest{Reference: ref, Credentials: &creds, Hook: true}, nil); prepErr != nil {
			err = errors.Join(err, prepErr)
		}
	}
	return err
}

// readImages reads the references to prepare. If ctx ends first, the read goes
// on until the process ends.
func readImages(ctx context.Context, stdin io.Reader) (map[string]control.Credentials, error) {
	var images map[string]control.Credentials
	done := make(chan error, 1)
	go func() { done <- json.NewDecoder(io.LimitReader(stdin, 1<<20)).Decode(&images) }()
	select {
	case err := <-done:
		return images, err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// parentName is the name of the program that runs us.
func parentName() (string, error) {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", os.Getppid()))
	if err != nil {
		return "", fmt.Errorf("finding out who runs the hook: %w", err)
	}
	return strings.TrimSuffix(filepath.Base(exe), " (deleted)"), nil
}
