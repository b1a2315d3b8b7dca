// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/render"
)

func TestMain(m *testing.M) {
	agenttest.Main()
	os.Exit(m.Run())
}

// node is a node with an agent.
type node struct {
	*agenttest.Node
	*agent.Agent
	options agent.Options
	log     *strings.Builder
}

func newNode(t *testing.T, change ...func(*agent.Options)) *node {
	t.Helper()
	n := &node{Node: agenttest.New(t), log: &strings.Builder{}}
	n.options = n.Options()
	n.options.Log = slog.New(slog.NewTextHandler(n.log, nil))
	for _, c := range change {
		c(&n.options)
	}
	n.restartAgent(t)
	return n
}

func (n *node) restartAgent(t *testing.T) {
	t.Helper()
	a, err := agent.New(n.options)
	if err != nil {
		t.Fatal(err)
	}
	n.Agent = a
}

// startCRIO starts CRI-O as a boot does.
func (n *node) startCRIO(t *testing.T) {
	t.Helper()
	if out, code := n.Systemd.Do("start", "crio.service"); code != 0 {
		t.Fatalf("%s\n%s", out, n.Read(t, "crio.service.log"))
	}
	n.Systemd.Calls()
}

// want is what a spec, in YAML, asks for.
func want(t *testing.T, spec string) agent.Desired {
	t.Helper()
	objects, err := render.Objects("test", strings.NewReader("apiVersion: machineconfiguration.openshift.io/v1\nkind: ContainerRuntimeConfig\nmetadata: {name: test}\nspec:\n"+spec))
	if err != nil {
		t.Fatal(err)
	}
	merged, problems := render.Merge(objects)
	return agent.Desired{Spec: merged, Problems: problems}
}

func images(t *testing.T, paths ...string) agent.Desired {
	t.Helper()
	if len(paths) == 0 {
		return want(t, "  containerRuntimeConfig: {}\n")
	}
	return want(t, "  containerRuntimeConfig: {additionalImageStores: [{path: "+strings.Join(paths, "}, {path: ")+"}]}\n")
}

// sync applies something and expects an outcome; it returns the report.
func (n *node) sync(t *testing.T, d agent.Desired, outcome string, restarts int) *agent.Report {
	t.Helper()
	r, err := n.Sync(t.Context(), d)
	if err != nil || r.Outcome != outcome {
		t.Fatalf("outcome %s (%s), want %s: %v\n%s\n%s", r.Outcome, r.Error, outcome, err, n.log, n.Read(t, "crio.service.log"))
	}
	got := 0
	for _, c := range n.Systemd.Calls() {
		if c == "restart crio.service" {
			got++
		}
	}
	if got != restarts || r.Restarts != restarts {
		t.Fatalf("%s: CRI-O was restarted %d times (the report says %d), want %d\n%s", outcome, got, r.Restarts, restarts, n.log)
	}
	return r
}

// move renames something of the node, as if it went, or came.
func (n *node) move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(n.Path(from), n.Path(to)); err != nil {
		t.Fatal(err)
	}
}

// listed are the image stores in storage.conf.
func (n *node) listed(t *testing.T) string {
	t.Helper()
	text := n.Read(t, render.StorageConf)
	_, rest, _ := strings.Cut(text, "additionalimagestores = [")
	list, _, _ := strings.Cut(rest, "]")
	return strings.Join(strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune("\", \n", r) }), " ")
}

func state(r *agent.Report, path string) string {
	for _, s := range r.Stores {
		if s.Path == path {
			return s.State + ": " + s.Reason
		}
	}
	return "not there"
}

// files are all files of the node that somebody could have written, with their times.
func (n *node) files(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, dir := range []string{"/etc", "/var/lib/holdfast-agent", "/usr/local"} {
		_ = filepath.Walk(n.Path(dir), func(path string, info os.FileInfo, err error) error {
			if err == nil {
				all[strings.TrimPrefix(path, n.Root)] = fmt.Sprint(info.Size(), info.ModTime())
			}
			return nil
		})
	}
	return all
}

