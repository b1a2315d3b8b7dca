// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

const (
	workerConfig = "99-worker-generated-holdfast"
	manager      = "holdfast-operator" // what the controller writes as
)

// TestOpenShift: beside a Machine Config Operator the controller writes one MachineConfig a pool, the
// objects in which nodes say how they are, and its node disruption policies.
func TestOpenShift(t *testing.T) {
	t.Parallel()
	c := newOpenShift(t)
	controller := startController(t, c.server, "--platform=auto")
	c.eventually(t, "OpenShift is found", func(context.Context) error { return logged(controller, "platform=openshift") })

	t.Run("nothing yet", func(t *testing.T) {
		for node, pool := range map[string]string{"worker-0": "worker", "worker-1": "worker", "gpu-0": "gpu", "master-0": "master"} {
			c.eventually(t, "there is an object for "+node, func(ctx context.Context) error {
				s := &holdfastv1.ContainerRuntimeNode{}
				err := c.client.Get(ctx, kube.ObjectKey{Name: node}, s)
				if err == nil && (s.Spec.Pool != pool || s.Spec.DesiredConfig != "" || len(s.OwnerReferences) != 1 || s.OwnerReferences[0].Kind != "Node") {
					return fmt.Errorf("%+v", s)
				}
				return err
			})
		}
		if got := c.policies(t); fmt.Sprint(got) != fmt.Sprint(userPolicy()) {
			t.Errorf("%v", got)
		}
	})
	t.Run("merge", func(t *testing.T) { testMerged(t, c) })
	t.Run("policies", func(t *testing.T) { testPolicies(t, c) })
	t.Run("what others change", func(t *testing.T) { testChanges(t, c) })
	t.Run("problems", func(t *testing.T) { testProblems(t, c) })
	t.Run("no writes", func(t *testing.T) {
		l := newLedger(t, c.client, &apiv1.MachineConfigList{}, &holdfastv1.ContainerRuntimeNodeList{}, &apiv1.MachineConfigPoolList{}, &apiv1.ContainerRuntimeConfigList{})
		version := c.machineConfiguration(t).GetResourceVersion()
		stopController(t, controller)
		next := startController(t, c.server, "--platform=auto")
		c.eventually(t, "the next one works", func(context.Context) error { return logged(next, "Starting workers") })
		time.Sleep(time.Second)
		if writes := l.since(); len(writes) > 0 || c.machineConfiguration(t).GetResourceVersion() != version {
			t.Errorf("written:\n%s", show(writes))
		}
		stopController(t, next)
	})
	startController(t, c.server, "--platform=auto")
	t.Run("deletion", func(t *testing.T) { testOpenShiftDeletion(t, c) })
	c.untouched(t)
}

func testMerged(t *testing.T, c *openShift) {
	c.config(t, "cache", workerLabel, images("/mnt/cache"))
	c.config(t, "second", workerLabel, "containerRuntimeConfig: {pidsLimit: 100, additionalImageStores: [{path: /mnt/second}]}")
	c.operated(t, "cache", "", plain(render.StorageConf, generatedStorage))
	c.operated(t, "second", "-1", plain(render.StorageConf, generatedStorage), plain(render.PidsLimitConf, "[crio.runtime]\npids_limit = 99\n"))
	const stores = `additionalimagestores = ["/mnt/cache", "/mnt/second"`
	for pool, base := range map[string]string{"worker": workerStorage, "gpu": gpuStorage} {
		c.fileIs(t, pool, render.StorageConf, stores)
		want := strings.Replace(base, "additionalimagestores = [", stores, 1)
		if text, from := c.file(t, pool, render.StorageConf); text != want || from != "99-"+pool+"-generated-holdfast" {
			t.Errorf("pool %s has from %s\n%s\nwant\n%s", pool, from, text, want)
		}
		if text, _ := c.file(t, pool, render.PidsLimitConf); !strings.Contains(text, "pids_limit = 100") {
			t.Errorf("pool %s has\n%s", pool, text)
		}
		text, _ := c.file(t, pool, render.ClusterObject)
		objects, err := render.Objects("cluster.yaml", strings.NewReader(text))
		if err != nil || len(objects) != 1 || objects[0].Annotations[apiv1.FilesAnnotation] != apiv1.FilesByMachineConfigOperator ||
			!slices.Equal(imageStores(objects[0].Spec), []string{"/mnt/cache", "/mnt/second"}) {
			t.Errorf("%v\n%s", err, text)
		}
	}
	// It counts after all that the Machine Config Operator makes.
	last := c.parts(t, "worker")
	last = slices.DeleteFunc(last, func(mc apiv1.MachineConfig) bool { return !strings.Contains(mc.Name, "-generated-") })
	if name := last[0].Name; name != "99-worker-generated-containerruntime" || last[2].Name != workerConfig {
		t.Errorf("%s comes first, then %s", name, last[2].Name)
	}
	mc := &apiv1.MachineConfig{}
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: workerConfig}, mc); err != nil {
		t.Fatal(err)
	}
	var config struct {
		Ignition struct{ Version string }
		Systemd  struct {
			Units []struct {
				Name    string
				Dropins []struct{ Name, Contents string }
			}
		}
	}
	if err := json.Unmarshal(mc.Spec.Config.Raw, &config); err != nil {
		t.Fatal(err)
	}
	if u := config.Systemd.Units; config.Ignition.Version != "3.2.0" || len(u) != 1 || u[0].Name != "crio.service" || len(u[0].Dropins) != 1 ||
		!strings.Contains(u[0].Dropins[0].Contents, "mkdir -p /mnt/cache\n") || !strings.Contains(u[0].Dropins[0].Contents, "mkdir -p /mnt/second\n") {
		t.Errorf("%+v", config)
	}
	if _, from := c.file(t, "master", render.StorageConf); from != "00-master" {
		t.Errorf("master has it from %s", from)
	}
	c.untouched(t)
}

