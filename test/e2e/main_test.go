// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.podman.io/storage/pkg/reexec"
	"golang.org/x/sys/unix"
)

// holdfast is the program under test, built once.
var holdfast string

func TestMain(m *testing.M) {
	reexec.Register(clientName, clientMain)
	if reexec.Init() {
		return
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	// Some of what extracts layers takes its modes from the umask.
	unix.Umask(0o022)
	if err := checkMachine(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "holdfast-e2e-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir) //nolint:errcheck // the test's result stands
	holdfast = filepath.Join(dir, "holdfast")
	build := exec.CommandContext(context.Background(), "go", "build", "-o", dir+"/", "github.com/holdfast/holdfast/cmd/holdfast", "github.com/holdfast/holdfast/cmd/holdfast-operator")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // it also runs in another Debian
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building holdfast: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// checkMachine says what is missing, all of it at once.
func checkMachine() error {
	var err error
	if os.Geteuid() != 0 {
		err = errors.New("the end-to-end tests mount file systems: run them as root")
	}
	for tool, pkg := range map[string]string{
		"podman": "podman", "skopeo": "skopeo", "runc": "runc", "conmon": "conmon",
		"debootstrap": "debootstrap", "unshare": "util-linux", "nsenter": "util-linux", "tar": "tar", "useradd": "passwd", "newuidmap": "uidmap",
	} {
		if _, e := exec.LookPath(tool); e != nil {
			err = errors.Join(err, fmt.Errorf("%s is missing: apt-get install %s", tool, pkg))
		}
	}
	if _, e := os.Stat("/dev/fuse"); e != nil {
		err = errors.Join(err, fmt.Errorf("this machine has no FUSE (modprobe fuse): %w", e))
	}
	return err
}
