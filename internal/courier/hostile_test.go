// SPDX-License-Identifier: Apache-2.0

package courier_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

// A MachineConfig that is not one for the node leaves the node as it is, and is named.
func TestHostileMachineConfigs(t *testing.T) {
	object := func(text string) render.File { return render.File{Path: render.ClusterObject, Data: []byte(text)} }
	const head = "apiVersion: machineconfiguration.openshift.io/v1\nkind: ContainerRuntimeConfig\nmetadata: {name: worker}\n"
	raw := func(text string) *apiv1.MachineConfig {
		mc := rendered(t, "rendered-worker-2")
		mc.Spec.Config = runtime.RawExtension{Raw: []byte(text)}
		return mc
	}
	for name, c := range map[string]struct {
		mc   *apiv1.MachineConfig
		want string
	}{
		"there is none":         {nil, "there is no MachineConfig rendered-worker-2"},
		"nothing in it":         {raw("{}"), "MachineConfig rendered-worker-2 has no /etc/holdfast/containerruntimeconfigs/cluster.yaml"},
		"another's files":       {rendered(t, "rendered-worker-2", render.File{Path: "/etc/passwd", Data: []byte("x")}), "it is not one for Holdfast"},
		"another path to it":    {rendered(t, "rendered-worker-2", render.File{Path: "/etc/../etc/holdfast/containerruntimeconfigs/cluster.yaml"}), "it is not one for Holdfast"},
		"no Ignition":           {raw(`{"storage": {"files": 1}}`), "reading MachineConfig rendered-worker-2"},
		"from elsewhere":        {raw(`{"storage": {"files": [{"path": "` + render.ClusterObject + `", "contents": {"source": "https://example.com/"}}]}}`), "MachineConfig rendered-worker-2"},
		"an empty file":         {rendered(t, "rendered-worker-2", object("")), "there is no object in it"},
		"no YAML":               {rendered(t, "rendered-worker-2", object("{")), "MachineConfig rendered-worker-2: cluster.yaml"},
		"another kind":          {rendered(t, "rendered-worker-2", object("kind: Pod\napiVersion: v1\n")), "want ContainerRuntimeConfig"},
		"an unknown field":      {rendered(t, "rendered-worker-2", object(head+"spec: {containerRuntimeConfig: {}, colour: blue}\n")), "unknown field"},
		"not valid":             {rendered(t, "rendered-worker-2", object(head+"spec: {containerRuntimeConfig: {pidsLimit: 7}}\n")), "pidsLimit"},
		"a path that leads out": {rendered(t, "rendered-worker-2", object(head+"spec: {containerRuntimeConfig: {additionalImageStores: [{path: /../x}]}}\n")), "path must not contain"},
		"more than anybody has": {rendered(t, "rendered-worker-2", object(head+"#"+strings.Repeat("x", 2<<20))), "want at most"},
	} {
		t.Run(name, func(t *testing.T) {
			inTime(t, func(r *rig) {
				r.start()
				r.agentReports(nil)
				before := r.file(render.ClusterObject)
				if c.mc != nil {
					r.create(c.mc)
				}
				r.wantConfig("rendered-worker-2")
				s := r.expect(2, nodev1.NodeDegraded, "rendered-worker-1", c.want)
				if !strings.Contains(s.Message, "rendered-worker-2") || !strings.HasPrefix(condition(s, nodev1.NodeApplied), "False Config") {
					t.Errorf("%s, %s", s.Message, condition(s, nodev1.NodeApplied))
				}
				r.after(10 * time.Minute)
				r.expect(2, nodev1.NodeDegraded, "rendered-worker-1", c.want)
				if n := strings.Count(r.fetched.String(), "rendered-worker-2"); n < 5 || n > 60 {
					t.Errorf("asked for it %d times", n)
				}
				if r.file(render.ClusterObject) != before {
					t.Error("the file has changed")
				}
				// It comes, or another is desired.
				if c.mc == nil {
					r.create(rendered(t, "rendered-worker-2", objectFile(t, pids(60))))
					r.after(time.Minute)
					r.agentReports(nil)
					r.expect(3, nodev1.NodeDone, "rendered-worker-2", "")
				}
				r.wantConfig("rendered-worker-1")
				r.agentReports(nil)
				r.expect(int(r.writes.Load()), nodev1.NodeDone, "rendered-worker-1", "")
			}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
		})
	}
}

// Rights that the courier lacks are said, too.
func TestForbidden(t *testing.T) {
	inTime(t, func(r *rig) {
		r.start()
		s := r.expect(1, nodev1.NodeDegraded, "", "reading MachineConfig "+forbidden+": ")
		if got := condition(s, nodev1.NodeApplied); !strings.HasPrefix(got, "False ConfigForbidden: ") {
			t.Error(got)
		}
		r.after(10 * time.Minute)
		r.expectWrites(1)
	}, node(forbidden))
}

// Whatever lies where the file is to go, nothing is written beside it, nor outside of the node.
func TestPathsOnTheNode(t *testing.T) {
	file := objectFile(t, pids(50))
	dir, name := filepath.Dir(render.ClusterObject), filepath.Base(render.ClusterObject)
	link := func(r *rig, to, at string) {
		r.t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(r.path(at)), 0o755), os.Symlink(to, r.path(at))); err != nil {
			r.t.Fatal(err)
		}
	}
	for what, c := range map[string]struct {
		prepare func(r *rig, outside string)
		written bool
	}{
		"a link out of the node":        {func(r *rig, outside string) { link(r, filepath.Join(outside, "file"), render.ClusterObject) }, true},
		"a link to nothing":             {func(r *rig, outside string) { link(r, "none", render.ClusterObject) }, true},
		"a link at the temporary file":  {func(r *rig, outside string) { link(r, filepath.Join(outside, "file"), dir+"/."+name+".tmp") }, true},
		"a directory linked out of it":  {func(r *rig, outside string) { link(r, outside, dir) }, false},
		"a relative link out of it":     {func(r *rig, outside string) { link(r, "../../../"+filepath.Base(outside), dir) }, false},
		"a directory linked inside":     {func(r *rig, outside string) { link(r, "../../var/lib", dir) }, true},
		"a link that is the same":       {func(r *rig, outside string) { sameLink(r, file) }, true},
		"a directory of its name":       {func(r *rig, outside string) { r.mkdir(render.ClusterObject + "/x") }, false},
		"a file of its directory":       {func(r *rig, outside string) { r.writeFile(dir, "") }, false},
		"what a killed one left":        {func(r *rig, outside string) { r.writeFile(dir+"/."+name+".tmp", "half") }, true},
		"another file of the same size": {func(r *rig, outside string) { r.writeFile(render.ClusterObject, strings.Repeat("#", len(file.Data))) }, true},
	} {
		t.Run(what, func(t *testing.T) {
			inTime(t, func(r *rig) {
				outside := filepath.Join(filepath.Dir(r.root), "outside")
				kept := filepath.Join(outside, "file")
				if err := errors.Join(os.Mkdir(outside, 0o755), os.WriteFile(kept, []byte("kept"), 0o600)); err != nil {
					t.Fatal(err)
				}
				c.prepare(r, outside)
				r.start()
				info, err := os.Lstat(r.path(render.ClusterObject))
				if c.written && (err != nil || !info.Mode().IsRegular() || r.file(render.ClusterObject) != string(file.Data)) {
					t.Errorf("%v, %v\n%s", info, err, r.log.String())
				}
				if !c.written {
					s := r.expect(1, nodev1.NodeDegraded, "", "the node's configuration")
					if strings.Contains(s.Message, outside) {
						t.Error(s.Message)
					}
					r.after(10 * time.Minute)
					r.expectWrites(1)
				}
				entries, err := os.ReadDir(outside)
				if data, bad := os.ReadFile(kept); err != nil || len(entries) != 1 || string(data) != "kept" {
					t.Errorf("%v, %q, %v, %v", entries, data, err, bad)
				}
				if left, _ := filepath.Glob(filepath.Join(r.path(dir), ".*")); len(left) != 0 {
					t.Errorf("left: %v", left)
				}
			}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", file))
		})
	}
}

