// SPDX-License-Identifier: Apache-2.0

package courier_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/courier"
	"github.com/holdfast/holdfast/internal/render"
)

func TestMain(m *testing.M) {
	agenttest.Main()
	goleak.VerifyTestMain(m)
}

// A configuration goes to the node, what has become of it to the object, and then there is silence.
func TestThereAndBack(t *testing.T) {
	first, second := objectFile(t, pids(50)), objectFile(t, pids(60))
	inTime(t, func(r *rig) {
		r.start()
		if r.file(render.ClusterObject) != string(first.Data) {
			t.Fatalf("the node has %q\n%s", r.file(render.ClusterObject), r.log.String())
		}
		if info, err := os.Stat(r.path(render.ClusterObject)); err != nil || info.Mode() != 0o644 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
		r.after(30 * time.Second)
		r.expect(0, "", "", "") // the agent has not said anything yet
		r.agentReports(nil)
		s := r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
		if s.AgentVersion != "v1.2.3" || s.AppliedHash != "files" || !s.Runtime.Up || s.Runtime.Version != "1.37.0" {
			t.Errorf("%+v", s)
		}
		r.after(time.Hour)
		r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")

		r.wantConfig("rendered-worker-2")
		if r.file(render.ClusterObject) != string(second.Data) || r.writes.Load() != 1 {
			t.Errorf("the node has %q, %d writes", r.file(render.ClusterObject), r.writes.Load())
		}
		r.agentReports(nil)
		r.expect(2, nodev1.NodeDone, "rendered-worker-2", "")

		// Another one with the same configuration: the file is left alone.
		before, _ := os.Stat(r.path(render.ClusterObject))
		r.wantConfig("rendered-worker-3")
		r.expect(3, nodev1.NodeDone, "rendered-worker-3", "")
		if now, err := os.Stat(r.path(render.ClusterObject)); err != nil || !os.SameFile(before, now) {
			t.Error("the file was written again", err)
		}
		if got := r.fetched.String(); got != "rendered-worker-1 rendered-worker-2 rendered-worker-3 " {
			t.Errorf("asked for %s", got)
		}
		// A change of the object that the node need not do anything for.
		r.want(func(s *nodev1.ContainerRuntimeNodeSpec) { s.Pool = "other" })
		r.expect(4, nodev1.NodeDone, "rendered-worker-3", "")
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", first), rendered(t, "rendered-worker-2", second), rendered(t, "rendered-worker-3", second))
}

// A courier that starts again takes up what there is, and writes nothing.
func TestRestart(t *testing.T) {
	inTime(t, func(r *rig) {
		r.start()
		r.agentReports(nil)
		r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
		before, _ := os.Stat(r.path(render.ClusterObject))
		r.start()
		r.after(10 * time.Minute)
		r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
		if now, err := os.Stat(r.path(render.ClusterObject)); err != nil || !os.SameFile(before, now) {
			t.Error("the file was written again", err)
		}
		// The node came to it while there was no courier.
		r.stop()
		r.agentReports(func(a *agent.Report) { a.Outcome, a.Error = agent.Failed, "no space" })
		r.start()
		r.expect(2, nodev1.NodeDegraded, "rendered-worker-1", "no space")
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}

// A node of which nothing is desired yet says that it has an agent.
func TestNothingDesired(t *testing.T) {
	inTime(t, func(r *rig) {
		r.start()
		s := r.expect(1, nodev1.NodeDone, "", "")
		if s.AgentVersion != "v1.2.3" || condition(s, nodev1.NodeStoresAvailable) != "Unknown NoReport: " {
			t.Errorf("%+v", s)
		}
		r.after(10 * time.Minute)
		r.expect(1, nodev1.NodeDone, "", "")
		if entries, err := os.ReadDir(r.path("/etc/holdfast")); err != nil || len(entries) != 0 {
			t.Errorf("%v, %v", entries, err)
		}
		r.agentReports(nil)
		r.expect(2, nodev1.NodeDone, "", "")
		r.wantConfig("rendered-worker-1")
		r.agentReports(nil)
		r.expect(3, nodev1.NodeDone, "rendered-worker-1", "")
		// It stays as it is.
		before := r.file(render.ClusterObject)
		r.wantConfig("")
		r.expect(4, nodev1.NodeDone, "rendered-worker-1", "")
		if r.file(render.ClusterObject) != before {
			t.Error("the file has changed")
		}
	}, node(""), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}

// No settings are a configuration, too: the node goes back to what it had.
func TestEmptyConfiguration(t *testing.T) {
	empty := objectFile(t, apiv1.ContainerRuntimeConfigSpec{})
	inTime(t, func(r *rig) {
		r.start()
		if r.file(render.ClusterObject) != string(empty.Data) {
			t.Errorf("the node has %q\n%s", r.file(render.ClusterObject), r.log.String())
		}
	}, node("rendered-worker-0"), rendered(t, "rendered-worker-0", empty))
}

// What the agent says is what the object says.
func TestOutcomes(t *testing.T) {
	for _, c := range []struct {
		outcome, said string
		state         nodev1.NodeState
		current, want string
		applied       string
	}{
		{agent.Applied, "", nodev1.NodeDone, "rendered-worker-2", "", "True Applied: "},
		{agent.Unchanged, "", nodev1.NodeDone, "rendered-worker-2", "", "True Applied: "},
		{agent.Written, "", nodev1.NodeDone, "rendered-worker-2", "", "True Applied: "},
		{agent.RolledBack, "CRI-O does not start", nodev1.NodeDegraded, "rendered-worker-1", "CRI-O does not start", "False RolledBack: CRI-O does not start"},
		{agent.Failed, "no space", nodev1.NodeDegraded, "rendered-worker-1", "no space", "False Failed: no space"},
		{agent.Waiting, "a store is to answer", nodev1.NodeWorking, "rendered-worker-1", "a store is to answer", "False Waiting: a store is to answer"},
		{agent.Rebooting, "", nodev1.NodeWorking, "rendered-worker-1", "the node is to boot", "False Rebooting: the node is to boot"},
		{"Imploded", "", nodev1.NodeDegraded, "rendered-worker-1", `reports "Imploded"`, "False UnknownOutcome: "},
	} {
		t.Run(c.outcome, func(t *testing.T) {
			inTime(t, func(r *rig) {
				r.start()
				r.agentReports(nil)
				r.wantConfig("rendered-worker-2")
				r.expectWrites(1)
				r.agentReports(func(a *agent.Report) { a.Outcome, a.Error = c.outcome, c.said })
				s := r.expect(2, c.state, c.current, c.want)
				if got := condition(s, nodev1.NodeApplied); !strings.HasPrefix(got, c.applied) {
					t.Errorf("Applied is %s", got)
				}
			}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))), rendered(t, "rendered-worker-2", objectFile(t, pids(60))))
		})
	}
}

func (r *rig) expectWrites(n int) {
	r.t.Helper()
	if int(r.writes.Load()) != n {
		r.t.Fatalf("%d writes, want %d", r.writes.Load(), n)
	}
}

// A report that is about other files says nothing of these. Should none come, that is said, once.
func TestAgentDoesNotAnswer(t *testing.T) {
	inTime(t, func(r *rig) {
		r.agentReports(func(a *agent.Report) { a.Outcome, a.Error = agent.RolledBack, "an older configuration" })
		r.start()
		r.after(50 * time.Second)
		r.expectWrites(0)
		r.after(time.Minute)
		r.expect(1, nodev1.NodeWorking, "", "systemctl status holdfast-agent.service")
		r.after(time.Hour)
		r.expectWrites(1)
		r.agentReports(func(a *agent.Report) { a.Desired, a.Outcome = "", agent.Failed }) // an older agent
		r.expectWrites(1)
		r.agentReports(nil)
		r.expect(2, nodev1.NodeDone, "rendered-worker-1", "")
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}

// A configuration that wants nodes to boot waits for the node to be drained for it.
func TestReboot(t *testing.T) {
	reboot := pids(60)
	reboot.Holdfast = &apiv1.HoldfastConfiguration{Disruption: apiv1.RebootNode}
	file := objectFile(t, reboot)
	inTime(t, func(r *rig) {
		r.start()
		r.agentReports(nil)
		before := r.file(render.ClusterObject)
		r.wantConfig("rendered-worker-2")
		r.expect(2, nodev1.NodeWorking, "rendered-worker-1", "waits until the node is drained")
		r.after(time.Hour)
		r.want(func(s *nodev1.ContainerRuntimeNodeSpec) { s.DrainedFor = "rendered-worker-1" })
		r.expect(3, nodev1.NodeWorking, "rendered-worker-1", "waits until the node is drained")
		if r.file(render.ClusterObject) != before {
			t.Fatal("it was not waited for")
		}
		r.want(func(s *nodev1.ContainerRuntimeNodeSpec) { s.DrainedFor = "rendered-worker-2" })
		if r.file(render.ClusterObject) != string(file.Data) {
			t.Fatal("it is waited for still")
		}
		r.agentReports(func(a *agent.Report) { a.Outcome = agent.Rebooting })
		r.expect(4, nodev1.NodeWorking, "rendered-worker-1", "the node is to boot")
		r.agentReports(nil)
		r.expect(5, nodev1.NodeDone, "rendered-worker-2", "")
		// What is there already is not waited for.
		r.want(func(s *nodev1.ContainerRuntimeNodeSpec) { s.DesiredConfig = "rendered-worker-3" })
		r.expect(6, nodev1.NodeDone, "rendered-worker-3", "")
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))), rendered(t, "rendered-worker-2", file), rendered(t, "rendered-worker-3", file))
}

// Where the Machine Config Operator brings the files there is only a status to report.
func TestObserve(t *testing.T) {
	inTime(t, func(r *rig) {
		r.start(func(o *courier.Options) { o.Observe = true })
		r.expect(1, nodev1.NodeDone, "", "")
		r.agentReports(func(a *agent.Report) {
			a.Stores = []agent.StoreStatus{{Store: agent.Store{Kind: agent.ImageStore, Path: "/mnt/a"}, State: agent.StoreFailing, Reason: "gone"}}
		})
		s := r.expect(2, nodev1.NodeDone, "", "")
		if got := condition(s, nodev1.NodeStoresAvailable); got != "False StoresFailing: ImageStore /mnt/a: gone" || s.HealthyStores+s.WithheldStores != 0 {
			t.Errorf("%s: %+v", got, s)
		}
		r.agentReports(func(a *agent.Report) { a.Outcome, a.Error = agent.Failed, "no space" })
		r.expect(3, nodev1.NodeDegraded, "", "no space")
		if r.fetched.String() != "" || r.file(render.ClusterObject) != "" {
			t.Errorf("it brings %s", r.fetched.String())
		}
	}, node(""))
	inTime(t, func(r *rig) { // not even by mistake
		r.start(func(o *courier.Options) { o.Observe = true })
		r.expect(1, nodev1.NodeDone, "", "")
		if r.fetched.String() != "" || r.file(render.ClusterObject) != "" {
			t.Errorf("it brings %s", r.fetched.String())
		}
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}

// While the API server does not answer the node keeps what it has, and is not asked for by many.
func TestAPIServerAway(t *testing.T) {
	refused := errors.New("connection refused")
	inTime(t, func(r *rig) {
		r.start()
		r.agentReports(nil)
		before := r.file(render.ClusterObject)
		r.fails.Store(&refused)
		r.agentReports(func(a *agent.Report) { a.Outcome, a.Error = agent.Failed, "no space" })
		r.after(time.Hour)
		r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
		if n := strings.Count(r.log.String(), "connection refused"); n < 60 || n > 300 {
			t.Errorf("%d attempts in an hour", n)
		}
		if r.file(render.ClusterObject) != before {
			t.Error("the file has changed")
		}
		r.start() // it does not need it to start
		r.fails.Store(nil)
		r.after(time.Minute)
		r.expect(2, nodev1.NodeDegraded, "rendered-worker-1", "no space")
		// A configuration cannot be had for a while.
		r.fails.Store(&refused)
		r.wantConfig("rendered-worker-2")
		r.after(10 * time.Minute)
		r.expectWrites(2)
		r.fails.Store(nil)
		r.after(time.Minute)
		r.agentReports(nil)
		r.expect(3, nodev1.NodeDone, "rendered-worker-2", "")
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))), rendered(t, "rendered-worker-2", objectFile(t, pids(60))))
}

// An object that goes takes nothing with it.
func TestObjectIsDeleted(t *testing.T) {
	inTime(t, func(r *rig) {
		r.start()
		if !strings.Contains(r.log.String(), "there is no object for the node") || r.writes.Load() != 0 {
			t.Errorf("%d writes\n%s", r.writes.Load(), r.log.String())
		}
		r.create(node("rendered-worker-1"))
		r.after(time.Second)
		r.agentReports(nil)
		r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
		before := r.file(render.ClusterObject)
		if err := r.api.Delete(t.Context(), r.object()); err != nil {
			t.Fatal(err)
		}
		r.agentReports(func(a *agent.Report) { a.Outcome, a.Error = agent.Failed, "no space" })
		r.after(time.Hour)
		if r.file(render.ClusterObject) != before || r.writes.Load() != 1 || strings.Count(r.log.String(), "the node's object has gone") != 1 {
			t.Errorf("%d writes\n%s", r.writes.Load(), r.log.String())
		}
		again := node("rendered-worker-1")
		again.UID = "2"
		r.create(again)
		r.after(time.Second)
		r.expect(2, nodev1.NodeDegraded, "", "no space")
	}, rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}

// Others write the object at the same time: the status is about what it says now.
func TestConflict(t *testing.T) {
	inTime(t, func(r *rig) {
		r.start()
		conflicts := 0
		update := func() {
			if conflicts++; conflicts > 2 {
				return
			}
			o := r.object()
			o.Generation++
			o.Labels = map[string]string{"changed": "yes"}
			if err := r.api.Update(t.Context(), o); err != nil {
				t.Error(err)
			}
		}
		r.update.Store(&update)
		r.agentReports(nil)
		s := r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
		if conflicts != 3 || s.ObservedGeneration != 3 || r.object().Labels["changed"] != "yes" {
			t.Errorf("%d attempts: %+v", conflicts, s)
		}
		if strings.Contains(r.log.String(), "level=WARN") {
			t.Error(r.log.String())
		}
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}

func TestNoNode(t *testing.T) {
	if _, err := courier.New(courier.Options{Root: filepath.Join(t.TempDir(), "none")}); err == nil || !strings.Contains(err.Error(), "there is no node at") {
		t.Error(err)
	}
}
