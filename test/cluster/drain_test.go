// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// TestReboot has nodes boot for a configuration: they are cordoned and drained before, as far as
// disruption budgets allow, and uncordoned when they have it. Nothing else cordons a node.
func TestReboot(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(2)...)
	c.Namespace(t, "default")
	startController(t, c.server)
	c.config(t, "restart", workerLabel, "containerRuntimeConfig: {pidsLimit: 20}")
	c.updated(t, "worker", "restart")
	for _, node := range numbered(2) {
		if n := c.node(t, node); n.Spec.Unschedulable || len(n.Annotations) > 0 || c.state(t, node).Spec.DrainedFor != "" {
			t.Errorf("%s was cordoned for a restart: %+v", node, n.Spec)
		}
		c.fleet.say(node, func(s *holdfastv1.ContainerRuntimeNode) { // as couriers do
			if s.Spec.DrainedFor != s.Spec.DesiredConfig {
				askForDrain(s)
			}
		})
	}

	// Two pods that a budget protects, and one of a DaemonSet.
	daemons := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "daemons", Namespace: "default"}, Spec: appsv1.DaemonSetSpec{
		Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "daemons"}},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "daemons"}}, Spec: podSpec("")},
	}}
	budget := &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Name: "app", Namespace: "default"}, Spec: policyv1.PodDisruptionBudgetSpec{
		Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "app"}},
	}}
	for _, o := range []kube.Object{daemons, budget} {
		if err := c.client.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	app, daemon := c.pod(t, "app", "node-00", nil), c.pod(t, "daemons", "node-00", daemons)
	// The controller itself, on the node that it drains: there may be no other that takes it.
	self := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "self", Namespace: namespace, Labels: map[string]string{
		"app.kubernetes.io/name": "holdfast", "app.kubernetes.io/component": "controller",
	}}, Spec: podSpec("node-00")}
	self.Spec.ServiceAccountName = "holdfast-controller"
	if err := c.client.Create(t.Context(), self); err != nil {
		t.Fatal(err)
	}
	// What an administrator has cordoned stays so.
	change(t, c.client, c.client, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-01"}}, func(n *corev1.Node) { n.Spec.Unschedulable = true })
	c.changePool(t, "worker", maxUnavailable(2))
	// A node has annotations of others.
	change(t, c.client, c.client, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-00"}}, func(n *corev1.Node) {
		n.Annotations = map[string]string{"example.com/theirs": "yes"}
	})

	c.fleet.hold(numbered(2)...)
	c.config(t, "restart", workerLabel, "containerRuntimeConfig: {pidsLimit: 30}\nholdfast: {disruption: Reboot}")
	c.eventually(t, "node-00 is to have another", func(context.Context) error {
		if s := c.state(t, "node-00"); s.Status.ObservedGeneration == s.Generation {
			return errors.New("it is to have what it has")
		}
		return nil
	})
	still(t, "a node whose courier says nothing is not drained", func() bool { return !c.node(t, "node-00").Spec.Unschedulable })
	c.fleet.release(t, numbered(2)...)
	c.eventually(t, "node-00 is cordoned, and waits for the budget", func(context.Context) error {
		if !c.node(t, "node-00").Spec.Unschedulable {
			return errors.New("it is schedulable")
		}
		return nil
	})
	still(t, "the pod is not evicted", func() bool { return c.get(t, app) == nil && app.DeletionTimestamp == nil })
	if s := c.state(t, "node-00"); s.Spec.DrainedFor == s.Spec.DesiredConfig {
		t.Error("it was told to go on with the pod on it")
	}
	change(t, c.client.Status(), c.client, budget, func(b *policyv1.PodDisruptionBudget) {
		b.Status.ObservedGeneration, b.Status.DisruptionsAllowed, b.Status.CurrentHealthy, b.Status.ExpectedPods = b.Generation, 1, 2, 2
	})
	c.eventually(t, "the pod is evicted", func(ctx context.Context) error {
		if err := c.get(t, app); err == nil && app.DeletionTimestamp == nil {
			return errors.New("it is there")
		}
		return nil
	})
	c.gone(t, app)
	c.updated(t, "worker", "restart")
	c.eventually(t, "node-00 is schedulable again", func(context.Context) error {
		if n := c.node(t, "node-00"); n.Spec.Unschedulable || n.Annotations["holdfast.github.io/cordoned"] != "" {
			return fmt.Errorf("%+v, %v", n.Spec, n.Annotations)
		}
		return nil
	})
	if n := c.node(t, "node-00"); n.Annotations["example.com/theirs"] != "yes" {
		t.Errorf("annotations of others have gone: %v", n.Annotations)
	}
	if !c.node(t, "node-01").Spec.Unschedulable {
		t.Error("what an administrator has cordoned was uncordoned")
	}
	if err := c.get(t, daemon); err != nil || daemon.DeletionTimestamp != nil {
		t.Errorf("the pod of the DaemonSet: %v, %v", daemon.DeletionTimestamp, err)
	}
	if err := c.get(t, self); err != nil || self.DeletionTimestamp != nil {
		t.Errorf("the controller evicted itself: %v, %v", self.DeletionTimestamp, err)
	}

	// Nodes that came back with what they had before are of use again.
	for _, node := range numbered(2) {
		c.fleet.say(node, func(s *holdfastv1.ContainerRuntimeNode) {
			askForDrain(s)
			if s.Spec.DrainedFor == s.Spec.DesiredConfig {
				s.Status.State, s.Status.Message = holdfastv1.NodeDegraded, "CRI-O does not start with it"
			}
		})
	}
	c.config(t, "restart", workerLabel, "containerRuntimeConfig: {pidsLimit: 40}\nholdfast: {disruption: Reboot}")
	c.poolSays(t, "worker", apiv1.PoolNodeDegraded, "True", "CRI-O does not start with it")
	c.eventually(t, "node-00 is schedulable", func(context.Context) error {
		if s := c.state(t, "node-00"); s.Status.State != holdfastv1.NodeDegraded || c.node(t, "node-00").Spec.Unschedulable {
			return fmt.Errorf("%s, %+v", s.Status.State, c.node(t, "node-00").Spec)
		}
		return nil
	})
}

