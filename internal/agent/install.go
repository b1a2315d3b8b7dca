// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/deploy"
	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/render"
)

// The units and other files of an installation, and its programs.
const (
	DaemonUnit   = "holdfast.service"
	AgentUnit    = "holdfast-agent.service"
	unitDir      = "/etc/systemd/system"
	tmpfilesConf = "/etc/tmpfiles.d/holdfast.conf"
	daemonName   = "holdfast"
	operatorName = "holdfast-operator"
	hookName     = "holdfast-pull-hook"
)

// daemonPatience is how long the daemon is waited for: less than the agent's own unit has to start.
const daemonPatience = 10 * time.Second

// prefixes are where programs may go: the first that can be written to. On nodes
// whose /usr is read-only /usr/local mostly leads to /var; /opt does on others.
func prefixes() []string { return []string{"/usr/local", "/opt/holdfast", "/var/lib/holdfast-agent"} }

// DaemonStatus is the Holdfast daemon.
type DaemonStatus struct {
	Wanted bool   `json:"wanted"`
	Up     bool   `json:"up"`
	Reason string `json:"reason,omitempty"` // why it is not
}

// provideDaemon installs, configures and starts the daemon, and reports whether
// runtimes may be told of it. Without it they do as they always did.
func (a *Agent) provideDaemon(ctx context.Context, st *state, b *bases, spec apiv1.ContainerRuntimeConfigSpec, paths render.Daemon, r *Report) bool {
	r.Daemon.Wanted = true
	err := a.setUpDaemon(ctx, st, b, spec, paths)
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

func (a *Agent) setUpDaemon(ctx context.Context, st *state, b *bases, spec apiv1.ContainerRuntimeConfigSpec, paths render.Daemon) error {
	if err := a.install(st); err != nil {
		return err
	}
	if err := a.createStore(paths); err != nil {
		return err
	}
	files, err := render.Files(spec, b.of, render.Options{Prefix: st.Prefix})
	if err != nil {
		return err
	}
	for _, f := range files {
		if f.Path == render.DaemonConf {
			if err := a.configureDaemon(ctx, st, b, content(f.Data)); err != nil {
				return err
			}
		}
	}
	return a.startDaemon(ctx, st)
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

// install puts the daemon's programs and units on the node, if they are not there
// or are others.
func (a *Agent) install(st *state) (err error) {
	if a.o.Programs == "" {
		return nil // the node has it, or not
	}
	if st.Prefix == "" {
		if st.Prefix, err = a.choosePrefix(); err != nil {
			return err
		}
	}
	err = a.installPrograms(st)
	if errors.Is(err, unix.EROFS) { // it could be written to when an image was built
		if st.Prefix, err = a.choosePrefix(); err == nil {
			err = a.installPrograms(st)
		}
	}
	if err != nil {
		return err
	}
	hook, err := a.host.entry(filepath.Join(st.Prefix, "bin", hookName))
	if err != nil {
		return err
	}
	if target, err := os.Readlink(hook); err != nil || target != daemonName {
		if err := errors.Join(ignoreMissing(os.Remove(hook)), os.Symlink(daemonName, hook)); err != nil {
			return fmt.Errorf("installing %s: %w", hookName, err)
		}
	}
	units := map[string][]byte{
		filepath.Join(unitDir, DaemonUnit): withPrefix(deploy.Service, st.Prefix),
		filepath.Join(unitDir, AgentUnit):  a.agentUnit(st.Prefix),
		tmpfilesConf:                       deploy.Tmpfiles,
	}
	for path, data := range units {
		c := content(data)
		have, err := a.host.content(path)
		if err == nil && !have.equal(&c) {
			st.Units = true
			if err = st.save(a.stateDir); err == nil { // before: one that is killed has it done by the next
				err = a.host.write(path, &c)
			}
		}
		if err != nil {
			return err
		}
	}
	if !st.Units {
		return nil
	}
	err = a.runtime.control(context.Background(), "daemon-reload")
	st.Units = err != nil
	return err
}

// agentUnit is the unit of the agent, which is told what this one was told about the node.
func (a *Agent) agentUnit(prefix string) []byte {
	var flags strings.Builder
	d := Defaults()
	for _, f := range []struct{ name, value, normal string }{
		{"state-dir", a.o.StateDir, d.StateDir}, {"cri-socket", a.o.Socket, d.Socket}, {"crio-unit", a.o.Unit, d.Unit},
		{"ready-timeout", a.o.ReadyTimeout.String(), d.ReadyTimeout.String()},
	} {
		if f.value != f.normal && !a.o.Live {
			fmt.Fprintf(&flags, " --%s %s", f.name, f.value)
		}
	}
	unit := bytes.Replace(withPrefix(deploy.AgentService, prefix), []byte(" agent --file"), []byte(" agent"+flags.String()+" --file"), 1)
	return bytes.ReplaceAll(unit, []byte(d.Unit), []byte(a.o.Unit))
}

func withPrefix(data []byte, prefix string) []byte {
	return bytes.ReplaceAll(data, []byte("/usr/local"), []byte(prefix))
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (a *Agent) choosePrefix() (string, error) {
	var all error
	for _, prefix := range prefixes() {
		bin, err := a.host.path(filepath.Join(prefix, "bin"))
		if err == nil {
			err = os.MkdirAll(bin, 0o755) //nolint:gosec // for programs
		}
		if err == nil {
			err = unix.Access(bin, unix.W_OK)
		}
		if err == nil {
			return prefix, nil
		}
		all = errors.Join(all, fmt.Errorf("%s: %w", prefix, err))
	}
	return "", fmt.Errorf("installing the daemon: there is no directory that can be written to: %w", all)
}

func (a *Agent) installPrograms(st *state) error {
	for _, name := range []string{daemonName, operatorName} {
		if err := a.installProgram(st, name); err != nil {
			return err
		}
	}
	return nil
}

// installProgram copies a program unless the one that is there has its size and time.
func (a *Agent) installProgram(st *state, name string) error {
	from := filepath.Join(a.o.Programs, name)
	to, err := a.host.path(filepath.Join(st.Prefix, "bin", name))
	if err != nil {
		return err
	}
	src, err := os.Stat(from)
	if err != nil {
		return fmt.Errorf("installing %s: %w", name, err)
	}
	dst, err := os.Stat(to)
	if err == nil && (os.SameFile(src, dst) || dst.Size() == src.Size() && dst.ModTime().Equal(src.ModTime()) && a.sameProgram(from, to)) {
		return nil
	}
	if name == daemonName && !st.Reload {
		st.Reload = true
		if err := st.save(a.stateDir); err != nil { // before: one that is killed goes on with the old
			return err
		}
	}
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("installing %s: %w", name, err)
	}
	defer in.Close() //nolint:errcheck // only read
	err = atomicfile.Create(to, 0o755, func(out *os.File) error {
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
		labelProgram(out)
		return os.Chtimes(out.Name(), src.ModTime(), src.ModTime())
	})
	if err != nil {
		return fmt.Errorf("installing %s: %w", name, err)
	}
	return nil
}

// sameProgram compares programs of one size and time once: images are built with the same times
// for all versions, but what is in one does not change while we run.
func (a *Agent) sameProgram(one, other string) bool {
	if a.compared[other] {
		return true
	}
	was, err1 := hashFile(one)
	is, err2 := hashFile(other)
	a.compared[other] = err1 == nil && err2 == nil && was == is
	return a.compared[other]
}

func hashFile(name string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return sum, err
	}
	defer f.Close() //nolint:errcheck // only read
	h := sha256.New()
	_, err = io.Copy(h, f)
	return [sha256.Size]byte(h.Sum(nil)), err
}

// labelProgram lets systemd start a program below /var on nodes with SELinux, whose
// policy has no such place for programs.
func labelProgram(f *os.File) {
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err == nil {
		_ = unix.Fsetxattr(int(f.Fd()), "security.selinux", []byte("system_u:object_r:bin_t:s0\x00"), 0) //nolint:gosec // a descriptor
	}
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
