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

// programs are stand-ins for the programs that are installed: the daemon's refuses a
// configuration with the word refuse in it.
func programs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"holdfast", "holdfast-operator"} {
		script := "#!/bin/sh\nif test \"$1\" = --config && grep -q refuse \"$2\"; then echo \"holdfast: $2: refused\"; exit 1; fi\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const lazy = "  containerRuntimeConfig: {additionalLayerStores: [{path: /var/lib/holdfast/store}]}\n"

func TestDaemon(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	r := n.syncAll(t, want(t, lazy), agent.Applied, "daemon-reload", "enable --now holdfast.service", "restart crio.service")
	if !r.Daemon.Up || !r.Complete() || n.listed(t) != "/var/lib/holdfast/store" || !strings.HasPrefix(state(r, "/var/lib/holdfast/store"), "Served") {
		t.Errorf("%+v, listed %s", r, n.listed(t))
	}
	if target, err := os.Readlink(n.Path("/usr/local/bin/holdfast-pull-hook")); target != "holdfast" {
		t.Error(target, err)
	}
	if !strings.Contains(n.Read(t, render.HookConf), `"/usr/local/bin/holdfast-pull-hook"`) {
		t.Error(n.Read(t, render.HookConf))
	}
	// Settings reach the daemon without CRI-O being restarted.
	n.syncAll(t, want(t, lazy+"  holdfast: {trusted: [quay.io]}\n"), agent.Unchanged, "reload holdfast.service")
	if !strings.Contains(n.Read(t, render.DaemonConf), `trusted = ["quay.io"]`) {
		t.Error(n.Read(t, render.DaemonConf))
	}
	// What it refuses it does not get.
	r = n.syncAll(t, want(t, lazy+"  holdfast: {trusted: [refuse]}\n"), agent.Unchanged)
	if !strings.Contains(r.Daemon.Reason, "/etc/holdfast/config.toml: refused") || strings.Contains(n.Read(t, render.DaemonConf), "refuse") || r.Complete() {
		t.Errorf("%+v\n%s", r, n.Read(t, render.DaemonConf))
	}
	// A new program takes the place of the old one.
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(n.options.Programs, "holdfast"), later, later); err != nil {
		t.Fatal(err)
	}
	n.syncAll(t, want(t, lazy+"  holdfast: {trusted: [quay.io]}\n"), agent.Unchanged, "reload holdfast.service")
	// It dies: runtimes that know of its store go on knowing, and it is started.
	n.Systemd.Kill("holdfast.service")
	n.syncAll(t, want(t, lazy+"  holdfast: {trusted: [quay.io]}\n"), agent.Unchanged, "enable --now holdfast.service")
	// It is not wanted any more.
	n.syncAll(t, images(t), agent.Applied, "restart crio.service", "disable --now holdfast.service")
	if n.listed(t) != "" || n.Read(t, render.HookConf) != "" || n.Read(t, render.DaemonConf) != "" {
		t.Errorf("listed %s", n.listed(t))
	}
}

// syncAll is sync, with all that systemd was asked for.
func (n *node) syncAll(t *testing.T, d agent.Desired, outcome string, calls ...string) *agent.Report {
	t.Helper()
	r, err := n.Sync(t.Context(), d)
	if err != nil || r.Outcome != outcome {
		t.Fatalf("outcome %s (%s), want %s: %v\n%s", r.Outcome, r.Error, outcome, err, n.log)
	}
	if got := n.Systemd.Calls(); !slices.Equal(got, calls) {
		t.Fatalf("calls %q, want %q", got, calls)
	}
	return r
}

// Without the daemon a node does as it always did.
func TestDaemonDoesNotStart(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	n.Write(t, "/mnt/models/x", "")
	d := want(t, "  containerRuntimeConfig: {additionalLayerStores: [{path: /var/lib/holdfast/store}], additionalArtifactStores: [{path: /mnt/models}, {path: /mnt/some, filter: {maxSize: 1}}]}\n  holdfast: {trusted: [refuse]}\n")
	r := n.sync(t, d, agent.Applied, 1)
	if r.Daemon.Up || n.listed(t) != "" || n.Read(t, render.HookConf) != "" || !strings.Contains(state(r, "/var/lib/holdfast/store"), "refused") ||
		!strings.Contains(state(r, "/mnt/some"), "it has a filter") {
		t.Errorf("%+v, listed %s", r, n.listed(t))
	}
	if !strings.Contains(n.Read(t, render.ArtifactsConf), `["/mnt/models"]`) {
		t.Error(n.Read(t, render.ArtifactsConf))
	}
	n.sync(t, d, agent.Unchanged, 0)
}

