// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"os"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/render"
)

// A store that comes costs one restart; one that dies or comes back costs none, and
// CRI-O could be started at any time.
func TestComesAndGoes(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	d := images(t, "/mnt/s", "/mnt/t")
	n.ImageStore(t, "/mnt/t", "quay.io/t:1")
	if r := n.sync(t, d, agent.Applied, 1); state(r, "/mnt/s") != "Withheld: it does not exist" {
		t.Errorf("%+v", r)
	}
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.sync(t, d, agent.Applied, 1)
	if n.listed(t) != "/mnt/s /mnt/t" {
		t.Errorf("listed %s", n.listed(t))
	}
	n.move(t, "/mnt/s", "/mnt/away")
	n.sync(t, d, agent.Applied, 0)
	if n.listed(t) != "/mnt/t" {
		t.Errorf("listed %s", n.listed(t))
	}
	n.sync(t, d, agent.Unchanged, 0)
	n.move(t, "/mnt/away", "/mnt/s")
	n.sync(t, d, agent.Applied, 0)
	if n.listed(t) != "/mnt/s /mnt/t" {
		t.Errorf("listed %s", n.listed(t))
	}
	n.sync(t, d, agent.Unchanged, 0)
	// It dies, and then CRI-O does: it comes up without it, and with it when it is back.
	n.move(t, "/mnt/s", "/mnt/away")
	n.sync(t, d, agent.Applied, 0)
	n.Systemd.Kill("crio.service")
	n.startCRIO(t)
	n.sync(t, d, agent.Unchanged, 0)
	n.move(t, "/mnt/away", "/mnt/s")
	n.sync(t, d, agent.Applied, 1)
}

// One that is busy for a moment stays.
func TestBusyStore(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Failures = 2 })
	n.startCRIO(t)
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	d := images(t, "/mnt/s")
	n.sync(t, d, agent.Applied, 1)
	n.move(t, "/mnt/s", "/mnt/away")
	n.sync(t, d, agent.Unchanged, 0)
	n.sync(t, d, agent.Applied, 0)
	if n.listed(t) != "" {
		t.Errorf("listed %s", n.listed(t))
	}
}

// A store from which images in use come stays, and in its place, until they are gone.
func TestInUse(t *testing.T) {
	n := newNode(t)
	layer := n.ImageStore(t, "/mnt/used", "quay.io/s:1")
	n.ImageStore(t, "/mnt/other", "quay.io/o:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/used", "/mnt/other"), agent.Applied, 1)
	n.Refer(t, layer, "quay.io/app:1")
	r := n.sync(t, images(t, "/mnt/other"), agent.Unchanged, 0)
	if state(r, "/mnt/used") != "Kept: in use by image quay.io/app:1" || n.listed(t) != "/mnt/used /mnt/other" {
		t.Errorf("%+v, listed %s", r, n.listed(t))
	}
	if _, err := n.Images(t); err != nil {
		t.Error(err)
	}
	// It dies: nothing may take it away from the running CRI-O.
	n.move(t, "/mnt/used", "/mnt/away")
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 30, additionalImageStores: [{path: /mnt/used}, {path: /mnt/other}]}\n")
	if r := n.sync(t, d, agent.Waiting, 0); !strings.Contains(r.Error, "image store /mnt/used") {
		t.Errorf("%+v", r)
	}
	n.move(t, "/mnt/away", "/mnt/used")
	n.sync(t, d, agent.Applied, 1)
	n.Write(t, "/var/lib/containers/storage/overlay-images/images.json", "[]")
	n.sync(t, images(t, "/mnt/other"), agent.Applied, 1)
	if n.listed(t) != "/mnt/other" {
		t.Errorf("listed %s", n.listed(t))
	}
}

func TestLayerStores(t *testing.T) {
	n := newNode(t)
	n.Write(t, "/opt/empty/.keep", "")
	if err := os.Remove(n.Path("/opt/empty/.keep")); err != nil {
		t.Fatal(err)
	}
	n.Write(t, "/opt/layers/ref/x", "")
	n.startCRIO(t)
	d := want(t, "  containerRuntimeConfig: {additionalLayerStores: [{path: /opt/empty}, {path: /opt/layers}, {path: /opt/none}]}\n")
	r := n.sync(t, d, agent.Applied, 1)
	if !strings.Contains(state(r, "/opt/empty"), "nothing is mounted there") || state(r, "/opt/layers") != "Listed: " || state(r, "/opt/none") != "Withheld: it does not exist" {
		t.Errorf("%+v", r)
	}
	if !strings.Contains(n.Read(t, render.StorageConf), `additionallayerstores = ["/opt/layers:ref"]`) {
		t.Error(n.Read(t, render.StorageConf))
	}
	// An image has a layer from there.
	n.Write(t, "/var/lib/containers/storage/overlay/abc/additionallayer", "")
	if err := os.Symlink("/opt/layers/ref/x/diff", n.Path("/var/lib/containers/storage/overlay/abc/diff")); err != nil {
		t.Fatal(err)
	}
	if r := n.sync(t, images(t), agent.Unchanged, 0); state(r, "/opt/layers") != "Kept: in use by layer abc" {
		t.Errorf("%+v", r)
	}
}