func testPolicies(t *testing.T, c *openShift) {
	c.policiesAre(t, ourPolicy())
	c.saidOf(t, "MachineConfiguration", "cluster", render.DaemonConf)
	// A user has another opinion of a file.
	c.changeFiles(t, func(files []any) []any {
		for _, f := range files {
			if f := f.(map[string]any); f["path"] == render.StorageConf {
				f["actions"] = []any{map[string]any{"type": "Reboot"}}
			}
		}
		return files
	})
	theirs := ourPolicy()
	theirs[render.StorageConf] = "Reboot"
	c.nudge(t)
	c.saidOf(t, "MachineConfiguration", "cluster", render.StorageConf)
	c.policiesAre(t, theirs)
	c.changeFiles(t, func(files []any) []any {
		return slices.DeleteFunc(files, func(f any) bool { return f.(map[string]any)["path"] == render.StorageConf })
	})
	c.nudge(t)
	c.policiesAre(t, ourPolicy())
	// The API of OpenShift's does not have the field, but the annotation.
	const reboot = "holdfast: {disruption: Reboot}"
	setAnnotation := func(text string) {
		o := &apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: "second"}}
		change(t, c.client, c.client, o, func(o *apiv1.ContainerRuntimeConfig) {
			if o.Annotations = map[string]string{apiv1.SpecAnnotation: text}; text == "" {
				o.Annotations = nil
			}
		})
	}
	setAnnotation(reboot)
	c.policiesAre(t, userPolicy())
	if o := c.machineConfiguration(t); o.Object["spec"].(map[string]any)["managementState"] != "Managed" {
		t.Errorf("%v", o.Object)
	}
	setAnnotation("")
	c.policiesAre(t, ourPolicy())
	c.untouched(t)
}

// nudge is one of the changes of a pool that there are all the time.
func (c *openShift) nudge(t testing.TB) {
	t.Helper()
	c.changePool(t, "worker", func(p *apiv1.MachineConfigPool) {
		p.Annotations = map[string]string{"example.com/now": time.Now().String()}
	})
}

func testChanges(t *testing.T, c *openShift) {
	// The Machine Config Operator is upgraded.
	c.machineConfig(t, "00-worker", "worker", nil, plain(render.StorageConf, strings.Replace(workerStorage, "skip_mount_home", "# upgraded\nskip_mount_home", 1)))
	c.fileIs(t, "worker", render.StorageConf, "# upgraded")
	c.fileIs(t, "worker", render.StorageConf, `["/mnt/cache", "/mnt/second"`)

	mc := &apiv1.MachineConfig{ObjectMeta: metav1.ObjectMeta{Name: workerConfig}}
	change(t, c.client, c.client, mc, func(mc *apiv1.MachineConfig) {
		mc.Spec.Config.Raw = []byte(`{"ignition":{"version":"3.5.0"}}`)
		mc.Annotations = map[string]string{"example.com/mine": "yes"}
	})
	c.fileIs(t, "worker", render.StorageConf, "/mnt/second")
	if err := c.client.Get(t.Context(), kube.ObjectKeyFromObject(mc), mc); err != nil || mc.Annotations["example.com/mine"] != "yes" {
		t.Errorf("%v, %v", mc.Annotations, err)
	}
	if err := c.client.Delete(t.Context(), mc); err != nil {
		t.Fatal(err)
	}
	c.fileIs(t, "worker", render.StorageConf, "/mnt/second")
	// Everybody's heartbeats, and what the Machine Config Operator writes of its own.
	l := newLedger(t, c.client, &apiv1.MachineConfigList{}, &holdfastv1.ContainerRuntimeNodeList{})
	version := c.machineConfiguration(t).GetResourceVersion()
	change(t, c.client.Status(), c.client, &apiv1.MachineConfigPool{ObjectMeta: metav1.ObjectMeta{Name: "worker"}}, func(p *apiv1.MachineConfigPool) {
		p.Status.MachineCount, p.Status.ReadyMachineCount = 2, 2
	})
	setReady(t, c.client, "worker-0", corev1.ConditionFalse)
	setReady(t, c.client, "worker-0", corev1.ConditionTrue)
	time.Sleep(500 * time.Millisecond)
	if writes := l.since(); len(writes) > 0 || c.machineConfiguration(t).GetResourceVersion() != version {
		t.Errorf("written:\n%s", show(writes))
	}
	c.untouched(t)
}

