// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

// foreign is what an object asks for whose files the Machine Config Operator writes.
func foreign(t *testing.T, spec string) agent.Desired {
	t.Helper()
	dir := t.TempDir()
	d := want(t, spec)
	object, err := render.Object("worker", d.Spec, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cluster.yaml"), object.Data, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err = agent.Source{Files: []string{dir}}.Load()
	if err != nil || !d.Foreign {
		t.Fatalf("%+v, %v", d, err)
	}
	return d
}

// machineConfigOperator writes the files of a configuration, on top of what the pool has.
func (n *node) machineConfigOperator(t *testing.T, d agent.Desired) {
	t.Helper()
	const storage = "[storage]\ndriver = \"overlay\"\n\n[storage.options.overlay]\nskip_mount_home = \"true\"\n"
	files, err := render.Files(d.Spec, func(path string) ([]byte, error) {
		if path == render.StorageConf {
			return []byte(storage), nil
		}
		return render.NoBase(path)
	}, render.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range render.Paths() {
		_ = os.Remove(n.Path(path))
	}
	n.Write(t, render.StorageConf, storage)
	for _, f := range files {
		n.Write(t, f.Path, string(f.Data))
	}
}

// runtimeFiles are what the files of the runtimes and the daemon hold.
func (n *node) runtimeFiles(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, path := range render.Paths() {
		b.WriteString(path + "\n" + n.Read(t, path))
	}
	return b.String()
}

const ofAll = `  containerRuntimeConfig:
    additionalLayerStores: [{path: /var/lib/holdfast/store}]
    additionalImageStores: [{path: /mnt/a}, {path: /mnt/b}]
    additionalArtifactStores: [{path: /mnt/models}]
`

func wantStates(t *testing.T, r *agent.Report, states map[string]string) {
	t.Helper()
	for path, want := range states {
		if got := state(r, path); !strings.HasPrefix(got, want) {
			t.Errorf("%s is %s; want %s", path, got, want)
		}
	}
}

// Where the Machine Config Operator writes the files the agent installs and runs the daemon, and
// says how stores are. Whatever they do, no file changes, and CRI-O goes on.
func TestForeignFiles(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.ImageStore(t, "/mnt/a", "quay.io/a:1")
	n.startCRIO(t)
	d := foreign(t, ofAll)
	// The object is there before the files are.
	before := n.runtimeFiles(t)
	r := n.syncAll(t, d, agent.Unchanged, "daemon-reload", "enable --now holdfast.service")
	if !r.Daemon.Up || n.runtimeFiles(t) != before {
		t.Errorf("%+v\n%s", r, n.runtimeFiles(t))
	}
	wantStates(t, r, map[string]string{"/mnt/a": "Withheld: the Machine Config Operator has not", "/var/lib/holdfast/store": "Withheld: the"})

	n.machineConfigOperator(t, d)
	before = n.runtimeFiles(t)
	r = n.syncAll(t, d, agent.Unchanged, "reload holdfast.service") // its configuration has come
	wantStates(t, r, map[string]string{
		"/mnt/a": "Listed: ", "/mnt/b": "Failing: it does not exist; the Machine Config Operator lists it all the same",
		"/var/lib/holdfast/store": "Served: by the image store", "/mnt/models": "Served: see",
	})
	if r.Complete() {
		t.Error("a store fails, and all is well")
	}
	quiet := n.files(t)
	n.syncAll(t, d, agent.Unchanged)
	if now := n.files(t); !maps.Equal(quiet, now) {
		t.Errorf("something was written:\n%v\nthen\n%v", quiet, now)
	}

	n.move(t, "/mnt/a", "/mnt/gone")
	n.ImageStore(t, "/mnt/b", "quay.io/b:1")
	wantStates(t, n.syncAll(t, d, agent.Unchanged), map[string]string{"/mnt/a": "Failing: ", "/mnt/b": "Listed: "})
	n.move(t, "/mnt/gone", "/mnt/a")
	r = n.syncAll(t, d, agent.Unchanged)
	wantStates(t, r, map[string]string{"/mnt/a": "Listed: "})
	if !r.Complete() {
		t.Errorf("%+v", r)
	}
	n.Systemd.Kill("holdfast.service")
	n.syncAll(t, d, agent.Unchanged, "enable --now holdfast.service")
	n.Systemd.Do("restart", "crio.service")
	n.Systemd.Calls()
	n.syncAll(t, d, agent.Unchanged)
	if n.runtimeFiles(t) != before {
		t.Error("the files are others")
	}
}

// The daemon gets the configuration that the Machine Config Operator writes, unless it refuses it.
func TestForeignDaemonConfig(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	d := foreign(t, lazy)
	n.machineConfigOperator(t, d)
	n.syncAll(t, d, agent.Unchanged, "daemon-reload", "enable --now holdfast.service")
	n.Write(t, render.DaemonConf, "trusted = [\"refuse\"]\n")
	r := n.syncAll(t, d, agent.Unchanged)
	if !strings.Contains(r.Daemon.Reason, "the daemon refuses its configuration") {
		t.Errorf("%+v", r.Daemon)
	}
	n.Write(t, render.DaemonConf, "trusted = [\"quay.io\"]\n")
	n.restartAgent(t)
	n.syncAll(t, d, agent.Unchanged, "reload holdfast.service")
	n.restartAgent(t)
	n.syncAll(t, d, agent.Unchanged)
	if n.Read(t, render.DaemonConf) != "trusted = [\"quay.io\"]\n" {
		t.Error(n.Read(t, render.DaemonConf))
	}
}

// A daemon that is not wanted any more stays for as long as runtimes know of its store, or need it.
func TestForeignDaemonRetires(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	d := foreign(t, lazy)
	n.machineConfigOperator(t, d)
	n.syncAll(t, d, agent.Unchanged, "daemon-reload", "enable --now holdfast.service")
	layer := n.ImageStore(t, "/var/lib/holdfast/store", "")
	n.Refer(t, layer, "quay.io/app:1")
	none := foreign(t, "  containerRuntimeConfig: {}\n")
	wantStates(t, n.syncAll(t, none, agent.Unchanged), map[string]string{"/var/lib/holdfast/store": "Kept: the Machine Config Operator still lists it"})
	if _, err := n.Uninstall(t.Context()); !errors.Is(err, agent.ErrInUse) {
		t.Error(err)
	}
	n.Systemd.Calls()
	n.machineConfigOperator(t, none)
	wantStates(t, n.syncAll(t, none, agent.Unchanged), map[string]string{"/var/lib/holdfast/store": "Kept: in use by image"})
	n.Write(t, "/var/lib/containers/storage/overlay-images/images.json", "[]")
	n.syncAll(t, none, agent.Unchanged, "disable --now holdfast.service")
	n.syncAll(t, none, agent.Unchanged)
	before := n.runtimeFiles(t)
	if _, err := n.Uninstall(t.Context()); err != nil {
		t.Error(err)
	}
	if n.runtimeFiles(t) != before || n.Read(t, "/usr/local/bin/holdfast") != "" {
		t.Error("what is others' has gone, or what is ours has not")
	}
}

// Files that were ours are given up as they are, and taken over as they are.
func TestForeignTakesOver(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.ImageStore(t, "/mnt/a", "quay.io/a:1")
	n.startCRIO(t)
	ours := "  containerRuntimeConfig: {pidsLimit: 50, additionalImageStores: [{path: /mnt/a}]}\n"
	n.sync(t, want(t, ours), agent.Applied, 1)
	before := n.runtimeFiles(t)
	r := n.sync(t, foreign(t, ours), agent.Unchanged, 0)
	wantStates(t, r, map[string]string{"/mnt/a": "Listed: "})
	n.sync(t, foreign(t, "  containerRuntimeConfig: {}\n"), agent.Unchanged, 0)
	if n.runtimeFiles(t) != before || strings.Contains(n.Read(t, "/var/lib/holdfast-agent/state.json"), "pids_limit") {
		t.Errorf("%s\n%s", n.runtimeFiles(t), n.Read(t, "/var/lib/holdfast-agent/state.json"))
	}
	// What others write then stays, whatever was there before.
	others := foreign(t, "  containerRuntimeConfig: {pidsLimit: 70}\n")
	n.machineConfigOperator(t, others)
	before = n.runtimeFiles(t)
	if r := n.sync(t, others, agent.Unchanged, 0); len(r.Edits) != 0 || n.runtimeFiles(t) != before {
		t.Errorf("%+v\n%s", r.Edits, n.runtimeFiles(t))
	}
	n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 80}\n"), agent.Applied, 1)
	if !strings.Contains(n.Read(t, render.PidsLimitConf), "80") {
		t.Error(n.Read(t, render.PidsLimitConf))
	}
	n.sync(t, images(t), agent.Applied, 1)
	if !strings.Contains(n.Read(t, render.PidsLimitConf), "70") {
		t.Errorf("what others had written is not back: %s", n.Read(t, render.PidsLimitConf))
	}
}

// A change that was under way when the files became others' is not gone on with.
func TestForeignDuringChange(t *testing.T) {
	n := newNode(t)
	n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 50}\n"), agent.Written, 0)
	d := foreign(t, "  containerRuntimeConfig: {pidsLimit: 70}\n")
	n.machineConfigOperator(t, d)
	before := n.runtimeFiles(t)
	n.restartAgent(t)
	n.sync(t, d, agent.Unchanged, 0)
	n.startCRIO(t)
	n.sync(t, d, agent.Unchanged, 0)
	if n.runtimeFiles(t) != before {
		t.Error(n.runtimeFiles(t))
	}
}