func TestApply(t *testing.T) {
	n := newNode(t)
	before := n.Read(t, render.StorageConf)
	n.ImageStore(t, "/mnt/nfs", "quay.io/from/nfs:1")
	n.startCRIO(t)
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 100, additionalImageStores: [{path: /mnt/nfs}]}\n")
	r := n.sync(t, d, agent.Applied, 1)
	if !r.Runtime.Up || r.Runtime.Version != "1.37.0" || n.listed(t) != "/mnt/nfs" || !strings.Contains(n.Read(t, render.PidsLimitConf), "pids_limit = 100") {
		t.Errorf("%+v, %s", r, n.listed(t))
	}
	if names, err := n.Images(t); err != nil || !slices.Equal(names, []string{"quay.io/from/nfs:1"}) {
		t.Errorf("CRI-O lists %v, %v", names, err)
	}
	// Nothing has changed: nothing is written.
	files := n.files(t)
	n.restartAgent(t)
	for range 2 {
		n.sync(t, d, agent.Unchanged, 0)
	}
	if now := n.files(t); !maps.Equal(files, now) {
		t.Errorf("files were\n%v\nand are\n%v", files, now)
	}
	// Nothing is asked for: all is as it was.
	n.sync(t, images(t), agent.Applied, 1)
	if now := n.Read(t, render.StorageConf); now != before {
		t.Errorf("storage.conf is\n%s", now)
	}
	if _, err := os.Stat(n.Path(render.PidsLimitConf)); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// A change that CRI-O would not notice does not restart it.
func TestRestartOnlyIfNeeded(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	n.Write(t, "/etc/crio/crio.conf.d/99-admin", "[crio.runtime]\npids_limit = 7\n")
	n.Systemd.Do("restart", "crio.service")
	n.Systemd.Calls()
	n.sync(t, images(t), agent.Unchanged, 0)
	// It is in a file that a later one overrides.
	n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 100}\n"), agent.Applied, 0)
	// Mirrors are read again without a restart.
	n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 100}\n  holdfast: {}\n"), agent.Applied, 1)
	if _, err := n.Sync(t.Context(), want(t, "  containerRuntimeConfig: {pidsLimit: 100}\n  holdfast: {registryMirrors: [{source: a.example, mirrors: [b.example]}]}\n")); err != nil {
		t.Fatal(err)
	}
	calls := n.Systemd.Calls()
	if !slices.Contains(calls, "reload crio.service") || slices.Contains(calls, "restart crio.service") {
		t.Errorf("calls %v", calls)
	}
}

// What CRI-O does not start with is undone, said, and not tried again.
func TestRollBack(t *testing.T) {
	for _, c := range []struct {
		name, spec string
		behave     agenttest.Behaviour
		reason     string
	}{
		{"no such runtime", "  containerRuntimeConfig: {defaultRuntime: runc, pidsLimit: 50}\n", agenttest.Behaviour{}, "crio.service has failed"},
		{"never up", "  containerRuntimeConfig: {pidsLimit: 50}\n", agenttest.Behaviour{Never: true}, "crio.service"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			before := n.Read(t, render.StorageConf)
			n.startCRIO(t)
			n.Behave(t, c.behave)
			r, err := n.Sync(t.Context(), want(t, c.spec))
			if err != nil || r.Outcome != agent.RolledBack || !strings.Contains(r.Error, c.reason) || r.Restarts != 2 {
				t.Fatalf("%+v, %v", r, err)
			}
			if n.Read(t, render.StorageConf) != before || n.Read(t, render.PidsLimitConf) != "" {
				t.Error("the old files are not back")
			}
			if c.behave.Never {
				if !strings.Contains(r.Error, "does not start with the old files either") {
					t.Error(r.Error)
				}
				n.Behave(t, agenttest.Behaviour{})
				n.startCRIO(t)
			}
			n.Systemd.Calls()
			if names, err := n.Images(t); err != nil {
				t.Errorf("CRI-O is not up: %v, %v", names, err)
			}
			n.restartAgent(t)
			if r := n.sync(t, want(t, c.spec), agent.RolledBack, 0); !strings.Contains(r.Error, c.reason) {
				t.Errorf("%+v", r)
			}
			// Another configuration is tried.
			n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 60}\n"), agent.Applied, 1)
		})
	}
}

// One that is slow is waited for.
func TestLate(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	n.Behave(t, agenttest.Behaviour{Delay: 1500_000_000})
	n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 50}\n"), agent.Applied, 1)
}