func sameLink(r *rig, file render.File) {
	r.t.Helper()
	r.writeFile("/etc/holdfast/mine.yaml", string(file.Data))
	r.mkdir(render.ObjectsDir)
	if err := os.Symlink("../mine.yaml", r.path(render.ClusterObject)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) mkdir(p string) {
	r.t.Helper()
	if err := os.MkdirAll(r.path(p), 0o755); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) writeFile(p, text string) {
	r.t.Helper()
	r.mkdir(filepath.Dir(p))
	if err := os.WriteFile(r.path(p), []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// Whoever edits the file on the node gets it back as the cluster has it; other files are theirs.
func TestEditedFile(t *testing.T) {
	file := objectFile(t, pids(50))
	inTime(t, func(r *rig) {
		r.start()
		r.agentReports(nil)
		r.writeFile(render.ClusterObject, "kind: Nonsense\n")
		r.after(time.Second)
		if r.file(render.ClusterObject) != string(file.Data) {
			t.Errorf("the node has %q", r.file(render.ClusterObject))
		}
		if err := os.Remove(r.path(render.ClusterObject)); err != nil {
			t.Fatal(err)
		}
		r.after(time.Second)
		if r.file(render.ClusterObject) != string(file.Data) {
			t.Errorf("the node has %q", r.file(render.ClusterObject))
		}
		r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
		local := filepath.Join(render.ObjectsDir, "local.yaml")
		r.writeFile(local, "kind: Nonsense\n")
		r.after(time.Second)
		r.expectWrites(1)
		r.agentReports(func(a *agent.Report) { a.Outcome, a.Error = agent.Failed, "local.yaml: document 1" })
		r.expect(2, nodev1.NodeDegraded, "rendered-worker-1", "local.yaml")
		// One that only the agent can read.
		if err := errors.Join(os.Remove(r.path(local)), os.Symlink("/etc/elsewhere.yaml", r.path(local))); err != nil {
			t.Fatal(err)
		}
		r.after(time.Second)
		r.expect(3, nodev1.NodeDegraded, "rendered-worker-1", "the files in /etc/holdfast/containerruntimeconfigs cannot be read")
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", file))
}

// What is no report counts as none, however it came to be there.
func TestHostileReports(t *testing.T) {
	for what, c := range map[string]func(r *rig){
		"torn":        func(r *rig) { r.writeReport(`{"outcome": "App`) },
		"empty":       func(r *rig) { r.writeReport("") },
		"of a list":   func(r *rig) { r.writeReport("[]") },
		"far too big": func(r *rig) { r.writeReport(`{"outcome": "Applied", "error": "` + strings.Repeat("x", 2<<20) + `"}`) },
		"a pipe": func(r *rig) {
			if err := errors.Join(os.Remove(r.path(reportFile)), unix.Mkfifo(r.path(reportFile), 0o600)); err != nil {
				r.t.Fatal(err)
			}
		},
		"a link out of the node": func(r *rig) {
			other := filepath.Join(r.t.TempDir(), "report")
			data, _ := os.ReadFile(r.path(reportFile))
			if err := errors.Join(os.WriteFile(other, data, 0o600), os.Remove(r.path(reportFile)), os.Symlink(other, r.path(reportFile))); err != nil {
				r.t.Fatal(err)
			}
		},
		"a directory": func(r *rig) {
			if err := os.Remove(r.path(reportFile)); err != nil {
				r.t.Fatal(err)
			}
			r.mkdir(reportFile)
		},
		"gone": func(r *rig) {
			if err := os.Remove(r.path(reportFile)); err != nil {
				r.t.Fatal(err)
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			inTime(t, func(r *rig) {
				r.start()
				r.agentReports(nil)
				c(r)
				r.after(30 * time.Second)
				r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
				r.after(10 * time.Minute)
				s := r.expect(2, nodev1.NodeWorking, "rendered-worker-1", "has not said")
				if s.Runtime.Version != "1.37.0" {
					t.Errorf("what was known has gone: %+v", s)
				}
				if n := strings.Count(r.log.String(), "the agent's report cannot be read"); n > 1 {
					t.Errorf("%d complaints", n)
				}
				if err := os.RemoveAll(r.path(reportFile)); err != nil {
					t.Fatal(err)
				}
				r.agentReports(nil)
				r.expect(3, nodev1.NodeDone, "rendered-worker-1", "")
			}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
		})
	}
}

// A hundred couriers share a process, and a client.
func TestManyNodes(t *testing.T) {
	file := objectFile(t, pids(50))
	var objects []client.Object
	for i := range 100 {
		o := node("rendered-worker-1")
		o.Name = fmt.Sprintf("node-%d", i)
		objects = append(objects, o)
	}
	objects = append(objects, rendered(t, "rendered-worker-1", file))
	inTime(t, func(r *rig) {
		var stops []func()
		for i := range 100 {
			r.startNode(fmt.Sprintf("node-%d", i))
			stops, r.stop = append(stops, r.stop), nil
		}
		r.after(2 * time.Second)
		for i := range 100 {
			if got := r.file(fmt.Sprintf("/nodes/node-%d%s", i, render.ClusterObject)); got != string(file.Data) {
				t.Errorf("node %d has %q", i, got)
			}
		}
		for _, stop := range stops {
			stop()
		}
	}, objects...)
}
