// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/filelock"
	"github.com/holdfast/holdfast/internal/render"
)

// run starts the agent as a service, and returns what tells when it is ready.
func (n *node) run(t *testing.T, source agent.Source) (ready chan struct{}) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan struct{})
	go func() {
		n.Run(ctx, source, func() { close(ready) })
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return ready
}

func writeObject(t *testing.T, dir, name, spec string) {
	t.Helper()
	text := "apiVersion: machineconfiguration.openshift.io/v1\nkind: ContainerRuntimeConfig\nmetadata: {name: " + name + "}\nspec:\n" + spec
	if err := os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for something that the service does.
func (n *node) eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

// The service follows files, merges them, and says what is wrong with one.
func TestService(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	dir := t.TempDir()
	<-n.run(t, agent.Source{Files: []string{dir}})
	writeObject(t, dir, "a", "  containerRuntimeConfig: {pidsLimit: 50}\n")
	n.eventually(t, "first file", func() bool { return strings.Contains(n.Read(t, render.PidsLimitConf), "50") })
	writeObject(t, dir, "b", "  containerRuntimeConfig: {pidsLimit: 60, logLevel: debug}\n")
	n.eventually(t, "second file", func() bool { return n.Read(t, render.LogLevelConf) != "" })
	report := func() *agent.Report {
		r, err := agent.LastReport(n.options)
		if err != nil {
			return &agent.Report{}
		}
		return r
	}
	n.eventually(t, "conflict", func() bool {
		r := report()
		return len(r.Problems) == 1 && r.Problems[0].Reason == render.ReasonConflict && r.Outcome == agent.Applied
	})
	if !strings.Contains(n.Read(t, render.PidsLimitConf), "50") {
		t.Error("the older object does not count")
	}
	writeObject(t, dir, "c", "  containerRuntimeConfig: {pidsLimit: x}\n")
	n.eventually(t, "bad file", func() bool { r := report(); return r.Outcome == agent.Failed && strings.Contains(r.Error, "c.yaml") })
	if n.Read(t, render.LogLevelConf) == "" {
		t.Error("what was there has gone")
	}
}

// At a boot CRI-O is started when the agent is ready: its stores may take a moment.
func TestServiceAtBoot(t *testing.T) {
	n := newNode(t)
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	d := images(t, "/mnt/s")
	n.sync(t, d, agent.Written, 0)
	n.move(t, "/mnt/s", "/mnt/away")
	dir := t.TempDir()
	writeObject(t, dir, "a", "  containerRuntimeConfig: {additionalImageStores: [{path: /mnt/s}]}\n")
	ready := n.run(t, agent.Source{Files: []string{dir}})
	select {
	case <-ready:
		t.Error("it did not wait for the store")
	case <-time.After(300 * time.Millisecond):
	}
	n.move(t, "/mnt/away", "/mnt/s")
	<-ready
	if n.listed(t) != "/mnt/s" {
		t.Errorf("listed %s", n.listed(t))
	}
}

// A service that finds another agent at work says so to nobody: the other one reports.
func TestServiceBesideAnother(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	dir := t.TempDir()
	writeObject(t, dir, "a", "  containerRuntimeConfig: {pidsLimit: 50}\n")
	d, err := agent.Source{Files: []string{dir}}.Load()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.SyncAndReport(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	before := n.Read(t, "/var/lib/holdfast-agent/report.json")
	f, err := os.OpenFile(n.Path("/var/lib/holdfast-agent/agent.lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := filelock.Try(f); err != nil {
		t.Fatal(err)
	}
	n.restartAgent(t)
	<-n.run(t, agent.Source{Files: []string{dir}})
	time.Sleep(500 * time.Millisecond)
	if now := n.Read(t, "/var/lib/holdfast-agent/report.json"); now != before {
		t.Errorf("the report is %s", now)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// A report says which files it is about, so that who has written one knows whether it was read.
func TestReportIsAboutFiles(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	dir := t.TempDir()
	source := agent.Source{Files: []string{dir}}
	seen := map[string]bool{}
	digest := func() string {
		d, _ := source.Load() //nolint:errcheck // the digest is there all the same
		if d.Digest == "" || seen[d.Digest] {
			t.Errorf("digest %q of other files", d.Digest)
		}
		seen[d.Digest] = true
		return d.Digest
	}
	reports := func(what, outcome string) {
		t.Helper()
		want := digest()
		n.eventually(t, what, func() bool {
			r, err := agent.LastReport(n.options)
			return err == nil && r.Desired == want && r.Outcome == outcome
		})
	}
	<-n.run(t, source)
	reports("no file", agent.Unchanged)
	writeObject(t, dir, "b", "  containerRuntimeConfig: {pidsLimit: 50}\n")
	reports("a file", agent.Applied)
	writeObject(t, dir, "a", "  containerRuntimeConfig: {pidsLimit: x}\n")
	reports("a bad file", agent.Failed)
	writeObject(t, dir, "b", "  containerRuntimeConfig: {pidsLimit: 60}\n")
	reports("another file beside the bad one", agent.Failed)
	if err := os.Remove(filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	reports("without the bad file", agent.Applied)
	// An object without settings: back to what the node had.
	writeObject(t, dir, "b", "  containerRuntimeConfig: {}\n")
	reports("an object without settings", agent.Applied)
	if n.Read(t, render.PidsLimitConf) != "" {
		t.Error("the setting is still there")
	}
}
