// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// What MachineConfigs of a cluster hold. Of the first all stays that is not ours to set.
const (
	workerStorage = `# The Machine Config Operator's.
[storage]
driver = "overlay"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
of_a_newer_version = "yes" # nobody here knows what it is

[storage.options]
additionalimagestores = [
]

[storage.options.overlay]
skip_mount_home = "true"
`
	gpuStorage       = "# The site's, for GPUs.\n" + workerStorage
	generatedStorage = "[storage]\n  driver = \"overlay\"\n  [storage.options]\n    additionalimagestores = [\"/mnt/of-one-object\"]\n"
)

// ignitionFile is a file of a MachineConfig.
type ignitionFile struct{ path, source, compression string }

func plain(path, text string) ignitionFile {
	return ignitionFile{path: path, source: "data:," + url.PathEscape(text)}
}

func zipped(t testing.TB, path, text string) ignitionFile {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return ignitionFile{path, "data:;base64," + base64.StdEncoding.EncodeToString(b.Bytes()), "gzip"}
}

// openShift is a cluster of OpenShift's, as far as API servers go: the test is its Machine Config Operator.
type openShift struct{ *cluster }

// machineConfig writes one of the Machine Config Operator's, or of a user's.
func (c *openShift) machineConfig(t testing.TB, name, role string, owner kube.Object, files ...ignitionFile) {
	t.Helper()
	list := []any{}
	for _, f := range files {
		contents := map[string]any{"source": f.source}
		if f.compression != "" {
			contents["compression"] = f.compression
		}
		list = append(list, map[string]any{"path": f.path, "mode": 0o644, "overwrite": true, "contents": contents})
	}
	raw, err := json.Marshal(map[string]any{"ignition": map[string]any{"version": "3.5.0"}, "storage": map[string]any{"files": list}})
	if err != nil {
		t.Fatal(err)
	}
	mc := &apiv1.MachineConfig{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if role != "" {
		mc.Labels = map[string]string{apiv1.RoleLabel: role}
	}
	if owner != nil {
		gvk, err := c.client.GroupVersionKindFor(owner)
		if err != nil {
			t.Fatal(err)
		}
		mc.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(owner, gvk)}
	}
	mc.Spec.Config.Raw = raw
	err = c.client.Create(t.Context(), mc)
	if apierrors.IsAlreadyExists(err) {
		change(t, c.client, c.client, mc, func(mc *apiv1.MachineConfig) { mc.Spec.Config.Raw = raw })
		return
	}
	if err != nil {
		t.Fatal(err)
	}
}

