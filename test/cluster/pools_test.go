// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// gpuPool selects nodes with the label gpu, and objects by the label pool-gpu.
const gpuPool = `
apiVersion: machineconfiguration.openshift.io/v1
kind: MachineConfigPool
metadata: {name: gpu, labels: {pool-gpu: ""}}
spec:
  machineConfigSelector: {matchExpressions: [{key: machineconfiguration.openshift.io/role, operator: In, values: [worker, gpu]}]}
  nodeSelector: {matchLabels: {gpu: "yes"}}
  maxUnavailable: 100%
`

func (c *cluster) label(t testing.TB, node string, labels map[string]string) {
	t.Helper()
	change(t, c.client, c.client, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, func(n *corev1.Node) { maps.Copy(n.Labels, labels) })
}

func (c *cluster) inPool(t testing.TB, node, pool string) {
	t.Helper()
	c.eventually(t, fmt.Sprintf("%s is in pool %q", node, pool), func(ctx context.Context) error {
		if got := c.state(t, node).Spec.Pool; got != pool {
			return fmt.Errorf("it is in %q", got)
		}
		return nil
	})
}

// TestPools moves nodes and objects between pools.
func TestPools(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(4)...)
	c.changePool(t, "worker", maxUnavailable(4))
	startController(t, c.server)
	c.config(t, "all", workerLabel, "containerRuntimeConfig: {pidsLimit: 100, additionalImageStores: [{path: /mnt/all}]}")
	worker := c.updated(t, "worker", "all")

	t.Run("a new pool inherits", func(t *testing.T) {
		c.Apply(t, []byte(gpuPool))
		c.label(t, "node-00", map[string]string{"gpu": "yes"})
		name := c.updated(t, "gpu", "all")
		c.inPool(t, "node-00", "gpu")
		if got := c.told(t, name); !slices.Equal(got, []string{"node-00"}) || !slices.Equal(imageStores(c.merged(t, name)), []string{"/mnt/all"}) {
			t.Errorf("%v: %v", got, c.merged(t, name))
		}
		// Nothing selects the pool itself.
		if err := c.client.Get(t.Context(), kube.ObjectKey{Name: render.MachineConfigName("gpu")}, &apiv1.MachineConfig{}); !apierrors.IsNotFound(err) {
			t.Errorf("the generated MachineConfig: %v", err)
		}
	})
	t.Run("its own objects come first", func(t *testing.T) {
		c.config(t, "gpus", "pool-gpu", "containerRuntimeConfig: {pidsLimit: 200, additionalImageStores: [{path: /mnt/gpu}]}")
		spec := c.merged(t, c.updated(t, "gpu", "gpus", "all"))
		if got := imageStores(spec); !slices.Equal(got, []string{"/mnt/gpu", "/mnt/all"}) || *spec.ContainerRuntimeConfig.PidsLimit != 200 {
			t.Errorf("%v, %d", got, *spec.ContainerRuntimeConfig.PidsLimit)
		}
		for _, o := range []string{"gpus", "all"} {
			c.configSays(t, o, apiv1.ContainerRuntimeConfigSuccess, "Success")
		}
		if now := c.updated(t, "worker", "all"); now != worker {
			t.Errorf("worker has %s, had %s", now, worker)
		}
	})
	t.Run("another selector of an object", func(t *testing.T) {
		c.config(t, "gpus", workerLabel, "containerRuntimeConfig: {additionalImageStores: [{path: /mnt/gpu}]}")
		c.updated(t, "worker", "all", "gpus")
		c.updated(t, "gpu", "all", "gpus") // it inherits
		c.config(t, "gpus", "nobody", "containerRuntimeConfig: {additionalImageStores: [{path: /mnt/gpu}]}")
		c.configSays(t, "gpus", apiv1.ContainerRuntimeConfigFailure, "could not find any MachineConfigPool set for ContainerRuntimeConfig gpus")
		if now := c.updated(t, "worker", "all"); now != worker {
			t.Errorf("worker has %s, had %s", now, worker)
		}
	})
	t.Run("another label of a pool", func(t *testing.T) {
		c.changePool(t, "gpu", func(p *apiv1.MachineConfigPool) { p.Labels["nobody"] = "" })
		c.updated(t, "gpu", "gpus", "all")
		c.configSays(t, "gpus", apiv1.ContainerRuntimeConfigSuccess, "Success")
		c.changePool(t, "gpu", func(p *apiv1.MachineConfigPool) { delete(p.Labels, "nobody") })
		c.updated(t, "gpu", "all")
	})
	t.Run("two custom pools", func(t *testing.T) {
		c.Apply(t, []byte(`
apiVersion: machineconfiguration.openshift.io/v1
kind: MachineConfigPool
metadata: {name: big}
spec: {nodeSelector: {matchLabels: {size: big}}}
`))
		c.updated(t, "big", "all")
		before := c.state(t, "node-00").Spec.DesiredConfig
		c.label(t, "node-00", map[string]string{"size": "big"})
		for _, p := range []string{"gpu", "big"} {
			c.poolSays(t, p, apiv1.PoolRenderDegraded, "True", "another custom pool selects node-00, too")
		}
		c.inPool(t, "node-00", "")
		if now := c.state(t, "node-00").Spec.DesiredConfig; now != before {
			t.Errorf("it is to have %s, had %s", now, before)
		}
		c.label(t, "node-00", map[string]string{"gpu": "no"})
		c.inPool(t, "node-00", "big")
		for _, p := range []string{"gpu", "big"} {
			c.poolSays(t, p, apiv1.PoolRenderDegraded, "False", "")
		}
	})
	t.Run("a pool goes", func(t *testing.T) {
		if err := c.client.Delete(t.Context(), &apiv1.MachineConfigPool{ObjectMeta: metav1.ObjectMeta{Name: "big"}}); err != nil {
			t.Fatal(err)
		}
		c.inPool(t, "node-00", "worker") // it has no label that another pool selects
		c.updated(t, "worker", "all")
		c.eventually(t, "what was made for it goes, too", func(ctx context.Context) error {
			var all apiv1.MachineConfigList
			err := c.client.List(ctx, &all)
			for _, mc := range all.Items {
				if strings.Contains(mc.Name, "-big-") {
					return fmt.Errorf("%s is there", mc.Name)
				}
			}
			return err
		})
	})
	t.Run("a node joins, and goes", func(t *testing.T) {
		makeNodes(t, c.client, linux, "late")
		c.eventually(t, "it has what the others have", func(context.Context) error {
			s := &holdfastv1.ContainerRuntimeNode{}
			if err := c.client.Get(t.Context(), kube.ObjectKey{Name: "late"}, s); err != nil {
				return err
			}
			if s.Status.CurrentConfig != worker {
				return fmt.Errorf("%+v", s)
			}
			return nil
		})
		if s := c.state(t, "late"); len(s.OwnerReferences) != 1 || s.OwnerReferences[0].Kind != "Node" {
			t.Errorf("it would stay without its node: %+v", s.OwnerReferences)
		}
	})
	t.Run("an invalid machineConfigSelector", func(t *testing.T) {
		before := c.pool(t, "gpu")
		c.changePool(t, "gpu", func(p *apiv1.MachineConfigPool) {
			p.Spec.MachineConfigSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: apiv1.RoleLabel, Operator: metav1.LabelSelectorOpIn, Values: []string{"no label"}}}}
		})
		c.poolSays(t, "gpu", apiv1.PoolRenderDegraded, "True", "machineConfigSelector")
		if now := c.pool(t, "gpu").Spec.Configuration; now.Name != before.Spec.Configuration.Name {
			t.Errorf("nodes are to have %+v, had %+v", now, before.Spec.Configuration)
		}
		c.changePool(t, "gpu", func(p *apiv1.MachineConfigPool) { p.Spec.MachineConfigSelector = before.Spec.MachineConfigSelector })
		c.poolSays(t, "gpu", apiv1.PoolRenderDegraded, "False", "")
	})
	t.Run("an invalid selector", func(t *testing.T) {
		c.changePool(t, "gpu", func(p *apiv1.MachineConfigPool) {
			p.Spec.NodeSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "gpu", Operator: metav1.LabelSelectorOpIn, Values: []string{"no label"}}}}
		})
		c.poolSays(t, "gpu", apiv1.PoolRenderDegraded, "True", "nodeSelector")
		c.updated(t, "worker", "all")
	})
}

