// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/killtest"
	"github.com/holdfast/holdfast/internal/render"
)

// At a boot the agent is there before CRI-O, and takes out what it would not start with.
func TestBoot(t *testing.T) {
	n := newNode(t)
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	d := images(t, "/mnt/s")
	n.sync(t, d, agent.Written, 0) // CRI-O does not run yet
	files := n.files(t)
	n.sync(t, d, agent.Unchanged, 0)
	if diff := cmp.Diff(files, n.files(t)); diff != "" {
		t.Error(diff)
	}
	n.startCRIO(t)
	n.sync(t, d, agent.Unchanged, 0)

	n.Systemd.Boot()
	n.restartAgent(t)
	n.move(t, "/mnt/s", "/mnt/away")
	n.sync(t, d, agent.Written, 0)
	n.startCRIO(t)
	n.sync(t, d, agent.Unchanged, 0)
	n.move(t, "/mnt/away", "/mnt/s")
	n.sync(t, d, agent.Applied, 1)
}

// Files that were written before CRI-O ran, and with which it fails, are undone.
func TestFailsAtBoot(t *testing.T) {
	n := newNode(t)
	d := want(t, "  containerRuntimeConfig: {defaultRuntime: runc}\n")
	n.sync(t, d, agent.Written, 0)
	if _, code := n.Systemd.Do("start", "crio.service"); code == 0 {
		t.Fatal("CRI-O has started")
	}
	n.Systemd.Calls()
	if r := n.sync(t, d, agent.RolledBack, 1); !strings.Contains(r.Error, "crio.service is failed") {
		t.Errorf("%+v", r)
	}
	if _, err := n.Images(t); err != nil {
		t.Error(err)
	}
	n.sync(t, d, agent.RolledBack, 0)
}

func TestReboot(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n  holdfast: {disruption: Reboot}\n")
	r, err := n.Sync(t.Context(), d)
	if err != nil || r.Outcome != agent.Rebooting {
		t.Fatalf("%+v, %v", r, err)
	}
	if calls := strings.Join(n.Systemd.Calls(), ", "); calls != "enable --now holdfast.service, reboot" {
		t.Errorf("calls %s", calls)
	}
	if r, err := n.Sync(t.Context(), d); err != nil || r.Outcome != agent.Rebooting || len(n.Systemd.Calls()) > 0 {
		t.Errorf("while it goes down: %+v, %v", r, err)
	}
	n.Systemd.Boot()
	forgetBoot(t, n)
	n.startCRIO(t)
	n.sync(t, d, agent.Unchanged, 0)
	if !strings.Contains(n.Read(t, render.PidsLimitConf), "40") {
		t.Error("the change is not there")
	}
}

// forgetBoot has the agent believe that what it remembers was in another boot.
func forgetBoot(t *testing.T, n *node) {
	t.Helper()
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	n.Write(t, "/var/lib/holdfast-agent/state.json", strings.ReplaceAll(n.Read(t, "/var/lib/holdfast-agent/state.json"), strings.TrimSpace(string(id)), "another"))
	if _, code := n.Systemd.Do("enable", "--now", "holdfast.service"); code != 0 {
		t.Fatal("the daemon did not start")
	}
	n.Systemd.Calls()
}

// In an image nothing can be looked at or started: Holdfast's own files are there, foreign stores
// are left to the node.
func TestImageBuild(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Systemctl, o.Offline = nil, true; o.Programs = programs(t) })
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 30, additionalLayerStores: [{path: /var/lib/holdfast/store}], additionalImageStores: [{path: /mnt/nfs}]}\n")
	r := n.sync(t, d, agent.Applied, 0)
	if state(r, "/mnt/nfs") != "Withheld: it is looked at on the node, when it boots" || n.listed(t) != "/var/lib/holdfast/store" {
		t.Errorf("%+v, listed %s", r, n.listed(t))
	}
	if err := n.Install(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"/usr/local/bin/holdfast", "/etc/systemd/system/multi-user.target.wants/holdfast-agent.service",
		"/etc/systemd/system/crio.service.wants/holdfast.service", "/var/lib/holdfast/store/overlay-layers/layers.lock", render.HookConf,
	} {
		if _, err := os.Lstat(n.Path(name)); err != nil {
			t.Error(err)
		}
	}
	// The image boots.
	n.options = n.Options()
	n.restartAgent(t)
	n.ImageStore(t, "/mnt/nfs", "quay.io/s:1")
	if _, code := n.Systemd.Do("enable", "--now", "holdfast.service"); code != 0 {
		t.Fatal("the daemon did not start")
	}
	n.sync(t, d, agent.Written, 0)
	n.startCRIO(t)
	n.sync(t, d, agent.Unchanged, 0)
	if n.listed(t) != "/mnt/nfs /var/lib/holdfast/store" {
		t.Errorf("listed %s", n.listed(t))
	}
}