func testProblems(t *testing.T, c *openShift) {
	c.config(t, "cache", workerLabel, "containerRuntimeConfig: {pidsLimit: 50, additionalImageStores: [{path: /mnt/cache}]}")
	for _, name := range []string{"cache", "second"} {
		c.saidOf(t, "ContainerRuntimeConfig", name, "pidsLimit: cache wants 50, second wants 100")
	}
	c.fileIs(t, "worker", render.PidsLimitConf, "pids_limit = 50")
	c.config(t, "cache", workerLabel, images("/mnt/cache"))
	c.fileIs(t, "worker", render.PidsLimitConf, "pids_limit = 100")

	// A base that cannot be read leaves nodes what they have.
	c.machineConfig(t, "00-worker", "worker", nil, plain(render.StorageConf, "[storage"))
	c.saidOf(t, "MachineConfigPool", "worker", render.StorageConf)
	if text, _ := c.file(t, "worker", render.StorageConf); !strings.Contains(text, "/mnt/second") {
		t.Errorf("storage.conf is\n%s", text)
	}
	c.machineConfig(t, "00-worker", "worker", nil, plain(render.StorageConf, workerStorage))

	// A user's MachineConfig that counts after ours.
	c.machineConfig(t, "99-worker-site", "worker", nil, plain(render.StorageConf, workerStorage+"# the site's\n"))
	c.saidOf(t, "MachineConfigPool", "worker", "MachineConfig 99-worker-site has "+render.StorageConf)
	mc := &apiv1.MachineConfig{ObjectMeta: metav1.ObjectMeta{Name: "99-worker-site"}}
	if err := c.client.Delete(t.Context(), mc); err != nil {
		t.Fatal(err)
	}
	// By the name of what the Machine Config Operator makes, but a user's.
	c.machineConfig(t, "99-worker-containerruntime", "worker", c.pool(t, "worker"), plain(render.StorageConf, workerStorage+"# the site's\n"))
	c.fileIs(t, "worker", render.StorageConf, "# the site's")
	c.fileIs(t, "worker", render.StorageConf, "/mnt/second")
	mc.Name = "99-worker-containerruntime"
	if err := c.client.Delete(t.Context(), mc); err != nil {
		t.Fatal(err)
	}
	c.eventually(t, "it is gone from ours", func(context.Context) error {
		if text, _ := c.file(t, "worker", render.StorageConf); strings.Contains(text, "# the site's") {
			return errors.New(text)
		}
		return nil
	})
	c.untouched(t)
}

func testOpenShiftDeletion(t *testing.T, c *openShift) {
	// What nodes have, as the Machine Config Operator says it.
	nodesHave := func(sources ...string) {
		for _, pool := range []string{"worker", "gpu"} {
			change(t, c.client.Status(), c.client, &apiv1.MachineConfigPool{ObjectMeta: metav1.ObjectMeta{Name: pool}}, func(p *apiv1.MachineConfigPool) {
				p.Status.Configuration = apiv1.MachineConfigPoolConfiguration{Name: "rendered-" + pool + "-x"}
				for _, s := range sources {
					p.Status.Configuration.Source = append(p.Status.Configuration.Source, apiv1.ObjectReference{APIVersion: "machineconfiguration.openshift.io/v1", Kind: "MachineConfig", Name: s})
				}
			})
		}
	}
	nodesHave("00-worker", workerConfig)
	for _, name := range []string{"cache", "second"} {
		if err := c.client.Delete(t.Context(), &apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, pool := range []string{"worker", "gpu"} {
		c.eventually(t, "the MachineConfig of "+pool+" goes", func(ctx context.Context) error {
			err := c.client.Get(ctx, kube.ObjectKey{Name: "99-" + pool + "-generated-holdfast"}, &apiv1.MachineConfig{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			return fmt.Errorf("it is there, %w", err)
		})
	}
	// Nodes are rid of the files without a reboot, too.
	still(t, "the policies stay", func() bool { return fmt.Sprint(c.policies(t)) == fmt.Sprint(ourPolicy()) })
	nodesHave("00-worker")
	c.policiesAre(t, userPolicy())
}