func TestArtifactStores(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	n.Write(t, "/mnt/models/artifacts/index.json", "{}")
	n.Write(t, "/mnt/torn/artifacts/index.json", "{")
	n.Write(t, "/mnt/ro/artifacts/index.json", "{}")
	readOnly(t, n.Path("/mnt/ro"))
	d := want(t, "  containerRuntimeConfig: {additionalArtifactStores: [{path: /mnt/models}, {path: /mnt/torn}, {path: /mnt/ro}, {path: /mnt/none}]}\n")
	r := n.sync(t, d, agent.Applied, 1)
	for path, want := range map[string]string{
		"/mnt/models": "Listed: ", "/mnt/torn": "Withheld: artifacts/index.json is not JSON",
		"/mnt/ro": "Withheld: CRI-O has to be able to write its lock", "/mnt/none": "Withheld: it does not exist",
	} {
		if got := state(r, path); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s", path, got)
		}
	}
	if !strings.Contains(n.Read(t, render.ArtifactsConf), `additional_artifact_stores = ["/mnt/models"]`) {
		t.Error(n.Read(t, render.ArtifactsConf))
	}
}

// A CRI-O that knows no artifact stores gets none.
func TestOldCRIO(t *testing.T) {
	for version, want1 := range map[string]string{"1.35.4": "Withheld: CRI-O 1.35.4 does not know artifact stores: 1.36 and newer do", "1.36.0": "Listed: ", "2.0.0": "Listed: ", "x": "Listed: "} {
		n := newNode(t)
		n.Behave(t, agenttest.Behaviour{Version: version})
		n.startCRIO(t)
		n.Write(t, "/mnt/models/x", "")
		r, err := n.Sync(t.Context(), want(t, "  containerRuntimeConfig: {additionalArtifactStores: [{path: /mnt/models}]}\n"))
		if err != nil || state(r, "/mnt/models") != want1 {
			t.Errorf("%s: %+v, %v", version, r, err)
		}
	}
}

func rename(t *testing.T, n *node, from, to string) {
	t.Helper()
	n.move(t, from, to)
}

// A store that is only kept since images in use come from it, and dies, is not withdrawn
// under them, and comes back when it answers.
func TestKeptStoreDies(t *testing.T) {
	n := newNode(t)
	layer := n.ImageStore(t, "/mnt/used", "quay.io/s:1")
	n.ImageStore(t, "/mnt/other", "quay.io/o:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/used", "/mnt/other"), agent.Applied, 1)
	n.Refer(t, layer, "quay.io/app:1")
	n.sync(t, images(t, "/mnt/other"), agent.Unchanged, 0)
	rename(t, n, "/mnt/used", "/mnt/away")
	r := n.sync(t, images(t, "/mnt/other"), agent.Applied, 0)
	if got := state(r, "/mnt/used"); got != "Withheld: it is not wanted any more, but images in use may come from it: it does not exist" {
		t.Error(got)
	}
	n.sync(t, images(t, "/mnt/other"), agent.Unchanged, 0)
	n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 30, additionalImageStores: [{path: /mnt/other}]}\n"), agent.Waiting, 0)
	if _, err := n.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "/mnt/used") {
		t.Error(err)
	}
	n.Systemd.Calls()
	rename(t, n, "/mnt/away", "/mnt/used")
	n.sync(t, images(t, "/mnt/other"), agent.Applied, 0)
	if n.listed(t) != "/mnt/used /mnt/other" {
		t.Errorf("listed %s", n.listed(t))
	}
	// Also if CRI-O has started without it meanwhile.
	rename(t, n, "/mnt/used", "/mnt/away")
	n.sync(t, images(t, "/mnt/other"), agent.Applied, 0)
	n.Systemd.Kill("crio.service")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/other"), agent.Unchanged, 0)
	n.restartAgent(t)
	rename(t, n, "/mnt/away", "/mnt/used")
	n.sync(t, images(t, "/mnt/other"), agent.Applied, 1)
	if _, err := n.Images(t); err != nil || n.listed(t) != "/mnt/used /mnt/other" {
		t.Errorf("listed %s, %v", n.listed(t), err)
	}
}

// CRI-O may keep its images elsewhere than storage.conf says.
func TestInUseByCRIOsOwnRoot(t *testing.T) {
	n := newNode(t)
	n.Write(t, "/etc/crio/crio.conf", "[crio]\nroot = \"/data/crio\"\n")
	layer := n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	n.Write(t, "/data/crio/overlay-images/images.json", `[{"id":"0000000000000000000000000000000000000000000000000000000000000001","names":["quay.io/app:1"],"layer":"`+layer+`","created":"2026-01-01T00:00:00Z"}]`)
	n.sync(t, images(t), agent.Unchanged, 0)
}

// Where /mnt leads to /var/mnt, both are names of a mount.
func TestMountBehindLink(t *testing.T) {
	n := newNode(t)
	n.Write(t, "/var/mnt/nfs/.keep", "")
	if err := os.Symlink("var/mnt", n.Path("/mnt")); err != nil {
		t.Fatal(err)
	}
	n.ImageStore(t, "/var/mnt/nfs/s", "quay.io/s:1")
	n.Write(t, "/etc/systemd/system/var-mnt-nfs.mount", "[Mount]\nWhere=/var/mnt/nfs\n")
	n.startCRIO(t)
	r := n.sync(t, images(t, "/mnt/nfs/s"), agent.Unchanged, 0)
	if got := state(r, "/mnt/nfs/s"); got != "Withheld: /var/mnt/nfs is not mounted, which var-mnt-nfs.mount asks for" {
		t.Error(got)
	}
}