// What is killed at any step is gone on with, whatever is wanted then: what was there
// is not lost, CRI-O runs, and it is restarted once more at most.
func TestKilledAgent(t *testing.T) {
	spec := func(pids, image string) string {
		return "  containerRuntimeConfig: {pidsLimit: " + pids + ", defaultRuntime: crun, additionalLayerStores: [{path: " + image + "}]}\n"
	}
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		o := (&agenttest.Node{Root: in.Args[0]}).Options()
		return func() error {
			a, err := agent.New(o)
			if err != nil {
				return err
			}
			_, err = a.Sync(t.Context(), want(t, spec("100", "/opt/b")))
			return err
		}
	})
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		n := newNode(t)
		before := n.Read(t, render.StorageConf)
		n.Write(t, "/opt/a/x", "")
		n.Write(t, "/opt/b/x", "")
		n.startCRIO(t)
		n.sync(t, want(t, spec("50", "/opt/a")), agent.Applied, 1)
		kill(t, []string{n.Root})
		n.Systemd.Calls()
		r, err := n.Sync(t.Context(), want(t, spec("100", "/opt/b")))
		if err != nil || r.Outcome != agent.Applied && r.Outcome != agent.Unchanged || r.Restarts > 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		if !strings.Contains(n.Read(t, render.StorageConf), `["/opt/b:ref"]`) || !strings.Contains(n.Read(t, render.PidsLimitConf), "100") {
			t.Error("the change is not there")
		}
		if _, err := n.Images(t); err != nil {
			t.Error(err)
		}
		n.Systemd.Calls()
		n.sync(t, want(t, spec("100", "/opt/b")), agent.Unchanged, 0)
		n.sync(t, images(t), agent.Applied, 1)
		if now := n.Read(t, render.StorageConf); now != before {
			t.Errorf("the administrator's file is\n%s", now)
		}
		for _, dir := range []string{"/etc/crio/crio.conf.d", "/etc/crio", "/etc/containers"} {
			left, err := filepath.Glob(n.Path(dir + "/.*"))
			if err != nil || len(left) > 0 {
				t.Errorf("%v is left, %v", left, err)
			}
		}
	})
}

// A store that died is not listed for a CRI-O that is to start, not even the first time
// that it does not answer.
func TestDeadAtBoot(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.Failures = 3 })
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	d := images(t, "/mnt/s")
	n.startCRIO(t)
	n.sync(t, d, agent.Applied, 1)
	n.Systemd.Boot()
	n.restartAgent(t)
	rename(t, n, "/mnt/s", "/mnt/away")
	n.sync(t, d, agent.Written, 0)
	n.startCRIO(t)
}

// Files that were written long before CRI-O is started are not undone because it takes a
// moment.
func TestSlowBoot(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.ReadyTimeout = 500 * time.Millisecond })
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n")
	n.sync(t, d, agent.Written, 0)
	time.Sleep(600 * time.Millisecond)
	n.Behave(t, agenttest.Behaviour{Delay: 1500_000_000})
	go n.Systemd.Do("start", "crio.service")
	time.Sleep(200 * time.Millisecond)
	r, err := n.Sync(t.Context(), d)
	if err != nil || r.Outcome == agent.RolledBack || r.Outcome == agent.Failed {
		t.Errorf("%+v %v", r, err)
	}
}

// A boot that comes before the old files are back: CRI-O is started on them by systemd,
// which waits for the agent to be ready. The agent must not wait for that.
func TestBootWhileItGoesBack(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n  holdfast: {disruption: Reboot}\n")
	if r, err := n.Sync(t.Context(), d); err != nil || r.Outcome != agent.Rebooting {
		t.Fatal(r, err)
	}
	n.Systemd.Boot()
	forgetBoot(t, n)
	n.Write(t, "/var/lib/holdfast-agent/state.json", strings.Replace(n.Read(t, "/var/lib/holdfast-agent/state.json"), `"rebooting"`, `"going back"`, 1))
	n.sync(t, d, agent.RolledBack, 0)
	if n.Read(t, render.PidsLimitConf) != "" {
		t.Error("there")
	}
	n.startCRIO(t)
	n.sync(t, d, agent.RolledBack, 0)
}

// A reboot that a killed agent has not asked for is asked for by the next one.
func TestKilledBeforeReboot(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n  holdfast: {disruption: Reboot}\n")
	if r, err := n.Sync(t.Context(), d); err != nil || r.Outcome != agent.Rebooting {
		t.Fatal(r, err)
	}
	n.Systemd.Calls()
	n.restartAgent(t) // it was killed before it asked
	if r, err := n.Sync(t.Context(), d); err != nil || r.Outcome != agent.Rebooting {
		t.Fatal(r, err)
	}
	if c := n.Systemd.Calls(); len(c) != 1 {
		t.Error(c)
	}
}

// CRI-O starts neither with new files nor with old ones: it is not left at that, for
// the new ones may have been good.
func TestStartsWithNeither(t *testing.T) {
	n := newNode(t, func(o *agent.Options) { o.ReadyTimeout = time.Second })
	n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	// At the next boot the store is gone, and CRI-O fails for another reason.
	n.Systemd.Boot()
	n.restartAgent(t)
	rename(t, n, "/mnt/s", "/mnt/away")
	n.sync(t, images(t, "/mnt/s"), agent.Written, 0)
	n.Write(t, "/etc/crio/crio.conf", "x")
	n.Systemd.Do("start", "crio.service")
	n.Systemd.Calls()
	n.sync(t, images(t, "/mnt/s"), agent.RolledBack, 1)
	n.sync(t, images(t, "/mnt/s"), agent.RolledBack, 0)
	n.Write(t, "/etc/crio/crio.conf", "")
	time.Sleep(1100 * time.Millisecond)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	if _, err := n.Images(t); err != nil {
		t.Error(err)
	}
}