// A file of the node that is wrong does not make the files ours again.
func TestForeignBesideBadFile(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	dir := t.TempDir()
	object, err := render.Object("worker", want(t, "  containerRuntimeConfig: {pidsLimit: 70}\n").Spec, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cluster.yaml"), object.Data, 0o600); err != nil {
		t.Fatal(err)
	}
	before := n.runtimeFiles(t)
	<-n.run(t, agent.Source{Files: []string{dir}})
	reported := func(outcome string) func() bool {
		return func() bool {
			r, err := agent.LastReport(n.options)
			return err == nil && r.Outcome == outcome
		}
	}
	n.eventually(t, "the object", reported(agent.Unchanged))
	writeObject(t, dir, "bad", "  containerRuntimeConfig: {pidsLimit: x}\n")
	n.eventually(t, "the bad file", reported(agent.Failed))
	time.Sleep(300 * time.Millisecond)
	if n.runtimeFiles(t) != before || len(n.Systemd.Calls()) != 0 {
		t.Error(n.runtimeFiles(t))
	}
}

// Nor does one that is there when they become others'.
func TestForeignTakesOverBesideBadFile(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	dir := t.TempDir()
	writeObject(t, dir, "cluster", "  containerRuntimeConfig: {pidsLimit: 50}\n")
	<-n.run(t, agent.Source{Files: []string{dir}})
	n.eventually(t, "our own file", func() bool { return strings.Contains(n.Read(t, render.PidsLimitConf), "50") })
	others := want(t, "  containerRuntimeConfig: {pidsLimit: 70}\n")
	object, err := render.Object("worker", others.Spec, true)
	if err != nil {
		t.Fatal(err)
	}
	writeObject(t, dir, "bad", "  containerRuntimeConfig: {pidsLimit: x}\n")
	if err := os.WriteFile(filepath.Join(dir, "cluster.yaml"), object.Data, 0o600); err != nil {
		t.Fatal(err)
	}
	n.eventually(t, "others' files", func() bool {
		return strings.Contains(n.Read(t, "/var/lib/holdfast-agent/state.json"), `"foreign": true`)
	})
	n.machineConfigOperator(t, others)
	before := n.runtimeFiles(t)
	n.Systemd.Calls()
	time.Sleep(300 * time.Millisecond)
	writeObject(t, dir, "bad", "  containerRuntimeConfig: {pidsLimit: y}\n") // it looks again
	d, _ := agent.Source{Files: []string{dir}}.Load()                        //nolint:errcheck // there is a digest
	n.eventually(t, "another look", func() bool {
		r, err := agent.LastReport(n.options)
		return err == nil && r.Desired == d.Digest
	})
	if n.runtimeFiles(t) != before || len(n.Systemd.Calls()) != 0 {
		t.Error(n.runtimeFiles(t))
	}
}

// The daemon's version is asked for when its program is another.
func TestDaemonVersion(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Programs = programs(t) })
	n.startCRIO(t)
	install := func(version string) {
		t.Helper()
		script := "#!/bin/sh\nif test \"$1\" = version; then echo asked >>" + n.Path("/asked") + "; echo '{\"version\": \"" + version + "\"}'; fi\n"
		if err := os.WriteFile(filepath.Join(n.options.Programs, "holdfast"), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	install("v1.0.0")
	for range 2 {
		if r, err := n.Sync(t.Context(), want(t, lazy)); err != nil || r.Daemon.Version != "v1.0.0" {
			t.Errorf("%+v, %v", r, err)
		}
	}
	install("v1.10.0")
	if r, err := n.Sync(t.Context(), want(t, lazy)); err != nil || r.Daemon.Version != "v1.10.0" || n.Read(t, "/asked") != "asked\nasked\n" {
		t.Errorf("%+v, %v: %s", r, err, n.Read(t, "/asked"))
	}
}
