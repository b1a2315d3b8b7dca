// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is what the numbers depend on.
type machine struct {
	Kernel   string `json:"kernel"`
	CPU      string `json:"cpu"`
	CPUs     int    `json:"cpus"`
	Memory   int64  `json:"memory"` // bytes
	Podman   string `json:"podman"`
	Runtime  string `json:"runtime"`
	Go       string `json:"go"`
	Holdfast string `json:"holdfast"`
	// Commit is that of the working directory, with "+" if files have changed
	// since; "" if this is no clone.
	Commit string `json:"commit"`
}

func describeMachine(ctx context.Context, binary string) (machine, error) {
	m := machine{CPUs: runtime.NumCPU(), Go: runtime.Version(), CPU: cpuModel()}
	var uts unix.Utsname
	var info unix.Sysinfo_t
	if err := unix.Uname(&uts); err != nil {
		return m, fmt.Errorf("asking for the kernel: %w", err)
	}
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("asking for the memory: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(uts.Release[:])
	m.Memory = int64(info.Totalram) * int64(info.Unit)
	for _, program := range []struct {
		into *string
		name string
		arg  string
	}{
		{&m.Podman, "podman", "--version"}, {&m.Runtime, "runc", "--version"}, {&m.Holdfast, binary, "version"},
	} {
		out, err := exec.CommandContext(ctx, program.name, program.arg).Output()
		if err != nil {
			return m, fmt.Errorf("asking %s for its version: %w", program.name, err)
		}
		*program.into, _, _ = strings.Cut(string(out), "\n")
	}
	m.Commit = commit(ctx)
	return m, nil
}

// commit is best effort: the bench also runs where git is not.
func commit(ctx context.Context) string {
	head, err := exec.CommandContext(ctx, "git", "rev-parse", "HEAD").Output()
	if err != nil {
		return ""
	}
	changed, err := exec.CommandContext(ctx, "git", "status", "--porcelain").Output()
	if err != nil || len(changed) > 0 {
		return strings.TrimSpace(string(head)) + "+"
	}
	return strings.TrimSpace(string(head))
}

func cpuModel() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}
