// SPDX-License-Identifier: Apache-2.0

package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// checkTimeout bounds the check of a new program.
const checkTimeout = 20 * time.Second

// program is a program that is held open: what is started is the file that was
// there when it was opened, whatever has become of its name since.
type program struct {
	name string
	file *os.File
}

func openProgram(path string) (*program, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("opening the worker's program %q: want an absolute path", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the worker's program: %w", err)
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Mode()&0o111 == 0) {
		err = errors.New("it is not executable")
	}
	if err != nil {
		return nil, fmt.Errorf("opening the worker's program %s: %w", path, errors.Join(err, f.Close()))
	}
	return &program{name: filepath.Base(path), file: f}, nil
}

func (p *program) close() error { return p.file.Close() }

// command prepares to run the program.
func (p *program) command(args ...string) *exec.Cmd {
	return &exec.Cmd{
		// Not /proc/self: the child's descriptors are others.
		Path: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.file.Fd()),
		Args: append([]string{p.name}, args...),
	}
}

// check runs the program with arguments with which it must succeed.
func (p *program) check(ctx context.Context, args []string) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	cmd := p.command(args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("checking %s: %w", p.file.Name(), err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("checking %s: it fails with %q: %w: %s", p.file.Name(), strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return nil
}
