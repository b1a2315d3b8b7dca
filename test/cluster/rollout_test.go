// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// TestRollOut takes objects from being made to being deleted.
func TestRollOut(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(6)...)
	startController(t, c.server)
	empty := c.updated(t, "worker")

	t.Run("one object", func(t *testing.T) {
		c.config(t, "cache", workerLabel, "containerRuntimeConfig: {additionalImageStores: [{path: /mnt/cache}]}")
		name := c.updated(t, "worker", "cache")
		if name == empty || !slices.Equal(c.told(t, name), numbered(6)) {
			t.Errorf("%s: %v", name, c.told(t, name))
		}
		c.configSays(t, "cache", apiv1.ContainerRuntimeConfigSuccess, "Success")
	})
	t.Run("one node at once", func(t *testing.T) {
		c.fleet.mostAtOnce()
		c.config(t, "cache", workerLabel, "containerRuntimeConfig: {additionalImageStores: [{path: /mnt/other}]}")
		c.updated(t, "worker", "cache")
		if most := c.fleet.mostAtOnce(); most != 1 {
			t.Errorf("%d nodes at once", most)
		}
	})
	t.Run("merge", func(t *testing.T) {
		c.config(t, "second", workerLabel, "containerRuntimeConfig: {pidsLimit: 100, additionalImageStores: [{path: /mnt/second}, {path: /mnt/other}]}")
		name := c.updated(t, "worker", "cache", "second")
		spec := c.merged(t, name)
		if got := imageStores(spec); !slices.Equal(got, []string{"/mnt/other", "/mnt/second"}) || *spec.ContainerRuntimeConfig.PidsLimit != 100 {
			t.Errorf("%v, %v", got, spec.ContainerRuntimeConfig.PidsLimit)
		}
	})
	t.Run("conflict", func(t *testing.T) {
		c.config(t, "cache", workerLabel, "containerRuntimeConfig: {pidsLimit: 50, additionalImageStores: [{path: /mnt/other}]}")
		name := c.updated(t, "worker", "cache", "second")
		if *c.merged(t, name).ContainerRuntimeConfig.PidsLimit != 50 {
			t.Error("the first does not count")
		}
		for _, o := range []string{"cache", "second"} {
			c.configSays(t, o, apiv1.ContainerRuntimeConfigFailure, "pidsLimit: cache wants 50, second wants 100")
		}
		c.poolSays(t, "worker", apiv1.PoolRenderDegraded, "True", "pidsLimit")
		c.config(t, "cache", workerLabel, "containerRuntimeConfig: {additionalImageStores: [{path: /mnt/other}]}")
		c.configSays(t, "second", apiv1.ContainerRuntimeConfigSuccess, "Success")
		c.updated(t, "worker", "cache", "second")
	})
	t.Run("paused", func(t *testing.T) {
		before := c.pool(t, "worker").Spec.Configuration.Name
		c.changePool(t, "worker", func(p *apiv1.MachineConfigPool) { p.Spec.Paused = true })
		c.config(t, "second", workerLabel, "containerRuntimeConfig: {pidsLimit: 200}")
		c.poolSays(t, "worker", apiv1.PoolUpdating, "False", "Pool is paused; will not update to rendered-worker-")
		still(t, "all nodes have what they had", func() bool { return len(c.told(t, before)) == 6 })
		c.changePool(t, "worker", func(p *apiv1.MachineConfigPool) { p.Spec.Paused = false })
		c.updated(t, "worker", "cache", "second")
	})
	t.Run("failed batch", func(t *testing.T) {
		c.changePool(t, "worker", maxUnavailable(2))
		c.updated(t, "worker", "cache", "second")
		c.fleet.say("node-01", func(s *holdfastv1.ContainerRuntimeNode) {
			s.Status.State, s.Status.CurrentConfig, s.Status.Message = holdfastv1.NodeDegraded, "rendered-worker-before", "CRI-O does not start with it"
		})
		t.Cleanup(func() { c.fleet.say("node-01", nil) })
		c.fleet.hold("node-00") // if it were done before the other fails, there were room for a third
		c.config(t, "second", workerLabel, "containerRuntimeConfig: {pidsLimit: 300}")
		c.poolSays(t, "worker", apiv1.PoolNodeDegraded, "True", "node node-01: CRI-O does not start with it")
		c.fleet.release(t, "node-00")
		bad := c.pool(t, "worker").Spec.Configuration.Name
		c.eventually(t, "the other node of the batch has it", func(context.Context) error {
			if s := c.state(t, "node-00"); s.Status.CurrentConfig != bad {
				return fmt.Errorf("it has %s", s.Status.CurrentConfig)
			}
			return nil
		})
		still(t, "two nodes were told", func() bool { return slices.Equal(c.told(t, bad), numbered(2)) })
		c.eventually(t, "the object says so", func(ctx context.Context) error {
			o := &apiv1.ContainerRuntimeConfig{}
			if err := c.client.Get(ctx, kube.ObjectKey{Name: "second"}, o); err != nil {
				return err
			}
			for _, cond := range o.Status.Conditions {
				if cond.Type == apiv1.ContainerRuntimeConfigDegraded && cond.Status == "True" && strings.Contains(cond.Message, "worker") {
					return nil
				}
			}
			return fmt.Errorf("%+v", o.Status)
		})
		// The object is put right: also for the node on which it failed.
		c.fleet.say("node-01", nil)
		c.config(t, "second", workerLabel, "containerRuntimeConfig: {pidsLimit: 400}")
		c.updated(t, "worker", "cache", "second")
	})
	t.Run("node not ready", func(t *testing.T) {
		c.changePool(t, "worker", maxUnavailable(1))
		setReady(t, c.client, "node-03", corev1.ConditionFalse)
		c.fleet.hold("node-03")
		c.config(t, "second", workerLabel, "containerRuntimeConfig: {pidsLimit: 500}")
		c.poolSays(t, "worker", apiv1.PoolUpdating, "True", "node-03")
		now := c.pool(t, "worker").Spec.Configuration.Name
		still(t, "no other node is touched", func() bool { return slices.Equal(c.told(t, now), []string{"node-03"}) })
		setReady(t, c.client, "node-03", corev1.ConditionTrue)
		c.fleet.release(t, "node-03")
		c.updated(t, "worker", "cache", "second")
	})
	t.Run("withheld", func(t *testing.T) {
		c.fleet.say("node-02", func(s *holdfastv1.ContainerRuntimeNode) {
			s.Status.Stores = []holdfastv1.Store{{Kind: "ImageStore", Path: "/mnt/other", State: holdfastv1.StoreWithheld, Reason: "it is not there"}}
			s.Status.WithheldStores = 1
		})
		c.config(t, "second", workerLabel, "containerRuntimeConfig: {pidsLimit: 600}")
		c.updated(t, "worker", "cache", "second")
		c.poolSays(t, "worker", apiv1.PoolStoresAvailable, "False", "/mnt/other")
		c.fleet.say("node-02", func(s *holdfastv1.ContainerRuntimeNode) { s.Status.Stores, s.Status.WithheldStores = nil, 0 })
		c.config(t, "second", workerLabel, "containerRuntimeConfig: {pidsLimit: 700}")
		c.updated(t, "worker", "cache", "second")
		c.poolSays(t, "worker", apiv1.PoolStoresAvailable, "True", "")
	})
	t.Run("unused MachineConfigs go", func(t *testing.T) {
		c.eventually(t, "those of now are left", func(ctx context.Context) error {
			var all apiv1.MachineConfigList
			if err := c.client.List(ctx, &all); err != nil {
				return err
			}
			var names []string
			for _, mc := range all.Items {
				names = append(names, mc.Name)
			}
			if len(names) != 3 { // the generated one, and one for each pool
				return fmt.Errorf("%v", names)
			}
			return nil
		})
	})
	t.Run("events", func(t *testing.T) {
		for _, want := range []struct{ kind, name, reason, text string }{
			{"MachineConfigPool", "worker", "ConfigurationChanged", "made of cache, second"},
			{"MachineConfigPool", "worker", "AllNodesUpdated", "All nodes have rendered-worker-"},
			{"MachineConfigPool", "worker", "NodeDegraded", "node node-01: CRI-O does not start with it"},
			{"MachineConfigPool", "worker", "StoresWithheld", "/mnt/other"},
			{"ContainerRuntimeConfig", "cache", render.ReasonConflict, "pidsLimit: cache wants 50, second wants 100"},
			{"ContainerRuntimeConfig", "second", render.ReasonConflict, "pidsLimit: cache wants 50, second wants 100"},
		} {
			c.eventually(t, fmt.Sprintf("there is an event %v", want), func(ctx context.Context) error {
				var all eventsv1.EventList
				if err := c.client.List(ctx, &all, kube.InNamespace("default")); err != nil {
					return err
				}
				if !slices.ContainsFunc(all.Items, func(e eventsv1.Event) bool {
					return e.Regarding.Kind == want.kind && e.Regarding.Name == want.name && e.Reason == want.reason && strings.Contains(e.Note, want.text)
				}) {
					return fmt.Errorf("not among %d", len(all.Items))
				}
				return nil
			})
		}
	})
	t.Run("deletion", func(t *testing.T) {
		for _, name := range []string{"cache", "second"} {
			o := &apiv1.ContainerRuntimeConfig{}
			o.Name = name
			if err := c.client.Delete(t.Context(), o); err != nil {
				t.Fatal(err)
			}
		}
		if name := c.updated(t, "worker"); name != empty {
			t.Errorf("nodes have %s, had %s", name, empty)
		}
		err := c.client.Get(t.Context(), kube.ObjectKey{Name: render.MachineConfigName("worker")}, &apiv1.MachineConfig{})
		if kube.IgnoreNotFound(err) != nil || err == nil {
			t.Errorf("the generated MachineConfig: %v", err)
		}
	})
}
