// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// published is a node whose daemon has published an image that a client holds.
type published struct {
	*node
	img    testimage.Image
	ref    string
	res    *prepare.Result
	lazy   *client
	normal *client
	image  string
}

func publish(t *testing.T) *published {
	t.Helper()
	n := newNode(t, nodeOptions{settings: "read_timeout = \"5s\"\nstall_timeout = \"5s\"\nfill = \"off\"\n"})
	p := &published{node: n, img: application(t, testimage.EStargz), normal: n.newClient("normal", false), lazy: n.newClient("client", true)}
	p.ref = n.push("app", p.img)
	p.normal.pull(p.ref)
	n.start()
	p.image = p.lazy.pull(p.ref).ID
	p.res = n.prepare(p.ref)
	if p.res.Lazy() != 2 {
		t.Fatalf("not lazy: %+v", p.res)
	}
	return p
}

// reboot does to the directories of the daemon and of clients what a reboot does;
// the daemon does not run afterwards.
func (n *node) reboot(clients ...string) {
	n.t.Helper()
	n.must(n.daemon.Stop())
	n.must(lab.RemoveAll(n.daemon.RunRoot()))
	for _, c := range clients {
		n.must(lab.UnmountBelow(n.path(c)))
		for _, dir := range []string{"run", "tmp"} {
			n.must(os.RemoveAll(n.path(c, dir)))
		}
	}
}

// checkRead reads files of a mounted tree: each is equal to a normal pull's, or
// fails. It returns how many of each there were.
func (p *published) checkRead(dir string, want tree, names ...string) (equal, failed int) {
	p.t.Helper()
	for _, name := range names {
		w, ok := want[name]
		got, err := hash(filepath.Join(dir, name))
		switch {
		case ok && err == nil && got == w.content:
			equal++
		case ok && errors.Is(err, unix.EIO):
			failed++
		default:
			p.t.Errorf("%s: content %s, want %s (%v)", name, got, w.content, err)
		}
	}
	return equal, failed
}

// TestRebootWithoutNetwork starts the daemon with all mounts undone and the
// registry down.
func TestRebootWithoutNetwork(t *testing.T) {
	p := publish(t)
	base := p.res.Layers[0]
	want := p.normalTree()
	local := []string{"usr/bin/python3.11", "usr/bin/perl"}
	if equal, _ := p.checkRead(p.layerTree(base.Digest), want, local...); equal != 2 {
		t.Fatal("files cannot be read before")
	}
	before := p.status(p.ref)
	p.reboot("client")
	if _, err := os.Stat(p.recordDiff(base.ChainID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a layer's path resolves before the daemon has started (%v)", err)
	}
	p.must(p.registry.Close())
	p.start()
	if after := p.status(p.ref); len(after.Layers) != 3 || after.Layers[0].State != "mounted" || after.Layers[1].State != "mounted" {
		t.Fatalf("after a reboot: %+v, before: %+v", after, before)
	}
	if _, err := os.Stat(p.recordDiff(base.ChainID)); err != nil {
		t.Error(err)
	}
	if images := p.lazy.images(); len(images) != 1 {
		t.Errorf("the client has the images %v", images)
	}
	root := p.lazy.mount(p.image, firstID)
	if equal, _ := p.checkRead(root, want, local...); equal != 2 {
		t.Error("what is local cannot be read")
	}
	if _, failed := p.checkRead(root, want, "models/weights.safetensors"); failed != 1 {
		t.Error("what is not local can be read")
	}
	p.checkRead(root, want, "usr/bin/tar", "usr/share/common-licenses/GPL-3", "var/lib/dpkg/status")
	if s := p.status(p.ref); s.Layers[1].Device.LastError == "" {
		t.Error("the failed reads do not show in the status")
	}
}

// recordDiff is where a runtime looks for a layer.
func (p *published) recordDiff(id string) string {
	return filepath.Join(p.daemon.Store(), "overlay", id, "diff")
}

// normalTree is the tree that a container sees after a normal pull.
func (p *published) normalTree() tree {
	p.t.Helper()
	return readTree(p.t, p.normal.mount(p.normal.pull(p.ref).ID, 0))
}

// TestKill starts the daemon after it was killed at work.
func TestKill(t *testing.T) {
	p := publish(t)
	base := p.res.Layers[0]
	want := p.normalTree()
	reading, err := os.Open(filepath.Join(p.layerTree(base.Digest), "usr/bin/perl"))
	p.must(err)
	defer reading.Close() //nolint:errcheck // read only
	p.must(p.daemon.Kill())
	if _, err := io.ReadAll(reading); err == nil {
		t.Log("the file was local already")
	}
	p.start()
	compareTrees(t, want, readTree(t, p.lazy.mount(p.image, 0)), precision(testimage.EStargz), ofContainer)
}

// TestSecondDaemon starts a daemon on the directories of another.
func TestSecondDaemon(t *testing.T) {
	n := newNode(t, nodeOptions{})
	n.start()
	out, err := exec.CommandContext(t.Context(), holdfast, "serve", "--config", n.daemon.Config()).CombinedOutput()
	if err == nil || strings.Count(strings.TrimSpace(string(out)), "\n") != 0 || !strings.Contains(string(out), "another daemon uses") {
		t.Errorf("a second daemon: %v: %s", err, out)
	}
	n.info() // the first is as it was
}

// TestStop stops the daemon while an image is in use: its record stays, and
// nothing is mounted.
func TestStop(t *testing.T) {
	p := publish(t)
	p.stopDaemon()
	data, err := os.ReadFile(filepath.Join(p.daemon.Store(), "overlay-layers", "layers.json"))
	if err != nil || !strings.Contains(string(data), p.res.Layers[1].ChainID) {
		t.Errorf("the record of a layer that is in use: %s (%v)", data, err)
	}
	if images := p.lazy.images(); len(images) != 1 {
		t.Errorf("the client has the images %v", images)
	}
	p.start()
	compareTrees(t, p.normalTree(), readTree(t, p.lazy.mount(p.image, 0)), precision(testimage.EStargz), ofContainer)
}
