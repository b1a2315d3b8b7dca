// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/render"
)

// DaemonStatus is the Holdfast daemon.
type DaemonStatus struct {
	Wanted bool   `json:"wanted"`
	Up     bool   `json:"up"`
	Reason string `json:"reason,omitempty"` // why it is not
	// Version is that of its program, "" if it is not known.
	Version string `json:"version,omitempty"`
}

// provideDaemon installs, configures and starts the daemon, and reports whether
// runtimes may be told of it. Without it they do as they always did.
func (a *Agent) provideDaemon(ctx context.Context, st *state, paths render.Daemon, r *Report, configure func() error) bool {
	r.Daemon.Wanted = true
	err := a.setUpDaemon(ctx, st, paths, configure)
	r.Daemon.Version = a.daemonVersion(ctx, st)
	if err == nil && !a.o.Offline {
		err = a.daemonAnswers(ctx, paths)
	}
	if err != nil {
		r.Daemon.Reason = err.Error()
		a.log.Warn("the daemon is not there", "err", err)
		// Its store is a directory on local disk: who was told of it stays told.
		return st.Daemon
	}
	r.Daemon.Up = !a.o.Offline
	return true
}

func (a *Agent) setUpDaemon(ctx context.Context, st *state, paths render.Daemon, configure func() error) error {
	if err := a.install(ctx, st); err != nil {
		return err
	}
	if err := a.createStore(paths); err != nil {
		return err
	}
	if err := configure(); err != nil {
		return err
	}
	return a.startDaemon(ctx, st)
}

// renderDaemonConfig makes the daemon's configuration what is asked for.
func (a *Agent) renderDaemonConfig(ctx context.Context, st *state, b *bases, spec apiv1.ContainerRuntimeConfigSpec) error {
	files, err := render.Files(spec, b.of, render.Options{Prefix: st.Prefix})
	if err != nil {
		return err
	}
	for _, f := range files {
		if f.Path == render.DaemonConf {
			return a.configureDaemon(ctx, st, b, content(f.Data))
		}
	}
	return nil
}

// configureDaemon writes the daemon's configuration if the daemon says that it is good.
func (a *Agent) configureDaemon(ctx context.Context, st *state, b *bases, c content) error {
	disk, err := a.host.content(render.DaemonConf)
	m, known := b.managed[render.DaemonConf]
	if err != nil || known && disk.equal(&c) {
		return err
	}
	if st.Prefix != "" && !a.o.Offline && !disk.equal(&c) {
		if err := a.checkConfig(ctx, st.Prefix, c); err != nil {
			return err
		}
	}
	if !known {
		m.Base = disk
	}
	m.Written = &c
	st.Files[render.DaemonConf], b.managed[render.DaemonConf] = m, m
	if st.Pending != nil { // it becomes st.Files
		st.Pending.Files[render.DaemonConf] = m
	}
	st.Reload = st.Reload || !disk.equal(&c)
	if err := st.save(a.stateDir); err != nil { // before the file: what it held is not lost
		return err
	}
	if disk.equal(&c) {
		return nil // it goes with the daemon that is ours
	}
	return a.host.write(render.DaemonConf, &c)
}

func (a *Agent) checkConfig(ctx context.Context, prefix string, c content) error {
	trial := filepath.Join(a.stateDir, trialName)
	if err := atomicfile.Write(trial, []byte(c), 0o600); err != nil {
		return fmt.Errorf("trying the daemon's configuration: %w", err)
	}
	defer os.Remove(trial) //nolint:errcheck // the next one replaces it
	name := trial
	if a.runtime.chroot != "" {
		name = filepath.Join(a.o.StateDir, trialName)
	}
	out, err := a.runDaemon(ctx, prefix, "--config", name, "config", "check")
	if err != nil {
		return fmt.Errorf("the daemon refuses its configuration, and keeps the one that it has: %w: %s", err, strings.ReplaceAll(out, name, render.DaemonConf))
	}
	return nil
}

const trialName = "trial.toml"