const boots = "containerRuntimeConfig: {pidsLimit: 30}\nholdfast: {disruption: Reboot}"

// asking has a node ask for a drain before it boots, as its courier does.
func (c *cluster) asking(t testing.TB, node string) {
	c.fleet.say(node, func(s *holdfastv1.ContainerRuntimeNode) {
		mc := &apiv1.MachineConfig{}
		err := c.client.Get(t.Context(), kube.ObjectKey{Name: s.Spec.DesiredConfig}, mc)
		if err == nil && len(mc.Annotations) > 0 && s.Spec.DrainedFor != s.Spec.DesiredConfig {
			askForDrain(s)
		}
	})
}

// TestRebootAgain has a node boot for a configuration that it has had, and been drained for, before.
func TestRebootAgain(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(2)...)
	c.asking(t, "node-00")
	c.asking(t, "node-01")
	startController(t, c.server)
	c.config(t, "restart", workerLabel, boots)
	first := c.updated(t, "worker", "restart")
	c.config(t, "restart", workerLabel, "containerRuntimeConfig: {pidsLimit: 40}")
	c.updated(t, "worker", "restart")
	c.schedulable(t, "node-00")
	l := newLedger(t, c.client, &corev1.NodeList{})
	c.config(t, "restart", workerLabel, boots)
	if again := c.updated(t, "worker", "restart"); again != first {
		t.Errorf("it has another name: %s, was %s", again, first)
	}
	c.eventually(t, "the node was cordoned, and uncordoned", func(context.Context) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if n := l.writes["Node node-00 spec"] + l.writes["Node node-00 status"]; n != 2 {
			return fmt.Errorf("%d writes", n)
		}
		return nil
	})
}

