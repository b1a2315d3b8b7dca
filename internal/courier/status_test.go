// SPDX-License-Identifier: Apache-2.0

package courier_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

func store(kind agent.Kind, path, state, reason string) agent.StoreStatus {
	return agent.StoreStatus{Store: agent.Store{Kind: kind, Path: path}, State: state, Reason: reason}
}

// The object has what the report has, in the words of the API.
func TestStatusOfReport(t *testing.T) {
	inTime(t, func(r *rig) {
		r.start()
		r.agentReports(func(a *agent.Report) {
			a.Applied = "0123"
			a.Stores = []agent.StoreStatus{
				store(agent.LayerStore, "/var/lib/holdfast/store", agent.StoreServed, "by the image store"),
				store(agent.ImageStore, "/mnt/a", agent.StoreListed, ""),
				store(agent.ImageStore, "/mnt/b", agent.StoreWithheld, "it does not exist"),
				store(agent.ImageStore, "/mnt/old", agent.StoreKept, "in use by image quay.io/app:1"),
				store(agent.ArtifactStore, "/mnt/models", agent.StoreFailing, "it does not answer"),
				store("blob", "/mnt/new", "Fermenting", "of a newer agent"),
			}
			a.Daemon = agent.DaemonStatus{Wanted: true, Reason: "it has no disk space", Version: "v1.2.2"}
			a.Runtime = agent.RuntimeStatus{Version: ""}
		})
		s := r.expect(1, nodev1.NodeDone, "rendered-worker-1", "")
		want := nodev1.ContainerRuntimeNodeStatus{
			ObservedGeneration: 1, CurrentConfig: "rendered-worker-1", AppliedHash: "0123", State: nodev1.NodeDone, AgentVersion: "v1.2.3",
			HealthyStores: 2, WithheldStores: 1,
			Daemon: nodev1.Program{Version: "v1.2.2", Reason: "it has no disk space"},
			Stores: []nodev1.Store{
				{Kind: "LayerStore", Path: "/var/lib/holdfast/store", State: nodev1.StoreHealthy, Reason: "by the image store"},
				{Kind: "ImageStore", Path: "/mnt/a", State: nodev1.StoreHealthy},
				{Kind: "ImageStore", Path: "/mnt/b", State: nodev1.StoreWithheld, Reason: "it does not exist"},
				{Kind: "ImageStore", Path: "/mnt/old", State: nodev1.StoreKept, Reason: "in use by image quay.io/app:1"},
				{Kind: "ArtifactStore", Path: "/mnt/models", State: nodev1.StoreFailing, Reason: "it does not answer"},
				{Kind: "blob", Path: "/mnt/new", State: nodev1.StoreFailing, Reason: "of a newer agent"},
			},
		}
		got := *s.DeepCopy()
		got.Conditions = nil
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		for kind, want := range map[string]string{
			nodev1.NodeApplied: "True Applied: ",
			nodev1.NodeStoresAvailable: "False StoresFailing: ArtifactStore /mnt/models: it does not answer; blob /mnt/new: of a newer agent; " +
				"ImageStore /mnt/b: it does not exist",
			nodev1.NodeDaemonAvailable: "False NotRunning: it has no disk space",
		} {
			if got := condition(s, kind); got != want {
				t.Errorf("%s: %s; want %s", kind, got, want)
			}
		}
		r.agentReports(func(a *agent.Report) { a.Daemon = agent.DaemonStatus{Wanted: true, Up: true} })
		s = r.expect(2, nodev1.NodeDone, "rendered-worker-1", "")
		if len(s.Stores) != 0 || s.HealthyStores != 0 || condition(s, nodev1.NodeStoresAvailable) != "True StoresAvailable: " || condition(s, nodev1.NodeDaemonAvailable) != "True Running: " {
			t.Errorf("%+v", s)
		}
		r.agentReports(func(a *agent.Report) {
			a.Stores = []agent.StoreStatus{store(agent.ImageStore, "/mnt/b", agent.StoreWithheld, "it does not exist")}
			a.Problems = []render.Problem{{Reason: render.ReasonConflict, Message: "two want two"}, {Message: "and more"}}
		})
		s = r.expect(3, nodev1.NodeDone, "rendered-worker-1", "")
		for kind, want := range map[string]string{
			nodev1.NodeApplied: "False NotMerged: two want two; and more", nodev1.NodeStoresAvailable: "False StoresWithheld: ImageStore /mnt/b: it does not exist",
			nodev1.NodeDaemonAvailable: "True NotWanted: ",
		} {
			if got := condition(s, kind); got != want {
				t.Errorf("%s: %s; want %s", kind, got, want)
			}
		}
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}

// A condition says since when it has been so, and all conditions what they are about.
func TestTransitions(t *testing.T) {
	inTime(t, func(r *rig) {
		r.start()
		r.agentReports(nil)
		times := func() map[string]time.Time {
			all := map[string]time.Time{}
			o := r.object()
			for _, c := range o.Status.Conditions {
				if c.ObservedGeneration != o.Generation {
					t.Errorf("%s is about %d of %d", c.Type, c.ObservedGeneration, o.Generation)
				}
				all[c.Type] = c.LastTransitionTime.Time
			}
			return all
		}
		before := times()
		if len(before) != 3 {
			t.Fatalf("%v", before)
		}
		r.after(time.Hour)
		down := func(reason string) {
			r.agentReports(func(a *agent.Report) { a.Daemon = agent.DaemonStatus{Wanted: true, Reason: reason} })
		}
		down("why")
		first := times()
		r.after(time.Hour)
		down("another why")
		r.want(func(s *nodev1.ContainerRuntimeNodeSpec) { s.Pool = "other" })
		second := times()
		r.expect(4, nodev1.NodeDone, "rendered-worker-1", "")
		for kind, want := range map[string]bool{nodev1.NodeApplied: false, nodev1.NodeStoresAvailable: false, nodev1.NodeDaemonAvailable: true} {
			if changed := !first[kind].Equal(before[kind]); changed != want || !second[kind].Equal(first[kind]) {
				t.Errorf("%s: %s, then %s, then %s", kind, before[kind], first[kind], second[kind])
			}
		}
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}

// Whatever a report says, the object can hold it, and it is written once.
func TestStatusIsBounded(t *testing.T) {
	const char = "ü€" // of two bytes and of three
	inTime(t, func(r *rig) {
		r.start()
		r.agentReports(func(a *agent.Report) {
			long := strings.Repeat(char, 5000)
			a.Outcome, a.Error, a.Applied = agent.Failed, long+"\xff", long
			a.Runtime.Version, a.Daemon = long, agent.DaemonStatus{Wanted: true, Version: long, Reason: long}
			for i := range 10 {
				a.Stores = append(a.Stores, store(agent.ImageStore, fmt.Sprintf("/%d/%s", i, long), agent.StoreWithheld, long))
			}
		})
		s := r.expect(1, nodev1.NodeDegraded, "", char)
		for what, c := range map[string]struct {
			text string
			most int
		}{
			"message": {s.Message, 4096}, "hash": {s.AppliedHash, 256}, "runtime": {s.Runtime.Version, 256}, "daemon": {s.Daemon.Version, 256},
			"daemon's reason": {s.Daemon.Reason, 1024}, "path": {s.Stores[0].Path, 256}, "reason": {s.Stores[0].Reason, 1024},
		} {
			if n := utf8.RuneCountInString(c.text); n != c.most || !utf8.ValidString(c.text) {
				t.Errorf("%s: %d characters, valid %t", what, n, utf8.ValidString(c.text))
			}
		}
		for _, c := range s.Conditions {
			if n := utf8.RuneCountInString(c.Message); n > 4096 {
				t.Errorf("%s: %d characters", c.Type, n)
			}
		}
		r.writeReport(`{"outcome": "Failed", "desired": "", "error": "\ud800 ` + "\xff" + `"}`)
		r.agentReports(func(a *agent.Report) {
			a.Error = "a \xff b"
			a.Outcome = agent.Failed
			for i := range 100 {
				a.Stores = append(a.Stores, store(agent.ImageStore, fmt.Sprintf("/%d", i), agent.StoreListed, ""))
			}
		})
		s = r.expect(2, nodev1.NodeDegraded, "", "a \uFFFD b")
		if len(s.Stores) != 64 || s.HealthyStores != 64 {
			t.Errorf("%d stores, %d healthy", len(s.Stores), s.HealthyStores)
		}
		r.after(10 * time.Minute)
		r.expectWrites(2)
	}, node("rendered-worker-1"), rendered(t, "rendered-worker-1", objectFile(t, pids(50))))
}