// runDaemon runs the daemon's program as it was installed, and returns what it says.
func (a *Agent) runDaemon(ctx context.Context, prefix string, args ...string) (string, error) {
	program := filepath.Join(prefix, "bin", daemonName)
	if a.runtime.chroot == "" {
		var err error
		if program, err = a.host.path(program); err != nil {
			return "", err
		}
	}
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // what we have installed
	inRoot(cmd, a.runtime.chroot)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// program is what was found out about a program of the node.
type program struct {
	file    os.FileInfo
	version string
}

// versionPatience is how long a program may take to say its version.
const versionPatience = 5 * time.Second

// daemonVersion is what the daemon's program says of itself. It is asked when it is another.
func (a *Agent) daemonVersion(ctx context.Context, st *state) string {
	name := filepath.Join(st.Prefix, "bin", daemonName)
	if st.Prefix == "" {
		name = a.host.program(daemonName) // a package's
	}
	path, err := a.host.path(name)
	if err != nil || a.o.Offline {
		return ""
	}
	info, err := os.Stat(path)
	if err != nil {
		return ""
	}
	if f := a.asked.file; f != nil && os.SameFile(f, info) && f.Size() == info.Size() && f.ModTime().Equal(info.ModTime()) {
		return a.asked.version
	}
	bounded, cancel := context.WithTimeout(ctx, versionPatience)
	defer cancel()
	out, err := a.runDaemon(bounded, filepath.Dir(filepath.Dir(name)), "version", "--json")
	if ctx.Err() != nil {
		return ""
	}
	var said struct {
		Version string `json:"version"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &said)
	}
	if err != nil {
		a.log.Warn("the daemon does not say its version", "err", err)
	}
	a.asked = program{info, said.Version}
	return said.Version
}

// createStore makes the directories and lists that a runtime needs to start once it
// is told of the store.
func (a *Agent) createStore(paths render.Daemon) error {
	store, err := a.host.path(paths.Store)
	if err == nil {
		err = os.MkdirAll(filepath.Join(store, "overlay", "l"), 0o700)
	}
	if err == nil {
		err = imagestore.CreateLists(store)
	}
	if err != nil {
		return fmt.Errorf("making the image store %s: %w", paths.Store, err)
	}
	return nil
}

func (a *Agent) startDaemon(ctx context.Context, st *state) error {
	if a.runtime.systemctl == nil {
		return a.link(DaemonUnit, "multi-user.target.wants", "crio.service.wants")
	}
	if a.runtime.unitState(ctx, DaemonUnit) == active {
		if !st.Reload {
			return nil
		}
		err := a.runtime.control(ctx, "reload", DaemonUnit) // containers go on reading meanwhile
		st.Reload = err != nil
		return err
	}
	_ = a.runtime.control(ctx, "reset-failed", DaemonUnit)
	st.Reload = false // it starts with what is there
	// systemd goes on with a start that takes longer; stores are not to wait for it.
	bounded, cancel := context.WithTimeout(ctx, daemonPatience)
	defer cancel()
	err := a.runtime.control(bounded, "enable", "--now", DaemonUnit)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("the daemon is not up after %s: `systemctl status holdfast` says why", daemonPatience)
	}
	return err
}

func (a *Agent) daemonAnswers(ctx context.Context, paths render.Daemon) error {
	socket, err := a.host.path(filepath.Join(paths.RunRoot, "holdfast.sock"))
	if err != nil {
		return err
	}
	d := net.Dialer{Timeout: time.Second}
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("the daemon does not answer (`systemctl status holdfast` says why): %w", err)
	}
	return conn.Close()
}

// retireDaemon stops a daemon that is not wanted any more, when no runtime is told of it.
func (a *Agent) retireDaemon(ctx context.Context, st *state, p *plan, r *Report) {
	m, ours := st.Files[render.DaemonConf]
	if r.Daemon.Wanted || !ours || st.Pending != nil || slices.Contains(st.Stores, p.store) {
		return // images in use come from it, or CRI-O could not be told yet
	}
	err := a.runtime.control(ctx, "disable", "--now", DaemonUnit)
	if err == nil {
		err = a.host.write(render.DaemonConf, m.Base)
	}
	if err != nil {
		r.Daemon.Reason = err.Error()
		return
	}
	delete(st.Files, render.DaemonConf)
}
