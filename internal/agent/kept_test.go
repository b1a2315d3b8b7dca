// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

// While what is asked for cannot be had, what there is is looked after: CRI-O could be
// started at any time.
func TestUndoneIsLookedAfter(t *testing.T) {
	n := newNode(t)
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	bad := want(t, "  containerRuntimeConfig: {defaultRuntime: runc, additionalImageStores: [{path: /mnt/s}]}\n")
	n.sync(t, bad, agent.RolledBack, 2)
	n.sync(t, bad, agent.RolledBack, 0)
	n.move(t, "/mnt/s", "/mnt/away")
	// Without the store it is another configuration, which fails as well; not again and again.
	for range 2 {
		if _, err := n.Sync(t.Context(), bad); err != nil {
			t.Fatal(err)
		}
	}
	n.Systemd.Calls()
	if n.listed(t) != "" {
		t.Errorf("a dead store is listed: %s", n.listed(t))
	}
	n.Systemd.Boot()
	n.restartAgent(t)
	if _, err := n.Sync(t.Context(), bad); err != nil {
		t.Fatal(err)
	}
	n.startCRIO(t)
	n.move(t, "/mnt/away", "/mnt/s")
	n.sync(t, bad, agent.RolledBack, 1) // for the store, on what was proved
	if n.listed(t) != "/mnt/s" {
		t.Errorf("listed %s", n.listed(t))
	}
	n.sync(t, bad, agent.RolledBack, 0)
	if _, err := n.Images(t); err != nil {
		t.Error(err)
	}
}

// A file that says nothing is a mistake, or one that is being written; the service keeps the node
// at what it has, and its stores in order.
func TestServiceKeeps(t *testing.T) {
	n := newNode(t)
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	dir := t.TempDir()
	writeObject(t, dir, "a", "  containerRuntimeConfig: {additionalImageStores: [{path: /mnt/s}]}\n")
	<-n.run(t, agent.Source{Files: []string{dir}})
	n.eventually(t, "applied", func() bool { return n.listed(t) == "/mnt/s" })
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.eventually(t, "said", func() bool {
		r, err := agent.LastReport(n.options)
		return err == nil && r.Outcome == agent.Failed && strings.Contains(r.Error, "there is no object in it")
	})
	if n.listed(t) != "/mnt/s" {
		t.Errorf("listed %s", n.listed(t))
	}
	n.move(t, "/mnt/s", "/mnt/away")
	n.eventually(t, "withheld", func() bool { return n.listed(t) == "" })
}

// A configuration file that is a link stays one, and keeps its mode.
func TestLinkedFile(t *testing.T) {
	n := newNode(t)
	text := n.Read(t, render.StorageConf)
	n.Write(t, "/etc/mine/storage.conf", text)
	if err := errors.Join(os.Chmod(n.Path("/etc/mine/storage.conf"), 0o600), os.Remove(n.Path(render.StorageConf)),
		os.Symlink("../mine/storage.conf", n.Path(render.StorageConf))); err != nil {
		t.Fatal(err)
	}
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	info, err := os.Lstat(n.Path(render.StorageConf))
	if err != nil || info.Mode()&os.ModeSymlink == 0 || n.listed(t) != "/mnt/s" {
		t.Errorf("%v, %v, listed %s", info, err, n.listed(t))
	}
	if info, err := os.Stat(n.Path("/etc/mine/storage.conf")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	n.sync(t, images(t), agent.Applied, 1)
	if n.Read(t, "/etc/mine/storage.conf") != text {
		t.Error(n.Read(t, "/etc/mine/storage.conf"))
	}
}

// In an image that has images already, what they need stays.
func TestImageWithImages(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Systemctl, o.Offline = nil, true; o.Programs = programs(t) })
	n.sync(t, want(t, lazy), agent.Applied, 0)
	n.Refer(t, n.ImageStore(t, "/var/lib/holdfast/store", ""), "quay.io/app:1")
	n.sync(t, images(t), agent.Applied, 0)
	if n.listed(t) != "/var/lib/holdfast/store" {
		t.Errorf("listed %s", n.listed(t))
	}
}
