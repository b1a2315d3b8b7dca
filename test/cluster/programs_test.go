// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/holdfast/holdfast/internal/filelock"
)

// programsModule is the module that names the programs, and their versions.
const programsModule = "../kubernetes"

// The programs: `go build tool` names them after their packages.
const (
	apiserverProgram = "kube-apiserver"
	etcdProgram      = "server"
)

// programs is the directory that has the programs. The first to ask waits until they are built,
// unless an earlier run has kept them.
var programs = sync.OnceValues(func() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	key, err := programsKey()
	if err != nil {
		return "", fmt.Errorf("looking at %s: %w", programsModule, err)
	}
	dir := filepath.Join(cache, "kubernetes-"+key)
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", err
	}
	// Tests of two packages, or of two checkouts, need not build the same at once.
	lock, err := os.OpenFile(filepath.Join(cache, "kubernetes.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := filelock.Wait(context.Background(), lock); err != nil {
		return "", fmt.Errorf("waiting for %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	return dir, buildPrograms(dir)
})

// buildPrograms makes a directory that has either both programs or does not exist.
func buildPrograms(dir string) error {
	fmt.Fprintf(os.Stderr, "building kube-apiserver and etcd, which takes some minutes; they are kept in %s\n", dir)
	incoming := dir + ".incoming" // of a build that was killed, maybe
	if err := os.RemoveAll(incoming); err != nil {
		return err
	}
	defer os.RemoveAll(incoming) //nolint:errcheck // it is gone, or the next build removes it
	version, err := goCommand("list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	// What it says of itself at /version.
	stamp := "-X k8s.io/component-base/version.gitVersion=" + version
	if _, err := goCommand("build", "-ldflags", "-s -w "+stamp, "-o", incoming+"/", "tool"); err != nil {
		return err
	}
	for _, name := range []string{apiserverProgram, etcdProgram} {
		if _, err := os.Stat(filepath.Join(incoming, name)); err != nil {
			return fmt.Errorf("looking at what was built: %w", err)
		}
	}
	return os.Rename(incoming, dir)
}

// programsKey is different for programs that are: for other versions of anything in them, or
// another compiler.
func programsKey() (string, error) {
	version, err := goCommand("version")
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	fmt.Fprintln(hash, version)
	for _, name := range []string{"go.mod", "go.sum"} {
		data, err := os.ReadFile(filepath.Join(programsModule, name))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%s %d\n%s", name, len(data), data)
	}
	return fmt.Sprintf("%x", hash.Sum(nil)[:8]), nil
}

// goCommand runs go in the module of the programs, without what is set for this one.
func goCommand(args ...string) (string, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir = programsModule
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// cacheDir is where things are kept from run to run.
func cacheDir() (string, error) {
	if dir := os.Getenv("HOLDFAST_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "holdfast"), err
}
