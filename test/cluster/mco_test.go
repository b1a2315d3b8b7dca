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

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

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
