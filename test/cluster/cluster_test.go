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