// A store that would keep CRI-O from starting is withheld, and added when it is well.
func TestBadStores(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	n.ImageStore(t, "/mnt/good", "quay.io/good:1")
	n.Write(t, "/mnt/file", "")
	n.Write(t, "/mnt/empty/.keep", "")
	n.ImageStore(t, "/mnt/torn", "quay.io/torn:1")
	n.Write(t, "/mnt/torn/overlay-layers/layers.json", "[{")
	n.ImageStore(t, "/mnt/unlocked", "quay.io/unlocked:1")
	if err := os.Remove(n.Path("/mnt/unlocked/overlay-layers/layers.lock")); err != nil {
		t.Fatal(err)
	}
	readOnly(t, n.Path("/mnt/unlocked"))
	n.ImageStore(t, "/mnt/readonly", "quay.io/readonly:1")
	readOnly(t, n.Path("/mnt/readonly"))
	n.Write(t, "/etc/fstab", "nfs:/x /mnt/absent nfs ro 0 0\n")
	n.ImageStore(t, "/mnt/absent/below", "quay.io/absent:1")
	dead := deaf(t, n.Path("/mnt/dead"))
	dead()
	deaf(t, n.Path("/mnt/hangs"))
	r := n.sync(t, images(t, "/mnt/good", "/mnt/none", "/mnt/file", "/mnt/empty", "/mnt/torn", "/mnt/unlocked", "/mnt/readonly", "/mnt/absent/below", "/mnt/dead", "/mnt/hangs"), agent.Applied, 1)
	for path, reason := range map[string]string{
		"/mnt/good": "Listed: ", "/mnt/readonly": "Listed: ",
		"/mnt/none": "Withheld: it does not exist", "/mnt/file": "Withheld: it is not a directory",
		"/mnt/empty": "Withheld: it is not an image store", "/mnt/torn": "Withheld: overlay-layers/layers.json is not JSON",
		"/mnt/unlocked":     "Withheld: overlay-layers/layers.lock is missing, and the store is read-only",
		"/mnt/absent/below": "Withheld: /mnt/absent is not mounted, which /etc/fstab asks for",
		"/mnt/dead":         "Withheld: its FUSE process is gone", "/mnt/hangs": "Withheld: it does not answer",
	} {
		if got := state(r, path); !strings.HasPrefix(got, reason) {
			t.Errorf("%s is %q, want %q", path, got, reason)
		}
	}
	if n.listed(t) != "/mnt/good /mnt/readonly" {
		t.Errorf("listed %s", n.listed(t))
	}
}

// What the agent withholds is what the runtime would not start with.
func TestWithheldIsWhatFails(t *testing.T) {
	for _, c := range []struct {
		name  string
		make  func(t *testing.T, n *node)
		fatal bool // to the runtime
	}{
		{"none", func(*testing.T, *node) {}, true},
		{"file", func(t *testing.T, n *node) { n.Write(t, "/mnt/s", "") }, true},
		{"dead", func(t *testing.T, n *node) { deaf(t, n.Path("/mnt/s"))() }, true},
		{"read-only without locks", func(t *testing.T, n *node) {
			n.ImageStore(t, "/mnt/s", "quay.io/a:1")
			if err := os.Remove(n.Path("/mnt/s/overlay-layers/layers.lock")); err != nil {
				t.Fatal(err)
			}
			readOnly(t, n.Path("/mnt/s"))
		}, true},
		{"read-only and empty", func(t *testing.T, n *node) {
			n.Write(t, "/mnt/s/.keep", "")
			readOnly(t, n.Path("/mnt/s"))
		}, true},
		{"good", func(t *testing.T, n *node) { n.ImageStore(t, "/mnt/s", "quay.io/a:1") }, false},
		{"read-only", func(t *testing.T, n *node) {
			n.ImageStore(t, "/mnt/s", "quay.io/a:1")
			readOnly(t, n.Path("/mnt/s"))
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			c.make(t, n)
			n.ImageStore(t, "/var/lib/containers/storage", "quay.io/own:1")
			n.startCRIO(t)
			r, err := n.Sync(t.Context(), images(t, "/mnt/s"))
			if err != nil || strings.HasPrefix(state(r, "/mnt/s"), agent.StoreWithheld) != c.fatal {
				t.Fatalf("%+v, %v", r, err)
			}
			n.Systemd.Do("stop", "crio.service")
			files, err := render.Files(images(t, "/mnt/s").Spec, render.BaseDir(n.Root), render.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				n.Write(t, f.Path, string(f.Data))
			}
			// It does not start, or it starts and can list no image.
			out, code := n.Systemd.Do("start", "crio.service")
			names, err := n.Images(t)
			if (code != 0 || err != nil) != c.fatal {
				t.Errorf("with it CRI-O: %d %s, %v, %v\n%s", code, out, names, err, n.Read(t, "crio.service.log"))
			}
		})
	}
}

func readOnly(t *testing.T, dir string) {
	t.Helper()
	if err := errors.Join(unix.Mount(dir, dir, "", unix.MS_BIND, ""), unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// deaf mounts a FUSE file system that never answers; it is dead when kill is called.
func deaf(t *testing.T, dir string) (kill func()) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("deaf", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev.Fd())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = dev.Close() // ends all requests
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return func() { _ = dev.Close() }
}