// TestRepair edits and deletes what the controller has made.
func TestRepair(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(2)...)
	startController(t, c.server)
	c.config(t, "cache", workerLabel, "containerRuntimeConfig: {additionalImageStores: [{path: /mnt/cache}]}")
	rendered := c.updated(t, "worker", "cache")
	name := render.MachineConfigName("worker")
	want := &apiv1.MachineConfig{}
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: name}, want); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{name, rendered} {
		mc := &apiv1.MachineConfig{ObjectMeta: metav1.ObjectMeta{Name: n}}
		change(t, c.client, c.client, mc, func(mc *apiv1.MachineConfig) {
			mc.Spec.Config.Raw = []byte(`{"ignition":{"version":"3.2.0"}}`)
			mc.Labels, mc.Annotations = map[string]string{"app.kubernetes.io/managed-by": "holdfast-operator"}, map[string]string{"example.com/mine": "yes"}
		})
		c.eventually(t, n+" is as it was", func(ctx context.Context) error {
			if err := c.client.Get(ctx, kube.ObjectKey{Name: n}, mc); err != nil {
				return err
			}
			if string(mc.Spec.Config.Raw) != string(want.Spec.Config.Raw) || n == name && mc.Labels[apiv1.RoleLabel] != "worker" {
				return fmt.Errorf("%s, labels %v", mc.Spec.Config.Raw, mc.Labels)
			}
			return nil
		})
		if mc.Annotations["example.com/mine"] != "yes" {
			t.Errorf("%s: an annotation of a user is gone: %v", n, mc.Annotations)
		}
		if err := c.client.Delete(t.Context(), mc); err != nil {
			t.Fatal(err)
		}
		c.eventually(t, n+" is back", func(ctx context.Context) error { return c.client.Get(ctx, kube.ObjectKey{Name: n}, mc) })
	}

	// What a user has written on an object stays, whatever is written on it.
	o := &apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: "cache"}}
	change(t, c.client, c.client, o, func(o *apiv1.ContainerRuntimeConfig) {
		o.Annotations, o.Finalizers = map[string]string{"example.com/mine": "yes"}, []string{"example.com/mine"}
		o.Spec.ContainerRuntimeConfig.LogLevel = "info"
	})
	c.updated(t, "worker", "cache")
	c.configSays(t, "cache", apiv1.ContainerRuntimeConfigSuccess, "Success")
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: "cache"}, o); err != nil || o.Annotations["example.com/mine"] != "yes" || len(o.Finalizers) != 1 {
		t.Errorf("%v, %v, %v", o.Annotations, o.Finalizers, err)
	}
	change(t, c.client, c.client, o, func(o *apiv1.ContainerRuntimeConfig) { o.Finalizers = nil })

	// Somebody else's object by the name that is needed is left alone, and said.
	if err := c.client.Delete(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	c.updated(t, "worker")
	theirs := &apiv1.MachineConfig{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{apiv1.RoleLabel: "worker"}}}
	theirs.Spec.Config.Raw = []byte(`{"ignition":{"version":"3.4.0"}}`)
	if err := c.client.Create(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	c.config(t, "cache", workerLabel, "containerRuntimeConfig: {pidsLimit: 20}")
	c.poolSays(t, "worker", apiv1.PoolRenderDegraded, "True", name+" belongs to somebody else")
	c.configSays(t, "cache", apiv1.ContainerRuntimeConfigFailure, name+" belongs to somebody else")
	version := theirs.ResourceVersion
	still(t, "it is as they made it", func() bool {
		err := c.client.Get(t.Context(), kube.ObjectKey{Name: name}, theirs)
		return err == nil && theirs.ResourceVersion == version
	})
	if err := c.client.Delete(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	c.updated(t, "worker", "cache")
}
