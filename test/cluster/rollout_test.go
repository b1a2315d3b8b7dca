// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/kustomizetest"
	"github.com/holdfast/holdfast/internal/render"
)

// operator is the program under test, built once.
var operator = sync.OnceValues(func() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	// Another checkout has a program of its own, which may be tested at the same time.
	sum := sha256.Sum256([]byte(dir))
	program := filepath.Join(cache, fmt.Sprintf("test-cluster-%x", sum[:4]), "holdfast-operator")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "github.com/holdfast/holdfast/cmd/holdfast-operator")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as `make build` does
	out, err := build.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building holdfast-operator: %w\n%s", err, out)
	}
	return program, nil
})

const (
	namespace         = "holdfast-system"
	courierAccount    = "holdfast-courier"
	controllerAccount = "system:serviceaccount:" + namespace + ":holdfast-controller"
)

// startController starts the controller with the rights that it has in a cluster, and no others.
func startController(t testing.TB, s *server, args ...string) *process {
	t.Helper()
	program, err := operator()
	if err != nil {
		t.Fatal(err)
	}
	args = append([]string{"controller", "--kubeconfig=" + kubeconfig(t, s.controllerConfig(t)), "--leader-election-namespace=" + namespace, "--health-probe-bind-address=0"}, args...)
	p := run(t, filepath.Join(t.TempDir(), "controller.log"), program, args...)
	t.Cleanup(func() {
		if p.running() {
			p.end(t)
		}
		if t.Failed() {
			showLog(t, p.log)
		}
	})
	return p
}

// controllerConfig is for the controller, as its service account.
func (s *server) controllerConfig(t testing.TB) *rest.Config {
	t.Helper()
	return s.ConfigFor(t, controllerAccount, "system:serviceaccounts", "system:serviceaccounts:"+namespace)
}

// stopController ends a controller as kubelets do. It gives its lease back.
func stopController(t testing.TB, p *process) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.ended:
		if p.err != nil {
			t.Errorf("the controller ended with %v", p.err)
		}
	case <-time.After(patience):
		t.Fatal("the controller does not end")
	}
}

// cluster is a server with an overlay applied.
type cluster struct {
	*server
	client kube.WithWatch
	fleet  *fleet // stand-ins for nodes, if there are any
}

// newCluster is one with nodes and their stand-ins.
func newCluster(t testing.TB, overlay string, nodes ...string) *cluster {
	t.Helper()
	c := newEmptyCluster(t, overlay)
	makeNodes(t, c.client, linux, nodes...)
	c.fleet = newFleet(t, c.client)
	return c
}

func newEmptyCluster(t testing.TB, overlay string) *cluster {
	t.Helper()
	s := startServer(t)
	s.InstallCRDs(t)
	s.Apply(t, kustomizetest.Build(t, overlay))
	return &cluster{server: s, client: newClient(t, s)}
}

// linux are the labels of nodes that are in pool worker.
var linux = map[string]string{"kubernetes.io/os": "linux"}

// config makes a ContainerRuntimeConfig of its spec in YAML, which selects pools by a label.
func (c *cluster) config(t testing.TB, name, label, spec string) {
	t.Helper()
	c.Apply(t, fmt.Appendf(nil, `
apiVersion: machineconfiguration.openshift.io/v1
kind: ContainerRuntimeConfig
metadata: {name: %s}
spec:
  machineConfigPoolSelector: {matchLabels: {%q: ""}}
%s
`, name, label, indent(spec)))
}

func indent(text string) string {
	return "  " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n  ")
}

const workerLabel = "pools.operator.machineconfiguration.openshift.io/worker"

func (c *cluster) pool(t testing.TB, name string) *apiv1.MachineConfigPool {
	t.Helper()
	p := &apiv1.MachineConfigPool{}
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: name}, p); err != nil {
		t.Fatal(err)
	}
	return p
}

func (c *cluster) changePool(t testing.TB, name string, f func(*apiv1.MachineConfigPool)) {
	t.Helper()
	p := &apiv1.MachineConfigPool{}
	p.Name = name
	change(t, c.client, c.client, p, f)
}

