// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

// An edit of files that CRI-O has not read yet is told from what the agent has written.
func TestEditWhileUnproved(t *testing.T) {
	n := newNode(t)
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.ImageStore(t, "/mnt/t", "quay.io/t:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	n.Systemd.Boot()
	n.sync(t, images(t, "/mnt/s", "/mnt/t"), agent.Written, 0)
	n.Write(t, render.StorageConf, "# mine\n"+n.Read(t, render.StorageConf))
	n.sync(t, images(t, "/mnt/s", "/mnt/t"), agent.Unchanged, 0)
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s", "/mnt/t"), agent.Unchanged, 0)
	n.sync(t, images(t), agent.Applied, 1)
	if n.listed(t) != "" || !strings.HasPrefix(n.Read(t, render.StorageConf), "# mine\n") {
		t.Error(n.Read(t, render.StorageConf))
	}
}

// What an administrator has edited is not lost with a change that is undone.
func TestEditOfWhatIsUndone(t *testing.T) {
	for _, seen := range []bool{true, false} {
		n := newNode(t)
		n.ImageStore(t, "/mnt/s", "quay.io/s:1")
		d := want(t, "  containerRuntimeConfig: {defaultRuntime: runc, additionalImageStores: [{path: /mnt/s}]}\n")
		n.sync(t, d, agent.Written, 0)
		n.Write(t, render.StorageConf, "# mine\n"+n.Read(t, render.StorageConf))
		if seen {
			n.sync(t, d, agent.Unchanged, 0)
			d = want(t, "  containerRuntimeConfig: {pidsLimit: 70, defaultRuntime: runc, additionalImageStores: [{path: /mnt/s}]}\n")
			n.sync(t, d, agent.Written, 0)
		}
		n.Systemd.Do("start", "crio.service")
		n.Systemd.Calls()
		n.sync(t, d, agent.RolledBack, 1)
		kept, err := filepath.Glob(n.Path("/var/lib/holdfast-agent/edited/etc_containers_storage.conf.*"))
		if err != nil || len(kept) != 1 {
			t.Fatalf("seen %t: %v, %v", seen, kept, err)
		}
		if text, err := os.ReadFile(kept[0]); err != nil || !strings.HasPrefix(string(text), "# mine\n") {
			t.Errorf("seen %t: %s, %v", seen, text, err)
		}
	}
}

// On a node whose storage.conf is the vendor's, an edit takes nothing of that away.
func TestEditOfVendorFile(t *testing.T) {
	n := newNode(t)
	n.Write(t, "/usr/share/containers/storage.conf", n.Read(t, render.StorageConf))
	_ = os.Remove(n.Path(render.StorageConf))
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	n.Write(t, render.StorageConf, "# mine\n"+n.Read(t, render.StorageConf))
	n.sync(t, images(t, "/mnt/s"), agent.Unchanged, 0)
	n.sync(t, images(t), agent.Applied, 1)
	if text := n.Read(t, render.StorageConf); !strings.Contains(text, "skip_mount_home") || !strings.Contains(text, "driver") || strings.Contains(text, "/mnt/s") {
		t.Error(text)
	}
}

// An edit that has to stay for now is found once, and written down once.
func TestEditThatHasToStay(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n"), agent.Applied, 1)
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 40, defaultRuntime: runc}\n")
	if r, err := n.SyncAndReport(t.Context(), d); err != nil || r.Outcome != agent.RolledBack {
		t.Fatal(r, err)
	}
	n.Write(t, render.PidsLimitConf, "# mine\n")
	var files map[string]string
	for i := range 3 {
		if r, err := n.SyncAndReport(t.Context(), d); err != nil || r.Outcome != agent.RolledBack || len(r.Edits) != 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		if now := n.files(t); i == 2 && !maps.Equal(files, now) {
			t.Errorf("files were\n%v\nand are\n%v", files, now)
		} else {
			files = now
		}
	}
}
