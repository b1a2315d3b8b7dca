// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// ErrInUse means that images on the node need what is to be removed.
var ErrInUse = errors.New("images in use come from Holdfast's store")

// Install puts programs and units on the node and has the agent's service started,
// now and at each boot. Files with objects are copied to where that service
// looks for them.
func (a *Agent) Install(ctx context.Context, objects []string) error {
	if err := a.installLocked(ctx); err != nil {
		return err
	}
	dir, err := a.host.path(ObjectsDir)
	if err == nil {
		err = os.MkdirAll(dir, 0o755) //nolint:gosec // there are no secrets in it
	}
	if err != nil {
		return fmt.Errorf("installing: %w", err)
	}
	taken := map[string]string{}
	for _, name := range objects {
		if other := taken[objectName(name)]; other != "" {
			return fmt.Errorf("installing: %s and %s have the same name", other, name)
		}
		taken[objectName(name)] = name
		if _, err := (Source{Files: []string{name}}).Load(); err != nil {
			return err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return fmt.Errorf("installing: %w", err)
		}
		c := content(data)
		if err := a.host.write(filepath.Join(ObjectsDir, objectName(name)), &c); err != nil {
			return err
		}
	}
	return a.enable(ctx)
}

// objectName is a file's name in ObjectsDir, where other names than those of documents are
// not looked at.
func objectName(path string) string {
	name := filepath.Base(path)
	if isObject(name) {
		return name
	}
	return strings.TrimLeft(name, ".") + ".yaml"
}

// installLocked installs while no agent is at work: the service is, when it is started.
func (a *Agent) installLocked(ctx context.Context) error {
	unlock, err := a.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	st, err := loadState(a.stateDir)
	if err != nil {
		return err
	}
	if err := a.install(ctx, st); err != nil {
		return err
	}
	return st.save(a.stateDir)
}

// ObjectsDir is where the agent's service looks for ContainerRuntimeConfigs.
const ObjectsDir = render.ObjectsDir

// enable starts the agent's service, with the programs that were installed. In an image,
// where nothing can be started, it is started at each boot.
func (a *Agent) enable(ctx context.Context) error {
	if a.runtime.systemctl == nil {
		return a.link(AgentUnit, "multi-user.target.wants")
	}
	return errors.Join(a.runtime.control(ctx, "enable", AgentUnit), a.runtime.control(ctx, "restart", AgentUnit))
}

// link makes the links that `systemctl enable` makes.
func (a *Agent) link(unit string, dirs ...string) error {
	for _, dir := range dirs {
		name, err := a.host.entry(filepath.Join(unitDir, dir, unit))
		if err == nil {
			err = os.MkdirAll(filepath.Dir(name), 0o755) //nolint:gosec // as systemctl makes them
		}
		if err == nil {
			if err = os.Symlink(filepath.Join(unitDir, unit), name); errors.Is(err, os.ErrExist) {
				err = nil
			}
		}
		if err != nil {
			return fmt.Errorf("enabling %s: %w", unit, err)
		}
	}
	return nil
}

// Uninstall puts the node's files back to what they were without us, and removes all that
// was installed. As long as images in use come from the daemon's store it only keeps
// more from getting there, and returns an error that wraps [ErrInUse]; it can be run again.
func (a *Agent) Uninstall(ctx context.Context) (*Report, error) {
	a.leaving = true
	// The service would put everything back.
	_ = a.runtime.control(ctx, "disable", "--now", AgentUnit)
	st, err := loadState(a.stateDir)
	if err != nil {
		return nil, err
	}
	r, err := a.Sync(ctx, Desired{Spec: apiv1.ContainerRuntimeConfigSpec{}, Foreign: st.Foreign})
	if err != nil {
		return r, err
	}
	if r.Outcome != Unchanged && r.Outcome != Applied && r.Outcome != Written {
		return r, fmt.Errorf("the old configuration is not back: %s: %s", r.Outcome, r.Error)
	}
	for _, s := range r.Stores {
		if s.State == StoreKept || s.State == StoreWithheld && !a.o.Abandon {
			return r, fmt.Errorf("%w, or from another store that is listed still: %s is %s: remove those images, and run it again", ErrInUse, s.Store, s.Reason)
		}
	}
	if r.Daemon.Reason != "" {
		return r, fmt.Errorf("stopping the daemon: %s", r.Daemon.Reason)
	}
	return r, a.removeInstalled(ctx)
}

func (a *Agent) removeInstalled(ctx context.Context) error {
	st, err := loadState(a.stateDir)
	if err != nil {
		return err
	}
	if st.Prefix != "" {
		program, err := a.host.path(filepath.Join(st.Prefix, "bin", daemonName))
		if err != nil {
			return err
		}
		// In an image there are no layers.
		if _, err := os.Stat(program); err == nil && (a.o.Root == "/" || a.runtime.chroot != "") {
			// It refuses while anything refers to its layers, and knows its directories.
			if out, err := a.runDaemon(ctx, st.Prefix, "uninstall"); err != nil {
				return fmt.Errorf("removing the daemon's directories: %w: %s", err, out)
			}
		}
	}
	var files []string
	for _, link := range []string{"multi-user.target.wants/" + AgentUnit, "multi-user.target.wants/" + DaemonUnit, "crio.service.wants/" + DaemonUnit} {
		files = append(files, filepath.Join(unitDir, link))
	}
	if st.Prefix != "" { // else they are a package's, or the administrator's
		files = append(files, filepath.Join(unitDir, DaemonUnit), filepath.Join(unitDir, AgentUnit), tmpfilesConf)
		for _, name := range []string{hookName, daemonName, operatorName} {
			files = append(files, filepath.Join(st.Prefix, "bin", name))
		}
	}
	for _, f := range slices.Compact(files) {
		if err := a.host.removeFile(f); err != nil {
			return err
		}
	}
	if err := a.runtime.control(ctx, "daemon-reload"); err != nil {
		return err
	}
	for _, name := range []string{stateName, ReportName, "agent.lock"} {
		if err := os.Remove(filepath.Join(a.stateDir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("removing what the agent remembers: %w", err)
		}
	}
	if dir, err := a.host.path(st.Prefix); err == nil && st.Prefix != "" && st.Prefix != prefixes()[0] {
		_, _ = os.Remove(filepath.Join(dir, "bin")), os.Remove(dir) // ours, unless others use them
	}
	_ = os.Remove(a.stateDir) // unless there are edited files in it
	return nil
}