// TestRebootAlone has the only node of a cluster boot: its pods have nowhere to go, and stay.
func TestRebootAlone(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(1)...)
	c.Namespace(t, "default")
	c.asking(t, "node-00")
	app := c.pod(t, "app", "node-00", nil)
	startController(t, c.server)
	l := newLedger(t, c.client, &corev1.NodeList{})
	c.config(t, "restart", workerLabel, boots)
	c.updated(t, "worker", "restart")
	if s := c.state(t, "node-00"); s.Spec.DrainedFor != s.Spec.DesiredConfig {
		t.Errorf("it was not told to go on: %+v", s.Spec)
	}
	if err := c.get(t, app); err != nil || app.DeletionTimestamp != nil {
		t.Errorf("its pod: %v, %v", app.DeletionTimestamp, err)
	}
	if w := l.since(); len(w) > 0 {
		t.Errorf("the node was written: %v", w)
	}
}

// TestCordonsAreLeft: what we have cordoned, and have no reason to any more, is schedulable again,
// whatever has become of the node's object; what somebody else cordons is not.
func TestCordonsAreLeft(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(3)...)
	for node, cordoned := range map[string]bool{"node-00": true, "node-01": false} {
		change(t, c.client, c.client, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, func(n *corev1.Node) {
			n.Spec.Unschedulable, n.Annotations = cordoned, map[string]string{"holdfast.github.io/cordoned": "rendered-worker-x"}
		})
	}
	change(t, c.client, c.client, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-02"}}, func(n *corev1.Node) { n.Spec.Unschedulable = true })
	// No pool has these nodes, so that they have no objects.
	c.changePool(t, "worker", func(p *apiv1.MachineConfigPool) { p.Spec.NodeSelector = nil })
	startController(t, c.server)
	c.schedulable(t, "node-00")
	c.schedulable(t, "node-01")
	still(t, "what somebody else has cordoned stays so", func() bool { return c.node(t, "node-02").Spec.Unschedulable })
}

// schedulable waits until a node is, and has no mark of ours.
func (c *cluster) schedulable(t testing.TB, name string) {
	t.Helper()
	c.eventually(t, name+" is schedulable", func(context.Context) error {
		if n := c.node(t, name); n.Spec.Unschedulable || n.Annotations["holdfast.github.io/cordoned"] != "" {
			return fmt.Errorf("%+v, %v", n.Spec, n.Annotations)
		}
		return nil
	})
}

// askForDrain is what a courier says that waits for a drain.
func askForDrain(s *holdfastv1.ContainerRuntimeNode) {
	s.Status.State, s.Status.CurrentConfig = holdfastv1.NodeWorking, "before"
	meta.SetStatusCondition(&s.Status.Conditions, metav1.Condition{
		Type: holdfastv1.NodeApplied, Status: metav1.ConditionFalse, Reason: holdfastv1.ReasonWaitsForDrain, ObservedGeneration: s.Generation,
	})
}

func podSpec(node string) corev1.PodSpec {
	return corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "example.com/image"}}}
}

// pod makes a pod that runs on a node.
func (c *cluster) pod(t testing.TB, name, node string, owner *appsv1.DaemonSet) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", Labels: map[string]string{"app": name}}, Spec: podSpec(node)}
	if owner != nil {
		p.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(owner, appsv1.SchemeGroupVersion.WithKind("DaemonSet"))}
	}
	if err := c.client.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	change(t, c.client.Status(), c.client, p, func(p *corev1.Pod) {
		p.Status.Phase = corev1.PodRunning
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	})
	return p
}

func (c *cluster) get(t testing.TB, o kube.Object) error {
	t.Helper()
	return c.client.Get(t.Context(), kube.ObjectKeyFromObject(o), o)
}

// gone is what a kubelet does with a pod that is deleted, when it has ended.
func (c *cluster) gone(t testing.TB, p *corev1.Pod) {
	t.Helper()
	if err := c.client.Delete(t.Context(), p, kube.GracePeriodSeconds(0)); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
}

func (c *cluster) node(t testing.TB, name string) *corev1.Node {
	t.Helper()
	n := &corev1.Node{}
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: name}, n); err != nil {
		t.Fatal(err)
	}
	return n
}
