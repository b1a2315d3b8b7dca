// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// programs are two versions of the program under test.
var programs [2]string

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the soak tests mount file systems: run them as root")
		return 1
	}
	dir, err := os.MkdirTemp("", "holdfast-soak-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir) //nolint:errcheck // the test's result stands
	for i := range programs {
		programs[i] = filepath.Join(dir, fmt.Sprintf("v%d", i+1), "holdfast")
		build := exec.CommandContext(context.Background(), "go", "build",
			"-ldflags", fmt.Sprintf("-X github.com/holdfast/holdfast/internal/daemon.Version=v%d", i+1),
			"-o", programs[i], "github.com/holdfast/holdfast/cmd/holdfast")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building holdfast: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}