// parts are the MachineConfigs that make up a pool's, in the order in which the Machine Config Operator merges
// them (pkg/controller/common, MergeMachineConfigs).
func (c *openShift) parts(t testing.TB, pool string) []apiv1.MachineConfig {
	t.Helper()
	selector, err := metav1.LabelSelectorAsSelector(c.pool(t, pool).Spec.MachineConfigSelector)
	if err != nil {
		t.Fatal(err)
	}
	var list apiv1.MachineConfigList
	if err := c.client.List(t.Context(), &list, kube.MatchingLabelsSelector{Selector: selector}); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(list.Items, func(a, b apiv1.MachineConfig) int {
		worker := labels.SelectorFromSet(labels.Set{apiv1.RoleLabel: "worker"})
		if w := worker.Matches(labels.Set(a.Labels)); w != worker.Matches(labels.Set(b.Labels)) {
			if w {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Name, b.Name)
	})
	return list.Items
}

// file is what the nodes of a pool get at a path, and from which MachineConfig.
func (c *openShift) file(t testing.TB, pool, path string) (text, from string) {
	t.Helper()
	for _, mc := range slices.Backward(c.parts(t, pool)) {
		data, err := render.Unpack(&mc, path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return string(data), mc.Name
	}
	return "", ""
}

// fileIs waits until the nodes of a pool get a file that has a text.
func (c *openShift) fileIs(t testing.TB, pool, path, text string) {
	t.Helper()
	c.eventually(t, fmt.Sprintf("%s of pool %s has %q", path, pool, text), func(context.Context) error {
		if got, from := c.file(t, pool, path); !strings.Contains(got, text) {
			return fmt.Errorf("from %s it has\n%s", from, got)
		}
		return nil
	})
}

// untouched checks that nothing was written that is others'.
func (c *openShift) untouched(t testing.TB) {
	t.Helper()
	for _, list := range []kube.ObjectList{&apiv1.MachineConfigPoolList{}, &apiv1.ContainerRuntimeConfigList{}, &apiv1.MachineConfigList{}, &corev1.NodeList{}} {
		if err := c.client.List(t.Context(), list); err != nil {
			t.Fatal(err)
		}
		err := meta.EachListItem(list, func(item runtime.Object) error {
			o, ok := item.(kube.Object)
			if !ok || o.GetLabels()["app.kubernetes.io/managed-by"] == manager {
				return nil
			}
			for _, m := range o.GetManagedFields() {
				if m.Manager == manager {
					t.Errorf("%s was written: %s", key(o), m.FieldsV1)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// saidOf waits for a warning about an object that has a text.
func (c *openShift) saidOf(t testing.TB, kind, name, text string) {
	t.Helper()
	c.eventually(t, fmt.Sprintf("there is a warning about %s %s: %q", kind, name, text), func(ctx context.Context) error {
		var list corev1.EventList
		if err := c.client.List(ctx, &list); err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.Type == corev1.EventTypeWarning && e.InvolvedObject.Kind == kind && e.InvolvedObject.Name == name && strings.Contains(e.Message, text) {
				return nil
			}
		}
		return errors.New("there is none")
	})
}

// policies are what the node disruption policies say of files and units, by path and name.
func (c *openShift) policies(t testing.TB) map[string]string {
	t.Helper()
	o := c.machineConfiguration(t)
	all := map[string]string{}
	for _, list := range [][2]string{{"files", "path"}, {"units", "name"}} {
		entries, _, err := unstructured.NestedSlice(o.Object, "spec", "nodeDisruptionPolicy", list[0])
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			entry, ok := e.(map[string]any)
			actions, isList := entry["actions"].([]any)
			if !ok || !isList {
				t.Fatalf("%v", e)
			}
			var kinds []string
			for _, a := range actions {
				kind, _, _ := unstructured.NestedString(a.(map[string]any), "type")
				kinds = append(kinds, kind)
			}
			all[fmt.Sprint(entry[list[1]])] = strings.Join(kinds, ",")
		}
	}
	return all
}

func (c *openShift) machineConfiguration(t testing.TB) *unstructured.Unstructured {
	t.Helper()
	o := &unstructured.Unstructured{}
	o.SetAPIVersion("operator.openshift.io/v1")
	o.SetKind("MachineConfiguration")
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: "cluster"}, o); err != nil {
		t.Fatal(err)
	}
	return o
}

// changeFiles changes the entries of files as `oc edit` does.
func (c *openShift) changeFiles(t testing.TB, f func([]any) []any) {
	t.Helper()
	change(t, c.client, c.client, c.machineConfiguration(t), func(o *unstructured.Unstructured) {
		files, _, err := unstructured.NestedSlice(o.Object, "spec", "nodeDisruptionPolicy", "files")
		if err == nil {
			err = unstructured.SetNestedSlice(o.Object, f(files), "spec", "nodeDisruptionPolicy", "files")
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}

func (c *openShift) policiesAre(t testing.TB, want map[string]string) {
	t.Helper()
	c.eventually(t, fmt.Sprintf("the policies are %v", want), func(context.Context) error {
		if got := c.policies(t); fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
}

// userPolicy is what a user has said, ourPolicy the same with what Holdfast's files need.
func userPolicy() map[string]string {
	return map[string]string{"/etc/chrony.conf": "Restart", render.DaemonConf: "Drain"}
}

func ourPolicy() map[string]string {
	all := map[string]string{
		render.StorageConf: "Restart", render.CRIODropIns: "Restart", render.HookConf: "Reload", render.MirrorsConf: "Reload",
		render.ClusterObject: "None", "crio.service": "DaemonReload,Restart",
	}
	maps.Copy(all, userPolicy())
	return all
}

func newOpenShift(t testing.TB) *openShift {
	t.Helper()
	c := &openShift{newEmptyCluster(t, "openshift")}
	for _, name := range []string{"machineconfigurations.yaml", "openshift.yaml"} {
		data, err := os.ReadFile("testdata/" + name)
		if err != nil {
			t.Fatal(err)
		}
		c.Apply(t, data)
	}
	const worker, gpu = "node-role.kubernetes.io/worker", "node-role.kubernetes.io/gpu"
	makeNodes(t, c.client, map[string]string{worker: ""}, "worker-0", "worker-1")
	makeNodes(t, c.client, map[string]string{worker: "", gpu: ""}, "gpu-0")
	makeNodes(t, c.client, map[string]string{"node-role.kubernetes.io/master": ""}, "master-0")
	c.machineConfig(t, "00-master", "master", nil, plain(render.StorageConf, workerStorage))
	c.machineConfig(t, "00-worker", "worker", nil, plain(render.StorageConf, workerStorage), plain("/etc/chrony.conf", "pool example.com\n"))
	c.machineConfig(t, "01-worker-container-runtime", "worker", nil, plain("/etc/crio/crio.conf.d/00-default", "[crio.runtime]\npids_limit = 11\n"))
	c.machineConfig(t, "98-gpu-site", "gpu", nil, zipped(t, render.StorageConf, gpuStorage))
	c.machineConfig(t, "99-worker-generated-registries", "worker", nil, plain("/etc/containers/registries.conf", ""))
	c.machineConfig(t, "99-worker-ssh", "worker", nil)
	c.machineConfig(t, "rendered-worker-0123456789abcdef0123456789abcdef", "", c.pool(t, "worker"), plain(render.StorageConf, "# not this\n"))
	return c
}

// operated does what the Machine Config Operator does with a new object: it makes its own MachineConfig
// of it.
func (c *openShift) operated(t testing.TB, object, suffix string, files ...ignitionFile) {
	t.Helper()
	o := &apiv1.ContainerRuntimeConfig{}
	if err := c.client.Get(t.Context(), kube.ObjectKey{Name: object}, o); err != nil {
		t.Fatal(err)
	}
	c.machineConfig(t, "99-worker-generated-containerruntime"+suffix, "worker", o, files...)
}

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
