// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

// An installation over an older one reaches the daemon and the agent that run.
func TestUpgradeByInstall(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	n.sync(t, want(t, lazy), agent.Applied, 1)
	n.Systemd.Calls()
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(n.options.Programs, "holdfast"), later, later); err != nil {
		t.Fatal(err)
	}
	if err := n.Install(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if calls := n.Systemd.Calls(); !slices.Equal(calls, []string{"enable holdfast-agent.service", "restart holdfast-agent.service"}) {
		t.Errorf("calls %q", calls)
	}
	n.syncAll(t, want(t, lazy), agent.Unchanged, "reload holdfast.service")
	n.syncAll(t, want(t, lazy), agent.Unchanged)
}

// An image was built with programs in /usr; where it runs, /usr is read-only: newer ones
// go elsewhere.
func TestUpgradeOnReadOnlyUsr(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	n.sync(t, want(t, lazy), agent.Applied, 1)
	readOnly(t, n.Path("/usr"))
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(n.options.Programs, "holdfast"), later, later); err != nil {
		t.Fatal(err)
	}
	r, err := n.Sync(t.Context(), want(t, lazy))
	if err != nil || !r.Complete() || !strings.Contains(n.Read(t, render.HookConf), "/opt/holdfast/bin/") || !strings.Contains(n.Read(t, "/etc/systemd/system/holdfast.service"), "/opt/holdfast/bin/") {
		t.Errorf("%+v, %v\n%s", r, err, n.Read(t, render.HookConf))
	}
	n.sync(t, want(t, lazy), agent.Unchanged, 0)
}

// Reproducible images have one time for all versions of a program, and its size is often
// the same, too.
func TestUpgradeOfSameSize(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	n.sync(t, want(t, lazy), agent.Applied, 1)
	name := filepath.Join(n.options.Programs, "holdfast")
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	data = append(data[:len(data)-1], ' ')
	if err := errors.Join(os.WriteFile(name, data, 0o755), os.Chtimes(name, info.ModTime(), info.ModTime())); err != nil {
		t.Fatal(err)
	}
	n.restartAgent(t)
	n.sync(t, want(t, lazy), agent.Unchanged, 0)
	if n.Read(t, "/usr/local/bin/holdfast") != string(data) {
		t.Error("the old program is there")
	}
}