// Where /usr cannot be written to, programs go elsewhere, and units and hook say so.
func TestReadOnlyUsr(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	readOnly(t, n.Path("/usr"))
	n.startCRIO(t)
	n.sync(t, want(t, lazy), agent.Applied, 1)
	for path, text := range map[string]string{
		render.HookConf: "/opt/holdfast/bin/holdfast-pull-hook", "/etc/systemd/system/holdfast.service": "ExecStart=/opt/holdfast/bin/holdfast serve",
	} {
		if !strings.Contains(n.Read(t, path), text) {
			t.Errorf("%s:\n%s", path, n.Read(t, path))
		}
	}
}

func TestUninstall(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	before := n.Read(t, render.StorageConf)
	n.startCRIO(t)
	object := filepath.Join(t.TempDir(), "crc.yaml")
	if err := os.WriteFile(object, []byte("apiVersion: machineconfiguration.openshift.io/v1\nkind: ContainerRuntimeConfig\nmetadata: {name: test}\nspec:\n"+lazy), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Install(t.Context(), []string{object}); err != nil {
		t.Fatal(err)
	}
	d, err := agent.Source{Files: []string{n.Path(agent.ObjectsDir)}}.Load()
	if err != nil {
		t.Fatal(err)
	}
	n.sync(t, d, agent.Applied, 1)
	// An image in use has a layer of the daemon's: it stays, and no more come.
	layer := n.ImageStore(t, "/var/lib/holdfast/store", "")
	n.Refer(t, layer, "quay.io/app:1")
	if _, err := n.Uninstall(t.Context()); !errors.Is(err, agent.ErrInUse) || !strings.Contains(err.Error(), "quay.io/app:1") {
		t.Fatal(err)
	}
	if n.listed(t) != "/var/lib/holdfast/store" || n.Read(t, render.HookConf) != "" || n.Read(t, "/etc/systemd/system/holdfast.service") == "" {
		t.Errorf("listed %s", n.listed(t))
	}
	if _, err := n.Images(t); err != nil {
		t.Errorf("an image is broken: %v", err)
	}
	n.Write(t, "/var/lib/containers/storage/overlay-images/images.json", "[]")
	if _, err := n.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n.Read(t, render.StorageConf) != before {
		t.Error(n.Read(t, render.StorageConf))
	}
	for _, name := range []string{"/usr/local/bin/holdfast", "/usr/local/bin/holdfast-pull-hook", "/etc/systemd/system/holdfast.service", "/etc/systemd/system/holdfast-agent.service", render.DaemonConf, "/var/lib/holdfast-agent"} {
		if _, err := os.Lstat(n.Path(name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := n.Uninstall(t.Context()); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// The same where CRI-O happens not to run.
func TestUninstallWithoutCRIO(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	before := n.Read(t, render.StorageConf)
	n.sync(t, want(t, lazy), agent.Written, 0)
	layer := n.ImageStore(t, "/var/lib/holdfast/store", "")
	n.Refer(t, layer, "quay.io/app:1")
	if _, err := n.Uninstall(t.Context()); !errors.Is(err, agent.ErrInUse) || n.listed(t) != "/var/lib/holdfast/store" {
		t.Fatalf("%v, listed %s", err, n.listed(t))
	}
	n.Write(t, "/var/lib/containers/storage/overlay-images/images.json", "[]")
	if _, err := n.Uninstall(t.Context()); err != nil || n.Read(t, render.StorageConf) != before {
		t.Fatalf("%v\n%s", err, n.Read(t, render.StorageConf))
	}
	if calls := n.Systemd.Calls(); !slices.Contains(calls, "disable --now holdfast.service") {
		t.Errorf("calls %v", calls)
	}
}

// New programs run after an installation, and the service is told what this agent was.
func TestUpgrade(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	object := filepath.Join(t.TempDir(), "crc.txt")
	if err := os.WriteFile(object, []byte("apiVersion: machineconfiguration.openshift.io/v1\nkind: ContainerRuntimeConfig\nmetadata: {name: test}\nspec:\n"+lazy), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Install(t.Context(), []string{object}); err != nil {
		t.Fatal(err)
	}
	if unit := n.Read(t, "/etc/systemd/system/holdfast-agent.service"); !strings.Contains(unit, "holdfast-operator agent --ready-timeout 5s --file /etc/holdfast") {
		t.Error(unit)
	}
	d, err := agent.Source{Files: []string{n.Path(agent.ObjectsDir)}}.Load()
	if err != nil {
		t.Fatal(err)
	}
	n.sync(t, d, agent.Applied, 1)
	if calls := n.Systemd.Calls(); len(calls) > 0 {
		t.Errorf("calls %v", calls)
	}
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(n.options.Programs, "holdfast"), later, later); err != nil {
		t.Fatal(err)
	}
	if err := n.Install(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	// The service, when it runs again, has the daemon swapped.
	if calls := strings.Join(n.Systemd.Calls(), ", "); calls != "enable holdfast-agent.service, restart holdfast-agent.service" {
		t.Errorf("calls %s", calls)
	}
	n.syncAll(t, d, agent.Unchanged, "reload holdfast.service")
}

// An edit of a file that the node did not have keeps what the vendor has in it.
func TestEditOfVendorsFile(t *testing.T) {
	n := newNode(t)
	n.Write(t, "/usr/share/containers/storage.conf", strings.Replace(n.Read(t, render.StorageConf), "/var/lib/containers/storage", "/data/storage", 1))
	if err := os.Remove(n.Path(render.StorageConf)); err != nil {
		t.Fatal(err)
	}
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	n.Write(t, render.StorageConf, "# edited\n"+n.Read(t, render.StorageConf))
	n.sync(t, images(t, "/mnt/s"), agent.Unchanged, 0)
	n.sync(t, images(t), agent.Applied, 1)
	if text := n.Read(t, render.StorageConf); !strings.HasPrefix(text, "# edited\n") || !strings.Contains(text, "/data/storage") || strings.Contains(text, "/mnt/s") {
		t.Error(text)
	}
}

func TestLocalEdits(t *testing.T) {
	n := newNode(t)
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 50, additionalImageStores: [{path: /mnt/s}]}\n")
	n.sync(t, d, agent.Applied, 1)
	written := n.Read(t, render.StorageConf)
	// A comment, and a store of the administrator's.
	n.Write(t, "/etc/containers/storage.conf", "# edited\n"+strings.Replace(written, `["/mnt/s"`, `["/mnt/s", "/mnt/mine"`, 1))
	n.ImageStore(t, "/mnt/mine", "quay.io/mine:1")
	r := n.sync(t, d, agent.Applied, 1)
	if len(r.Edits) != 1 || r.Edits[0].Path != render.StorageConf {
		t.Errorf("%+v", r.Edits)
	}
	text := n.Read(t, render.StorageConf)
	if !strings.HasPrefix(text, "# edited\n") || !strings.Contains(text, "/mnt/mine") || !strings.Contains(text, "/mnt/s") {
		t.Error(text)
	}
	n.sync(t, d, agent.Unchanged, 0)
	// Our own file.
	n.Write(t, render.PidsLimitConf, "[crio.runtime]\npids_limit = 7\n")
	r = n.sync(t, d, agent.Applied, 0)
	if !strings.Contains(n.Read(t, render.PidsLimitConf), "50") || len(r.Edits) != 2 {
		t.Errorf("%+v", r.Edits)
	}
	kept, err := filepath.Glob(n.Path("/var/lib/holdfast-agent/edited/*"))
	if err != nil || len(kept) != 1 {
		t.Errorf("%v, %v", kept, err)
	}
	// Removed.
	if err := os.Remove(n.Path(render.PidsLimitConf)); err != nil {
		t.Fatal(err)
	}
	n.sync(t, d, agent.Applied, 0)
	// What was edited stays when ours goes.
	n.sync(t, images(t), agent.Applied, 1)
	if text := n.Read(t, render.StorageConf); !strings.HasPrefix(text, "# edited\n") || !strings.Contains(text, "/mnt/mine") || strings.Contains(text, "/mnt/s\"") {
		t.Error(text)
	}
}

// What would take the daemon away is undone: it goes on, as CRI-O goes on with its store.
func TestDaemonStaysIfUndone(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	n.sync(t, want(t, lazy), agent.Applied, 1)
	r, err := n.Sync(t.Context(), want(t, "  containerRuntimeConfig: {defaultRuntime: runc}\n"))
	if err != nil || r.Outcome != agent.RolledBack {
		t.Fatalf("%+v, %v", r, err)
	}
	for _, c := range n.Systemd.Calls() {
		if strings.HasPrefix(c, "disable") {
			t.Error(c, n.listed(t))
		}
	}
}

// Where CRI-O does not run there is nobody to prove that the old files are good: they are
// put back, and the daemon goes, all the same.
func TestUninstallRestoresDaemonConfig(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	mine := "# mine\noffline = false\n"
	n.Write(t, render.DaemonConf, mine)
	n.sync(t, want(t, lazy+"  holdfast: {trusted: [quay.io]}\n"), agent.Written, 0)
	if _, err := n.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := n.Read(t, render.DaemonConf); got != mine {
		t.Error(got)
	}
	if out, _ := n.Systemd.Do("is-active", "holdfast.service"); out == "active\n" {
		t.Error("runs")
	}
}

// What the daemon's configuration becomes while CRI-O does not run is not taken for
// somebody's edit.
func TestDaemonConfWhileUnproved(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.sync(t, want(t, lazy+"  holdfast: {trusted: [a.example]}\n"), agent.Written, 0)
	d := want(t, lazy+"  holdfast: {trusted: [b.example]}\n")
	n.sync(t, d, agent.Unchanged, 0)
	n.startCRIO(t)
	if r := n.sync(t, d, agent.Unchanged, 0); len(r.Edits) > 0 {
		t.Errorf("%+v", r.Edits)
	}
	n.sync(t, want(t, lazy+"  holdfast: {trusted: [c.example]}\n"), agent.Unchanged, 0)
	if strings.Contains(n.Read(t, render.DaemonConf), "b.example") {
		t.Error(n.Read(t, render.DaemonConf))
	}
}

// A daemon that was started on the administrator's configuration as it is goes, too.
func TestDaemonOnOwnConfiguration(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.Write(t, render.DaemonConf, "# mine\n")
	n.startCRIO(t)
	n.sync(t, want(t, lazy), agent.Applied, 1)
	n.sync(t, images(t), agent.Applied, 1)
	if out, _ := n.Systemd.Do("is-active", "holdfast.service"); out == "active\n" {
		t.Error("runs")
	}
	if n.Read(t, render.DaemonConf) != "# mine\n" {
		t.Error(n.Read(t, render.DaemonConf))
	}
}

// Where the agent has installed nothing, uninstall takes no units away.
func TestUninstallLeavesPackages(t *testing.T) {
	n := newNode(t)
	n.Write(t, "/etc/systemd/system/holdfast.service", "mine")
	if _, err := n.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n.Read(t, "/etc/systemd/system/holdfast.service") != "mine" {
		t.Error("gone")
	}
}

// A daemon that takes its time to start does not hold up what else there is to do.
func TestDaemonStartsSlowly(t *testing.T) {
	n := newNode(t, func(o *agent.Options) {
		o.Programs = programs(t)
		// As systemctl, but that a start does not end.
		script := filepath.Join(t.TempDir(), "systemctl")
		text := "#!/bin/sh\ncase \"$*\" in \"enable --now holdfast.service\") exec sleep 60;; is-active*) echo inactive;; esac\n"
		if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		o.Systemctl = []string{script}
	})
	begin := time.Now()
	r, err := n.Sync(t.Context(), want(t, lazy+"  holdfast: {}\n"))
	if err != nil || r.Daemon.Up || r.Daemon.Reason != "the daemon is not up after 10s: `systemctl status holdfast` says why" || time.Since(begin) > 20*time.Second {
		t.Errorf("%+v, %v, after %s", r, err, time.Since(begin))
	}
}