// updated waits until all nodes of a pool have what objects say, and returns its name.
func (c *cluster) updated(t testing.TB, pool string, sources ...string) string {
	t.Helper()
	name := ""
	c.eventually(t, fmt.Sprintf("pool %s has %v", pool, sources), func(ctx context.Context) error {
		p := &apiv1.MachineConfigPool{}
		if err := c.client.Get(ctx, kube.ObjectKey{Name: pool}, p); err != nil {
			return err
		}
		name = p.Spec.Configuration.Name
		var from []string
		for _, o := range p.Spec.Configuration.Source {
			from = append(from, o.Name)
			object := &apiv1.ContainerRuntimeConfig{}
			if err := c.client.Get(ctx, kube.ObjectKey{Name: o.Name}, object); err != nil {
				return err
			}
			if object.Generation != o.Generation {
				return fmt.Errorf("it is made of generation %d of %s: want %d", o.Generation, o.Name, object.Generation)
			}
		}
		if !slices.Equal(from, sources) || name == "" || p.Status.ObservedGeneration != p.Generation || condition(p, apiv1.PoolUpdated).Status != "True" {
			return fmt.Errorf("it is made of %v, status %+v", from, p.Status)
		}
		return nil
	})
	return name
}

// poolSays waits until a condition of a pool is so, and its message has a text.
func (c *cluster) poolSays(t testing.TB, pool string, kind apiv1.MachineConfigPoolConditionType, status, text string) {
	t.Helper()
	c.eventually(t, fmt.Sprintf("pool %s says %s %s", pool, kind, status), func(ctx context.Context) error {
		p := &apiv1.MachineConfigPool{}
		if err := c.client.Get(ctx, kube.ObjectKey{Name: pool}, p); err != nil {
			return err
		}
		got := condition(p, kind)
		if string(got.Status) != status || !strings.Contains(got.Message, text) || got.ObservedGeneration != p.Generation {
			return fmt.Errorf("%+v, want %q in its message", got, text)
		}
		return nil
	})
}

func condition(p *apiv1.MachineConfigPool, kind apiv1.MachineConfigPoolConditionType) apiv1.MachineConfigPoolCondition {
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return apiv1.MachineConfigPoolCondition{}
}

// configSays waits until the last condition of a ContainerRuntimeConfig is of a type, and its
// message has a text.
func (c *cluster) configSays(t testing.TB, name string, kind apiv1.ContainerRuntimeConfigStatusConditionType, text string) {
	t.Helper()
	c.eventually(t, fmt.Sprintf("ContainerRuntimeConfig %s says %s", name, kind), func(ctx context.Context) error {
		o := &apiv1.ContainerRuntimeConfig{}
		if err := c.client.Get(ctx, kube.ObjectKey{Name: name}, o); err != nil {
			return err
		}
		n := len(o.Status.Conditions)
		if n == 0 || o.Status.Conditions[n-1].Type != kind || !strings.Contains(o.Status.Conditions[n-1].Message, text) || o.Status.ObservedGeneration != o.Generation {
			return fmt.Errorf("%+v, want %q in its message", o.Status, text)
		}
		return nil
	})
}

// merged is what a MachineConfig tells nodes.
func (c *cluster) merged(t testing.TB, name string) apiv1.ContainerRuntimeConfigSpec {
	t.Helper()
	mc := &apiv1.MachineConfig{}
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: name}, mc); err != nil {
		t.Fatal(err)
	}
	data, err := render.Unpack(mc, render.ClusterObject)
	if err != nil {
		t.Fatal(err)
	}
	objects, err := render.Objects(name, strings.NewReader(string(data)))
	if err != nil || len(objects) != 1 {
		t.Fatalf("%d objects, %v\n%s", len(objects), err, data)
	}
	return objects[0].Spec
}

func imageStores(spec apiv1.ContainerRuntimeConfigSpec) []string {
	var all []string
	for _, s := range spec.ContainerRuntimeConfig.AdditionalImageStores {
		all = append(all, string(s.Path))
	}
	return all
}

func (c *cluster) state(t testing.TB, node string) *holdfastv1.ContainerRuntimeNode {
	t.Helper()
	s := &holdfastv1.ContainerRuntimeNode{}
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: node}, s); err != nil {
		t.Fatal(err)
	}
	return s
}

// told are the nodes that are to have a configuration.
func (c *cluster) told(t testing.TB, config string) []string {
	t.Helper()
	var list holdfastv1.ContainerRuntimeNodeList
	if err := c.client.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, s := range list.Items {
		if s.Spec.DesiredConfig == config {
			all = append(all, s.Name)
		}
	}
	return all
}

// still checks that something stays so for a while, which is as long as the controller may take
// for what it does at once.
func still(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if !ok() {
			t.Fatalf("%s: not so any more", what)
		}
	}
}

func maxUnavailable(n int) func(*apiv1.MachineConfigPool) {
	v := intstr.FromInt(n)
	return func(p *apiv1.MachineConfigPool) { p.Spec.MaxUnavailable = &v }
}

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
		if most := c.fleet.mostAtOnce(); most > 6 {
			t.Errorf("%d nodes at once", most)
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
