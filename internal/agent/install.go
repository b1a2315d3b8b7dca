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
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/deploy"
	"github.com/holdfast/holdfast/internal/atomicfile"
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

// install puts the daemon's programs and units on the node, if they are not there
// or are others.
func (a *Agent) install(ctx context.Context, st *state) (err error) {
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
		filepath.Join(unitDir, DaemonUnit): deploy.At(st.Prefix, deploy.Service),
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
	err = a.runtime.control(ctx, "daemon-reload")
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
	unit := bytes.Replace(deploy.At(prefix, deploy.AgentService), []byte(" agent --file"), []byte(" agent"+flags.String()+" --file"), 1)
	return bytes.ReplaceAll(unit, []byte(d.Unit), []byte(a.o.Unit))
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
