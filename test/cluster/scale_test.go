// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// figures are what the benchmark shows: see test/bench, phase cluster. They are written to the file
// that HOLDFAST_FIGURES names.
type figures struct {
	Nodes   int `json:"nodes"`
	Objects int `json:"objects"`
	Batch   int `json:"batch"`
	// Milliseconds from the change of an object until the pool refers to what was made of it,
	// and until the last of the first batch is told; the median and the worst of the rounds.
	Configured      []float64 `json:"configured_ms"`
	FirstBatch      []float64 `json:"first_batch_ms"`
	RolledOut       []float64 `json:"rolled_out_ms"`
	ResyncWrites    int       `json:"resync_writes"`
	RewrittenTwice  []string  `json:"rewritten_twice"`
	ControllerMiB   float64   `json:"controller_mib"` // at its most
	WritesPerChange int       `json:"writes_per_change"`
}

// TestHundredNodes changes one of fifty objects for a pool of a hundred nodes, and counts what is
// written.
func TestHundredNodes(t *testing.T) { testScale(t, 100, 50, 10, 3) }

// TestThousandNodes is about the controller's memory.
func TestThousandNodes(t *testing.T) { testScale(t, 1000, 50, 200, 1) }

func testScale(t *testing.T, nodes, objects, batch, rounds int) {
	c := newCluster(t, "kubernetes")
	var names []string
	for i := range nodes {
		names = append(names, fmt.Sprintf("node-%04d", i))
	}
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for j := i; j < nodes; j += 8 {
				makeNodes(t, c.client, linux, names[j])
			}
		})
	}
	group.Wait()
	var sources []string
	for i := range objects {
		name := fmt.Sprintf("object-%02d", i)
		sources = append(sources, name)
		c.config(t, name, workerLabel, fmt.Sprintf("containerRuntimeConfig: {}\nholdfast: {trusted: [registry-%d.example.com/*], exclude: [example.com/%[1]d/*]}", i))
	}
	c.changePool(t, "worker", maxUnavailable(nodes))
	controller := startController(t, c.server)
	c.updated(t, "worker", sources...)
	c.changePool(t, "worker", maxUnavailable(batch))
	c.allUpdated(t, sources)

	f := figures{Nodes: nodes, Objects: objects, Batch: batch}
	for round := range rounds {
		ledger := newLedger(t, c.client, &apiv1.MachineConfigList{}, &apiv1.MachineConfigPoolList{}, &apiv1.ContainerRuntimeConfigList{}, &holdfastv1.ContainerRuntimeNodeList{})
		// The first batch stays where it is until it has been looked at.
		c.fleet.hold(names...)
		changed := c.watchChange(t)
		start := time.Now()
		c.config(t, "object-07", workerLabel, fmt.Sprintf("containerRuntimeConfig: {additionalImageStores: [{path: /mnt/round-%d}]}", round))
		configured, told := changed(batch)
		f.Configured = append(f.Configured, milliseconds(configured.Sub(start)))
		f.FirstBatch = append(f.FirstBatch, milliseconds(told.Sub(start)))
		config := c.pool(t, "worker").Spec.Configuration.Name
		still(t, fmt.Sprintf("%d nodes are told", batch), func() bool { return len(c.told(t, config)) == batch })
		c.fleet.release(t, names...)
		c.allUpdated(t, sources)
		f.RolledOut = append(f.RolledOut, milliseconds(time.Since(start)))
		time.Sleep(time.Second) // for what should not come
		writes := ledger.since()
		f.WritesPerChange = len(writes)
		f.RewrittenTwice = rewrittenTwice(t, writes)
	}
	if len(f.RewrittenTwice) > 0 {
		t.Errorf("written more than once for a change: %v", f.RewrittenTwice)
	}
	f.ControllerMiB = peakMemory(t, controller.cmd.Process.Pid)
	if f.ResyncWrites = c.resync(t, controller); f.ResyncWrites > 0 {
		t.Errorf("a resync without a change wrote %d objects", f.ResyncWrites)
	}
	if f.ControllerMiB > 100 {
		t.Errorf("the controller took %.0f MiB", f.ControllerMiB)
	}
	text, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(string(text))
	if name := os.Getenv("HOLDFAST_FIGURES"); name != "" {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// allUpdated waits until all nodes have what objects say, and all objects say so.
func (c *cluster) allUpdated(t testing.TB, sources []string) {
	t.Helper()
	c.updated(t, "worker", sources...)
	c.eventually(t, "all objects say that nodes have them", func(ctx context.Context) error {
		var all apiv1.ContainerRuntimeConfigList
		if err := c.client.List(ctx, &all); err != nil {
			return err
		}
		for _, o := range all.Items {
			if len(o.Status.Conditions) == 0 || o.Status.Conditions[0].Status != "True" || o.Status.ObservedGeneration != o.Generation {
				return fmt.Errorf("%s: %+v", o.Name, o.Status)
			}
		}
		return nil
	})
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// watchChange follows what is written from now on. What it returns waits until the pool refers to
// another configuration, and a number of nodes has been told, and says when.
func (c *cluster) watchChange(t testing.TB) func(nodes int) (configured, told time.Time) {
	t.Helper()
	before := c.pool(t, "worker").Spec.Configuration.Name
	pools, err := c.client.Watch(t.Context(), &apiv1.MachineConfigPoolList{})
	if err != nil {
		t.Fatal(err)
	}
	states, err := c.client.Watch(t.Context(), &holdfastv1.ContainerRuntimeNodeList{})
	if err != nil {
		t.Fatal(err)
	}
	return func(nodes int) (configured, told time.Time) {
		defer pools.Stop()
		defer states.Stop()
		end, now := time.After(patience), ""
		seen := map[string]string{}
		for {
			select {
			case e := <-pools.ResultChan():
				if p, ok := e.Object.(*apiv1.MachineConfigPool); ok && p.Name == "worker" && now == "" && p.Spec.Configuration.Name != before {
					configured, now = time.Now(), p.Spec.Configuration.Name
				}
			case e := <-states.ResultChan():
				if s, ok := e.Object.(*holdfastv1.ContainerRuntimeNode); ok {
					seen[s.Name] = s.Spec.DesiredConfig
				}
			case <-end:
				t.Fatal("the first batch has not been told")
			}
			count := 0
			for _, config := range seen {
				if config == now && now != "" {
					count++
				}
			}
			if count >= nodes {
				return configured, time.Now()
			}
		}
	}
}

// rewrittenTwice are objects that were written more often than a change of one object is reason
// for: each configuration once, each node told once and reporting once, each ContainerRuntimeConfig
// when it is rendered and when all nodes have it. The status of a pool counts nodes, and changes
// with them.
func rewrittenTwice(t testing.TB, writes map[string]int) []string {
	var all []string
	for k, n := range writes {
		allowed := 1
		switch {
		case strings.HasPrefix(k, "ContainerRuntimeConfig ") && strings.HasSuffix(k, " status"):
			allowed = 2
		case strings.HasPrefix(k, "MachineConfigPool ") && strings.HasSuffix(k, " status"):
			continue
		}
		if n > allowed {
			all = append(all, fmt.Sprintf("%s: %d", k, n))
		}
	}
	if len(all) > 0 {
		t.Log(show(writes))
	}
	return all
}

// resync has the controller start anew, which looks at everything, and counts what it writes.
func (c *cluster) resync(t testing.TB, controller *process) int {
	t.Helper()
	lists := []kube.ObjectList{&apiv1.MachineConfigList{}, &apiv1.MachineConfigPoolList{}, &apiv1.ContainerRuntimeConfigList{}, &holdfastv1.ContainerRuntimeNodeList{}}
	ledger := newLedger(t, c.client, lists...)
	stopController(t, controller)
	second := startController(t, c.server)
	c.eventually(t, "the new one works", func(ctx context.Context) error {
		data, err := os.ReadFile(second.log)
		if n := strings.Count(string(data), "Starting workers"); err == nil && n < 4 {
			return fmt.Errorf("%d reconcilers have started", n)
		}
		return err
	})
	time.Sleep(2 * time.Second)
	writes := ledger.since()
	if len(writes) > 0 {
		t.Log(show(writes))
	}
	return len(writes)
}

// peakMemory is the most that a process has had in memory, in MiB.
func peakMemory(t testing.TB, pid int) float64 {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if text, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.Fields(text)[0])
			if err != nil {
				t.Fatal(err)
			}
			return float64(kib) / 1024
		}
	}
	t.Fatal("no VmHWM")
	return 0
}
