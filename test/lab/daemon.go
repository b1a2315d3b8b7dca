// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
)

// Daemon is a Holdfast daemon in directories of its own.
type Daemon struct {
	Binary string // the holdfast program
	dir    string
	cmd    *exec.Cmd
	exited chan error
}

// NewDaemon returns a daemon in dir that has not been started. settings is TOML
// to add to its configuration.
func NewDaemon(binary, dir, settings string) (*Daemon, error) {
	d := &Daemon{Binary: binary, dir: dir}
	if err := d.configure(settings); err != nil {
		return nil, err
	}
	// Runtimes need the store to exist before the daemon has ever run.
	return d, os.Symlink(binary, d.Hook())
}

func (d *Daemon) configure(settings string) error {
	// Top-level keys come before tables: settings may hold only keys.
	return writeFile(d.Config(), fmt.Sprintf("root = %q\nrunroot = %q\n%s", filepath.Join(d.dir, "lib"), filepath.Join(d.dir, "run"), settings))
}

// Renew stops the daemon, removes everything that it keeps, and starts it with these
// settings, as on a new node. No runtime refers to anything of it.
func (d *Daemon) Renew(ctx context.Context, settings string) error {
	if err := d.Stop(); err != nil {
		return err
	}
	if err := errors.Join(RemoveAll(filepath.Join(d.dir, "lib")), d.configure(settings)); err != nil {
		return err
	}
	return d.Start(ctx)
}

