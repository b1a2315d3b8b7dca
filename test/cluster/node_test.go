// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/render"
)

// machine is a node with the agent and the courier as they are in a cluster: processes, the courier
// with the token of its pod. CRI-O and systemd are stand-ins: see agenttest.
type machine struct {
	*agenttest.Node
	t         testing.TB // with which its programs end
	name      string
	namedBy   string // the courier's kubeconfig
	agent     *process
	courier   *process
	untouched map[string]string // its files before anybody came
}

// newMachine makes a node on which CRI-O runs, and has it join.
func (c *cluster) newMachine(t testing.TB, name string) *machine {
	t.Helper()
	m := &machine{Node: agenttest.New(t), t: t, name: name}
	makeNodes(t, c.client, linux, name)
	m.namedBy = kubeconfig(t, c.courierConfig(t, name))
	if out, code := m.Systemd.Do("start", "crio.service"); code != 0 {
		t.Fatalf("CRI-O does not start: %s\n%s", out, m.Read(t, "crio.service.log"))
	}
	m.untouched = m.files(t)
	for _, dir := range []string{render.ObjectsDir, "/var/lib/holdfast-agent"} { // as the init container does
		if err := os.MkdirAll(m.Path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.Systemd.Calls()
	m.startAgent()
	m.startCourier()
	return m
}

// start starts the program.
func (m *machine) start(args ...string) *process {
	m.t.Helper()
	program, err := operator()
	if err != nil {
		m.t.Fatal(err)
	}
	p := run(m.t, filepath.Join(m.t.TempDir(), args[0]+"-"+m.name+".log"), program, args...)
	m.t.Cleanup(func() {
		if p.running() {
			p.end(m.t)
		}
		if m.t.Failed() {
			showLog(m.t, p.log)
		}
	})
	return p
}

func (m *machine) startAgent() {
	m.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	m.agent = m.start("agent", "--file="+m.Path(render.ObjectsDir), "--root="+m.Root, "--systemctl="+strings.Join(m.Systemctl(exe), " "),
		"--without-install", "--ready-timeout=10s")
}

func (m *machine) startCourier() {
	m.t.Helper()
	m.courier = m.start("courier", "--node="+m.name, "--root="+m.Root, "--kubeconfig="+m.namedBy)
}

// files are what the runtimes read.
func (m *machine) files(t testing.TB) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, dir := range []string{"/etc/containers", "/etc/crio"} {
		err := filepath.WalkDir(m.Path(dir), func(name string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || err == nil && d.IsDir() {
				return nil
			}
			if err != nil {
				return err
			}
			data, err := os.ReadFile(name)
			all[strings.TrimPrefix(name, m.Root)] = string(data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// restarts is how many times CRI-O was restarted since the last call.
func (m *machine) restarts() int {
	n := 0
	for _, c := range m.Systemd.Calls() {
		if c == "restart crio.service" {
			n++
		}
	}
	return n
}

// lists checks what images CRI-O lists.
func (m *machine) lists(t testing.TB, want ...string) {
	t.Helper()
	got, err := m.Images(t)
	slices.Sort(got)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%s lists %v, %v; want %v", m.name, got, err, want)
	}
}

// machines are all of a cluster, in the order of their names.
type machines []*machine

// restarted checks how many times CRI-O was restarted on each node since the last call.
func (all machines) restarted(t testing.TB, want ...int) {
	t.Helper()
	var got []int
	for _, m := range all {
		got = append(got, m.restarts())
	}
	if !slices.Equal(got, want) {
		t.Errorf("CRI-O was restarted %v times, want %v", got, want)
	}
}

// store is what a node says of a store.
func (c *cluster) store(t testing.TB, node, path string) string {
	t.Helper()
	for _, s := range c.state(t, node).Status.Stores {
		if s.Path == path {
			return fmt.Sprintf("%s %s: %s", s.Kind, s.State, s.Reason)
		}
	}
	return "none"
}

// storeIs waits until a node says something of a store.
func (c *cluster) storeIs(t testing.TB, node, path, want string) {
	t.Helper()
	c.eventually(t, fmt.Sprintf("%s of %s is %q", path, node, want), func(context.Context) error {
		if got := c.store(t, node, path); got != want {
			return errors.New(got)
		}
		return nil
	})
}

// nodeSays checks a condition of a node's object.
func (c *cluster) nodeSays(t testing.TB, node, kind, status, text string) {
	t.Helper()
	s := c.state(t, node)
	got := meta.FindStatusCondition(s.Status.Conditions, kind)
	if got == nil || string(got.Status) != status || !strings.Contains(got.Message, text) || got.ObservedGeneration != s.Generation {
		t.Errorf("%s: %s is %+v, want %s with %q", node, kind, got, status, text)
	}
}

// configCondition waits until a condition of a ContainerRuntimeConfig is so, and has a text.
func (c *cluster) configCondition(t testing.TB, name string, kind apiv1.ContainerRuntimeConfigStatusConditionType, status, text string) {
	t.Helper()
	c.eventually(t, fmt.Sprintf("%s says %s %s", name, kind, status), func(ctx context.Context) error {
		o := &apiv1.ContainerRuntimeConfig{}
		if err := c.client.Get(ctx, kube.ObjectKey{Name: name}, o); err != nil {
			return err
		}
		for _, got := range o.Status.Conditions {
			if got.Type == kind && string(got.Status) == status && strings.Contains(got.Message, text) {
				return nil
			}
		}
		return fmt.Errorf("%+v", o.Status)
	})
}

// images is a configuration with image stores.
func images(paths ...string) string {
	return "containerRuntimeConfig: {additionalImageStores: [{path: " + strings.Join(paths, "}, {path: ") + "}]}"
}

// TestNodes takes objects from a user's hands to CRI-O on three nodes, and back: the controller,
// couriers and agents are the real ones.
func TestNodes(t *testing.T) {
	t.Parallel() // it mostly waits
	c := newEmptyCluster(t, "kubernetes")
	var all machines
	for _, name := range numbered(3) {
		all = append(all, c.newMachine(t, name))
	}
	controller := startController(t, c.server)
	empty := c.updated(t, "worker")
	all.restarted(t, 0, 0, 0)

	t.Run("a store", func(t *testing.T) {
		for _, m := range all {
			m.ImageStore(t, "/mnt/a", "quay.io/a:1")
		}
		c.config(t, "stores", workerLabel, images("/mnt/a"))
		name := c.updated(t, "worker", "stores")
		all.restarted(t, 1, 1, 1)
		hash := c.state(t, all[0].name).Status.AppliedHash
		for _, m := range all {
			m.lists(t, "quay.io/a:1")
			s := c.state(t, m.name)
			if s.Status.State != holdfastv1.NodeDone || s.Status.CurrentConfig != name || s.Status.Runtime.Version != "1.37.0" || s.Status.AppliedHash != hash || hash == "" {
				t.Errorf("%s: %+v", m.name, s.Status)
			}
			if got := c.store(t, m.name, "/mnt/a"); got != "ImageStore Healthy: " {
				t.Errorf("%s: /mnt/a is %s", m.name, got)
			}
			c.nodeSays(t, m.name, holdfastv1.NodeApplied, "True", "")
			c.nodeSays(t, m.name, holdfastv1.NodeStoresAvailable, "True", "")
		}
		c.configCondition(t, "stores", apiv1.ContainerRuntimeConfigUpdated, "True", "")
	})
	t.Run("a store that one node has not", func(t *testing.T) {
		for _, m := range all[:2] {
			m.ImageStore(t, "/mnt/b", "quay.io/b:1")
		}
		c.config(t, "stores", workerLabel, images("/mnt/a", "/mnt/b"))
		c.updated(t, "worker", "stores")
		all.restarted(t, 1, 1, 0) // it would get nothing by it
		all[0].lists(t, "quay.io/a:1", "quay.io/b:1")
		all[2].lists(t, "quay.io/a:1")
		if got := c.store(t, all[2].name, "/mnt/b"); got != "ImageStore Withheld: it does not exist" {
			t.Errorf("/mnt/b is %s", got)
		}
		const why = "/mnt/b: it does not exist"
		c.nodeSays(t, all[2].name, holdfastv1.NodeStoresAvailable, "False", why)
		c.poolSays(t, "worker", apiv1.PoolStoresAvailable, "False", "/mnt/b")
		c.configCondition(t, "stores", apiv1.ContainerRuntimeConfigStoresAvailable, "False", "worker: nodes do without /mnt/b")
		// It comes.
		all[2].ImageStore(t, "/mnt/b", "quay.io/b:1")
		c.storeIs(t, all[2].name, "/mnt/b", "ImageStore Healthy: ")
		all.restarted(t, 0, 0, 1)
		all[2].lists(t, "quay.io/a:1", "quay.io/b:1")
		c.poolSays(t, "worker", apiv1.PoolStoresAvailable, "True", "")
		c.configCondition(t, "stores", apiv1.ContainerRuntimeConfigStoresAvailable, "True", "")
	})
	t.Run("CRI-O does not start", func(t *testing.T) {
		before := all[0].files(t)
		current := c.state(t, all[0].name).Status.CurrentConfig
		c.config(t, "runtime", workerLabel, "containerRuntimeConfig: {defaultRuntime: runc}") // there is none
		c.poolSays(t, "worker", apiv1.PoolNodeDegraded, "True", "node node-00: crio.service has failed")
		bad := c.pool(t, "worker").Spec.Configuration.Name
		still(t, "one node was told", func() bool { return slices.Equal(c.told(t, bad), numbered(1)) })
		all.restarted(t, 2, 0, 0) // with the new files, and with the old ones
		all[0].lists(t, "quay.io/a:1", "quay.io/b:1")
		if diff := cmp.Diff(before, all[0].files(t)); diff != "" {
			t.Error(diff)
		}
		if s := c.state(t, all[0].name).Status; s.State != holdfastv1.NodeDegraded || s.CurrentConfig != current {
			t.Errorf("%+v", s)
		}
		c.nodeSays(t, all[0].name, holdfastv1.NodeApplied, "False", "crio.service")
		c.configCondition(t, "runtime", apiv1.ContainerRuntimeConfigDegraded, "True", "worker")
		c.config(t, "runtime", workerLabel, "containerRuntimeConfig: {pidsLimit: 100}")
		c.updated(t, "worker", "stores", "runtime")
		all.restarted(t, 1, 1, 1)
		c.configCondition(t, "runtime", apiv1.ContainerRuntimeConfigDegraded, "False", "")
	})
	t.Run("no API server", func(t *testing.T) {
		before := all[1].files(t)
		c.Stop(t)
		time.Sleep(time.Second)
		all[1].Systemd.Kill("crio.service") // which concerns nobody but the node
		if out, code := all[1].Systemd.Do("start", "crio.service"); code != 0 {
			t.Error(out)
		}
		all[1].lists(t, "quay.io/a:1", "quay.io/b:1")
		for _, m := range all {
			if !m.courier.running() || !m.agent.running() {
				t.Errorf("%s: a program has ended", m.name)
			}
			if diff := cmp.Diff(before, m.files(t)); diff != "" {
				t.Errorf("%s: %s", m.name, diff)
			}
		}
		all.restarted(t, 0, 0, 0)
		c.Start(t)
		if !controller.running() {
			controller = startController(all[0].t, c.server) // as a kubelet does
		}
		c.config(t, "runtime", workerLabel, "containerRuntimeConfig: {pidsLimit: 200}")
		c.updated(t, "worker", "stores", "runtime")
		all.restarted(t, 1, 1, 1)
	})
	t.Run("other couriers", func(t *testing.T) {
		l := newLedger(t, c.client, &holdfastv1.ContainerRuntimeNodeList{}, &apiv1.MachineConfigPoolList{})
		for _, m := range all {
			m.courier.end(t)
			m.startCourier()
		}
		for _, m := range all {
			c.eventually(t, "the courier is at work", func(context.Context) error {
				if log, err := os.ReadFile(m.courier.log); err != nil || !strings.Contains(string(log), "the node's object is there") {
					return fmt.Errorf("%s, %w", log, err)
				}
				return nil
			})
		}
		time.Sleep(time.Second) // four looks
		if writes := l.since(); len(writes) > 0 {
			t.Errorf("written:\n%s", show(writes))
		}
		all.restarted(t, 0, 0, 0)
	})
	t.Run("another agent", func(t *testing.T) {
		all[0].agent.end(t)
		c.config(t, "runtime", workerLabel, "containerRuntimeConfig: {pidsLimit: 300}")
		c.poolSays(t, "worker", apiv1.PoolUpdating, "True", "node-00 being updated")
		now := c.pool(t, "worker").Spec.Configuration.Name
		still(t, "the others wait", func() bool { return slices.Equal(c.told(t, now), numbered(1)) })
		all[0].startAgent()
		c.updated(t, "worker", "stores", "runtime")
		all.restarted(t, 1, 1, 1)
	})
	t.Run("deletion", func(t *testing.T) {
		for _, name := range []string{"stores", "runtime"} {
			if err := c.client.Delete(t.Context(), &apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: name}}); err != nil {
				t.Fatal(err)
			}
		}
		if name := c.updated(t, "worker"); name != empty {
			t.Errorf("nodes have %s, had %s", name, empty)
		}
		for _, m := range all {
			m.lists(t)
			if diff := cmp.Diff(m.untouched, m.files(t)); diff != "" {
				t.Errorf("%s: %s", m.name, diff)
			}
			s := c.state(t, m.name).Status
			if len(s.Stores) > 0 || s.State != holdfastv1.NodeDone {
				t.Errorf("%s: %+v", m.name, s)
			}
			// The limit of the courier's container is 64 MiB.
			if mib := peakMemory(t, m.courier.cmd.Process.Pid); mib > 55 {
				t.Errorf("the courier of %s took %.0f MiB", m.name, mib)
			}
		}
	})
}
