// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// runtime is CRI-O on the node: its CRI socket, and its systemd unit.
type runtime struct {
	socket    string   // as the agent finds it
	unit      string   // crio.service
	systemctl []string // the program and its first arguments; nil if nothing is to be started
	chroot    string   // where it is run; "" is here
}

// answer is what a runtime says of itself.
type answer struct {
	version string
	process string // which process, on which boot
}

// ask asks the runtime for its version. An error means that it is not up.
func (r runtime) ask(ctx context.Context) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	process, err := processBehind(ctx, r.socket)
	if err != nil {
		return answer{}, fmt.Errorf("asking the runtime at %s: %w", r.socket, err)
	}
	conn, err := grpc.NewClient("unix://"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return answer{}, fmt.Errorf("asking the runtime at %s: %w", r.socket, err)
	}
	defer conn.Close() //nolint:errcheck // there is nothing more to say
	v, err := cri.NewRuntimeServiceClient(conn).Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return answer{}, fmt.Errorf("asking the runtime at %s: %w", r.socket, err)
	}
	return answer{version: v.RuntimeVersion, process: process}, nil
}

// processBehind tells the process that listens on a socket from those before it and
// after it.
func processBehind(ctx context.Context, socket string) (string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck // it was only looked at
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return "", err
	}
	var who *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		who, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) //nolint:gosec // a descriptor
	}); err != nil || failed != nil {
		return "", errors.Join(err, failed)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", who.Pid))
	if err != nil {
		return "", nil // of another PID namespace: it cannot be told
	}
	// The name, in parentheses, may hold anything; field 22 is the start in clock ticks
	// since boot (proc_pid_stat(5)).
	_, after, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')'):], []byte(" "))
	fields := strings.Fields(string(after))
	if len(fields) < 20 {
		return "", nil
	}
	return fmt.Sprintf("%d@%s@%s", who.Pid, fields[19], bootID()), nil
}

// The states of a unit that matter (systemctl(1), is-active).
const (
	active   = "active"
	inactive = "inactive"
	failed   = "failed"
)

// unitState is what systemd says of a unit: active, inactive, failed, activating ...
func (r runtime) unitState(ctx context.Context, unit string) string {
	if r.systemctl == nil {
		return inactive
	}
	out, _, err := r.run(ctx, "is-active", unit)
	if s := strings.TrimSpace(out); s != "" {
		return s
	}
	if err != nil {
		return inactive // there is no such unit, or no systemd
	}
	return active
}

// exists reports whether the node has a CRI-O that may be started: one with Podman
// alone has not.
func (r runtime) exists(ctx context.Context) bool {
	if r.systemctl == nil {
		return false
	}
	out, _, err := r.run(ctx, "show", "--property=LoadState", "--value", r.unit)
	return err != nil || strings.TrimSpace(out) != "not-found"
}

// control has systemd do something with units.
func (r runtime) control(ctx context.Context, args ...string) error {
	if r.systemctl == nil {
		return nil
	}
	out, said, err := r.run(ctx, args...)
	if err != nil {
		return fmt.Errorf("running systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(said+out))
	}
	return nil
}

func (r runtime) run(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	all := slices.Concat(r.systemctl[1:], args)
	cmd := exec.CommandContext(ctx, r.systemctl[0], all...) //nolint:gosec // from the agent's own options
	cmd.WaitDelay = time.Second
	inRoot(cmd, r.chroot)
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	err = cmd.Run()
	return out.String(), said.String(), err
}

// inRoot has a program of the node, by its path there, run with the node's root as its own.
func inRoot(cmd *exec.Cmd, root string) {
	if root != "" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		cmd.Dir = "/"
	}
}

// program is where a node has a program, as its own shell would find it.
func (h host) program(name string) string {
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		p := filepath.Join(dir, name)
		if at, err := h.path(p); err == nil && !filepath.IsAbs(name) {
			if info, err := os.Stat(at); err == nil && info.Mode().IsRegular() {
				return p
			}
		}
	}
	return name
}

// often is how often the runtime is asked while it is waited for.
const often = 50 * time.Millisecond

// await returns when the runtime answers. It gives up when the time is over, or
// when systemd has given up.
func (r runtime) await(ctx context.Context, patience time.Duration) (answer, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s has not answered within %s", r.unit, patience))
	defer cancel()
	for n := 1; ; n++ {
		got, err := r.ask(ctx)
		if err == nil {
			return got, nil
		}
		if n%10 == 0 && r.unitState(ctx, r.unit) == failed {
			return answer{}, fmt.Errorf("%s has failed: `journalctl -u %s` says why", r.unit, r.unit)
		}
		select {
		case <-time.After(often):
		case <-ctx.Done():
			return answer{}, errors.Join(context.Cause(ctx), err)
		}
	}
}

// restart has CRI-O start anew and waits until it answers.
func (r runtime) restart(ctx context.Context, patience time.Duration) (answer, error) {
	// A unit that has failed too often would not be started otherwise.
	_ = r.control(ctx, "reset-failed", r.unit)
	// systemd waits for the unit, and for its time-out; the outcome is what await finds.
	bounded, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	restarted := r.control(bounded, "restart", r.unit)
	got, err := r.await(ctx, patience)
	if err != nil {
		if restarted != nil {
			err = fmt.Errorf("%w (%w)", err, restarted)
		}
		return answer{}, err
	}
	return got, nil
}