// PushProfile publishes the profile of an image as soon as there is one.
func (d *Daemon) PushProfile(ctx context.Context, ref string) error {
	for deadline := time.Now().Add(time.Minute); ; {
		_, err := d.CLI(ctx, nil, "profile", "push", ref)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Config is the daemon's configuration file.
func (d *Daemon) Config() string { return filepath.Join(d.dir, "config.toml") }

// Hook is the pull hook.
func (d *Daemon) Hook() string { return filepath.Join(d.dir, "holdfast-pull-hook") }

// Store is the daemon's image store.
func (d *Daemon) Store() string { return filepath.Join(d.dir, "lib", "store") }

// RunRoot is where the daemon's mounts are.
func (d *Daemon) RunRoot() string { return filepath.Join(d.dir, "run") }

// LogFile is what the daemon has printed.
func (d *Daemon) LogFile() string { return filepath.Join(d.dir, "daemon.log") }

// Client talks to the daemon.
func (d *Daemon) Client() *control.Client {
	return control.NewClient(filepath.Join(d.dir, "run", "holdfast.sock"))
}

// Start starts the daemon and waits until it answers.
func (d *Daemon) Start(ctx context.Context) error {
	log, err := logTo(d.LogFile())
	if err != nil {
		return err
	}
	defer log.Close()                                              //nolint:errcheck // the daemon has its own descriptor
	cmd := exec.Command(d.Binary, "serve", "--config", d.Config()) //nolint:noctx // it ends with Stop or Kill
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting daemon: %w", err)
	}
	d.cmd, d.exited = cmd, make(chan error, 1)
	go func() { d.exited <- cmd.Wait() }()
	for {
		if _, err := d.Client().Info(ctx); err == nil {
			return nil
		}
		select {
		case err := <-d.exited:
			d.cmd = nil
			return fmt.Errorf("daemon ended at its start (%w): %s", err, d.logTail())
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (d *Daemon) logTail() string {
	data, err := os.ReadFile(d.LogFile())
	if err != nil {
		return err.Error()
	}
	return tail(string(data))
}

// Stop ends the daemon as systemd would, and waits for it. It does nothing if
// the daemon does not run.
func (d *Daemon) Stop() error {
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stopping daemon: %w", err)
	}
	select {
	case err := <-d.exited:
		d.cmd = nil
		if err != nil {
			return fmt.Errorf("daemon ended: %w: %s", err, d.logTail())
		}
		return nil
	case <-time.After(30 * time.Second):
		err := d.cmd.Process.Kill()
		<-d.exited //nolint:errcheck // it was killed
		d.cmd = nil
		return errors.Join(errors.New("daemon did not end within 30 seconds"), err)
	}
}

// Kill ends the daemon at once.
func (d *Daemon) Kill() error {
	if d.cmd == nil {
		return nil
	}
	err := d.cmd.Process.Kill()
	<-d.exited //nolint:errcheck // it was killed
	d.cmd = nil
	return err
}

// Close stops the daemon and removes everything it keeps.
func (d *Daemon) Close() error { return errors.Join(d.Stop(), RemoveAll(d.dir)) }

// CLI runs a holdfast command against this daemon, and decodes its JSON into v
// if v is not nil.
func (d *Daemon) CLI(ctx context.Context, v any, args ...string) (string, error) {
	if v != nil {
		args = append(args, "--json")
	}
	out, err := run(ctx, nil, d.Binary, append(args, "--config", d.Config())...)
	if err == nil && v != nil {
		if err := json.Unmarshal([]byte(out), v); err != nil {
			return out, fmt.Errorf("holdfast %s: %w in %q", strings.Join(args, " "), err, out)
		}
	}
	return out, err
}

// PrepareAll has an image prepared, and fails unless all its layers are lazy.
func (d *Daemon) PrepareAll(ctx context.Context, ref string) error {
	var res prepare.Result
	if _, err := d.CLI(ctx, &res, "prepare", ref); err != nil {
		return fmt.Errorf("%w\n%s", err, d.logTail())
	}
	if res.Lazy() != len(res.Layers) {
		return fmt.Errorf("not all layers are lazy: %+v", res)
	}
	return nil
}

// layers returns what the devices of an image have done.
func (d *Daemon) layers(ctx context.Context, ref string) ([]LayerStart, error) {
	img, err := d.Client().Image(ctx, ref)
	if err != nil {
		return nil, err
	}
	var all []LayerStart
	for _, l := range img.Layers {
		if l.Device != nil {
			all = append(all, LayerStart{l.Digest, l.Device.Fetched, l.Device.Touched, l.Device.Requests})
		}
	}
	return all, nil
}

// LayerTree is where the daemon mounts the tree of a layer.
func (d *Daemon) LayerTree(layer digest.Digest) string {
	return filepath.Join(d.RunRoot(), "layers", layer.Encoded()[:32], "diff")
}

// RSS is the resident memory of the daemon's processes in bytes: now, and the sum
// of the peaks of those that run.
func (d *Daemon) RSS(ctx context.Context) (now, peak int64, err error) {
	info, err := d.Client().Info(ctx)
	if err != nil {
		return 0, 0, err
	}
	for _, pid := range []int{info.Keeper, info.PID} {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, 0, fmt.Errorf("reading the daemon's memory: %w", err)
		}
		now += field(string(data), "VmRSS")
		peak += field(string(data), "VmHWM")
	}
	return now, peak, nil
}

// field is a number of bytes in /proc/PID/status.
func field(status, name string) int64 {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64) // the kernel's own number
			return kb << 10
		}
	}
	return 0
}

// KillWorker ends the worker at once, and returns its process id. The keeper
// starts the next one.
func (d *Daemon) KillWorker(ctx context.Context) (int, error) {
	pid, err := d.Worker(ctx)
	if err != nil {
		return 0, err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return pid, fmt.Errorf("killing worker %d: %w", pid, err)
	}
	return pid, nil
}

// Worker waits until there is a worker, and returns its process id. It may not
// answer yet.
func (d *Daemon) Worker(ctx context.Context) (int, error) {
	for {
		// proc_pid_task_children(5)
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", d.cmd.Process.Pid))
		if err != nil {
			return 0, err
		}
		for _, list := range lists {
			data, err := os.ReadFile(list)
			if err != nil {
				continue // the thread is gone
			}
			if fields := strings.Fields(string(data)); len(fields) > 0 {
				return strconv.Atoi(fields[0])
			}
		}
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-time.After(time.Millisecond):
		}
	}
}

// Keeper is the process that [Daemon.Start] started.
func (d *Daemon) Keeper() int { return d.cmd.Process.Pid }

// Replace has the worker swapped for one of another program.
func (d *Daemon) Replace(ctx context.Context, binary string) error {
	_, err := run(ctx, nil, binary, "serve", "--replace", "--config", d.Config())
	return err
}
