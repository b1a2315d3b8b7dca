// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// openShiftName is the name of our MachineConfig on OpenShift. Of files with the same path the last
// MachineConfig's counts, by name: it sorts after 99-POOL-generated-containerruntime and its
// numbered siblings. It must not contain their name, or the Machine Config Operator deletes it
// when it is upgraded (container_runtime_config_controller.go, cleanUpDuplicatedMC).
func openShiftName(pool string) string { return "99-" + pool + "-generated-holdfast" }

// fromRuntimeConfig matches what the Machine Config Operator makes of ContainerRuntimeConfigs: the
// same objects that we merge.
var fromRuntimeConfig = regexp.MustCompile(`^99-.+-containerruntime(-[0-9]+)?$`)

// reconcileOpenShift writes the one MachineConfig of a pool, and makes objects for its nodes, in
// which they say how they are. All else is the Machine Config Operator's.
func (r *poolReconciler) reconcileOpenShift(ctx context.Context, pool *apiv1.MachineConfigPool, pools []apiv1.MachineConfigPool, c configuration, nodes membership) error {
	err := r.writeMerged(ctx, pool, &c)
	if err == nil {
		err = r.handOut(ctx, pool.Name, target{}, nodes.members[pool.Name], nil)
	}
	if err == nil {
		err = r.keepPolicy(ctx, pools)
	}
	for _, p := range c.problems {
		if len(p.Objects) == 0 || p.Reason == reasonRender || p.Reason == reasonForeign {
			err = errors.Join(err, fmt.Errorf("pool %s: %s", pool.Name, p.Message)) // tried again, and logged
		}
	}
	return err
}

func (r *poolReconciler) writeMerged(ctx context.Context, pool *apiv1.MachineConfigPool, c *configuration) error {
	name := openShiftName(pool.Name)
	if !c.own {
		return remove(ctx, r.client, name) // what it inherits reaches it as it is
	}
	base, err := r.base(ctx, pool)
	if err != nil {
		return err
	}
	files, err := render.Files(c.spec, base, render.Options{})
	if err != nil {
		c.refuse(reasonRender, err)
		return nil
	}
	object, err := render.Object(pool.Name, c.spec, true)
	if err != nil {
		return err
	}
	mc, err := generated(pool, name, append(files, object))
	if err == nil {
		mc.Spec.Config, err = withStoreDirectories(mc.Spec.Config, c.spec)
	}
	if err != nil {
		return err
	}
	err = ensure(ctx, r.client, mc)
	var foreign *foreignError
	if errors.As(err, &foreign) {
		c.refuse(reasonForeign, err)
		return nil
	}
	return err
}

// base is what the nodes of a pool have without us: what the MachineConfigs that make up the pool
// say, without those that the Machine Config Operator makes of the objects that we merge.
func (r *poolReconciler) base(ctx context.Context, pool *apiv1.MachineConfigPool) (render.Base, error) {
	selector, err := metav1.LabelSelectorAsSelector(pool.Spec.MachineConfigSelector)
	if err != nil {
		return nil, fmt.Errorf("reading machineConfigSelector of pool %s: %w", pool.Name, err)
	}
	var list apiv1.MachineConfigList
	if err := r.client.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("listing MachineConfigs: %w", err)
	}
	var all []*apiv1.MachineConfig
	for i := range list.Items {
		mc := &list.Items[i]
		if selector.Matches(labels.Set(mc.Labels)) && !ours(mc) && !fromRuntimeConfig.MatchString(mc.Name) && mc.DeletionTimestamp == nil {
			all = append(all, mc)
		}
	}
	// Those of worker come before those of a custom pool (pkg/controller/common, MergeMachineConfigs).
	custom := func(mc *apiv1.MachineConfig) int {
		if mc.Labels[apiv1.RoleLabel] == workerPool {
			return 0
		}
		return 1
	}
	slices.SortFunc(all, func(a, b *apiv1.MachineConfig) int {
		if d := custom(a) - custom(b); d != 0 {
			return d
		}
		return strings.Compare(a.Name, b.Name)
	})
	return func(path string) ([]byte, error) {
		for _, mc := range slices.Backward(all) {
			data, err := render.Unpack(mc, path)
			if !errors.Is(err, fs.ErrNotExist) {
				return data, err
			}
		}
		return render.NoBase(path)
	}, nil
}

// withStoreDirectories adds a drop-in for CRI-O's unit that makes the directories of stores which
// are missing: CRI-O does not start without them, and then no pod does.
func withStoreDirectories(config runtime.RawExtension, spec apiv1.ContainerRuntimeConfigSpec) (runtime.RawExtension, error) {
	var paths []string
	paths = append(paths, "/var/lib/holdfast/store")
	for _, s := range spec.ContainerRuntimeConfig.AdditionalLayerStores {
		paths = append(paths, string(s.Path))
	}
	for _, s := range spec.ContainerRuntimeConfig.AdditionalImageStores {
		paths = append(paths, string(s.Path))
	}
	slices.Sort(paths)
	var text strings.Builder
	text.WriteString("# Written by Holdfast: CRI-O does not start if the directory of a store is missing.\n[Service]\n")
	for _, p := range slices.Compact(paths) {
		fmt.Fprintf(&text, "ExecStartPre=-/usr/bin/timeout 5 /usr/bin/mkdir -p %s\n", p)
	}
	var tree map[string]any
	if err := json.Unmarshal(config.Raw, &tree); err != nil {
		return config, fmt.Errorf("adding a drop-in: %w", err)
	}
	tree["systemd"] = map[string]any{"units": []any{map[string]any{
		"name": "crio.service", "dropins": []any{map[string]any{"name": "10-holdfast-stores.conf", "contents": text.String()}},
	}}}
	raw, err := json.Marshal(tree)
	if err != nil {
		return config, fmt.Errorf("adding a drop-in: %w", err)
	}
	return runtime.RawExtension{Raw: raw}, nil
}

// stripMachineConfig leaves out what the Machine Config Operator has rendered: there are many, of
// hundreds of kilobytes each, and all that is in them is in others.
func stripMachineConfig(o any) (any, error) {
	mc, ok := o.(*apiv1.MachineConfig)
	if ok {
		mc.ManagedFields = nil
		if strings.HasPrefix(mc.Name, renderedPrefix) && !ours(mc) {
			mc.Spec = apiv1.MachineConfigSpec{}
		}
	}
	return o, nil
}

// keepPolicy tells the Machine Config Operator what our files need, instead of a reboot of each node
// (operator.openshift.io/v1, MachineConfiguration, spec.nodeDisruptionPolicy), by server-side apply: entries
// of others stay, and an entry for the same path that is somebody else's is left to them. Where an
// object wants nodes to reboot there is no policy.
func (r *poolReconciler) keepPolicy(ctx context.Context, pools []apiv1.MachineConfigPool) error {
	have := &unstructured.Unstructured{}
	have.SetAPIVersion("operator.openshift.io/v1")
	have.SetKind("MachineConfiguration")
	if err := r.client.Get(ctx, client.ObjectKey{Name: "cluster"}, have); err != nil {
		return client.IgnoreNotFound(err)
	}
	objects, err := r.objects(ctx)
	if err != nil {
		return err
	}
	restart := slices.ContainsFunc(pools, func(p apiv1.MachineConfigPool) bool { return len(selecting(objects.objects, &p)) > 0 }) &&
		!slices.ContainsFunc(objects.objects, func(o apiv1.ContainerRuntimeConfig) bool {
			return o.Spec.Holdfast != nil && o.Spec.Holdfast.Disruption == apiv1.RebootNode
		})
	seen := fmt.Sprint(have.GetResourceVersion(), restart)
	if seen == r.policy || !restart && !applied(have) {
		return nil
	}
	want := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "operator.openshift.io/v1", "kind": "MachineConfiguration", "metadata": map[string]any{"name": "cluster"},
	}}
	if restart {
		want.Object["spec"] = map[string]any{"nodeDisruptionPolicy": disruptionPolicy()}
	}
	err = r.client.Apply(ctx, client.ApplyConfigurationFromUnstructured(want), client.FieldOwner(Name))
	if apierrors.IsConflict(err) {
		r.events.Eventf(have, nil, corev1.EventTypeWarning, "NotOurs", "Apply",
			"Another manager has a node disruption policy for files of ours, which counts: %s", short(err.Error()))
		r.policy = seen
		return nil
	}
	if err != nil {
		return fmt.Errorf("writing the node disruption policy: %w", err)
	}
	r.policy = fmt.Sprint(want.GetResourceVersion(), restart)
	return nil
}

// applied reports whether we have written a part of an object.
func applied(o client.Object) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(f metav1.ManagedFieldsEntry) bool {
		return f.Manager == Name && f.Operation == metav1.ManagedFieldsOperationApply
	})
}

// disruptionPolicy is what a change of our files does to a node.
func disruptionPolicy() map[string]any {
	action := func(kind string) map[string]any {
		a := map[string]any{"type": kind}
		switch kind {
		case "Restart":
			a["restart"] = map[string]any{"serviceName": "crio.service"}
		case "Reload":
			a["reload"] = map[string]any{"serviceName": "crio.service"}
		}
		return a
	}
	var files []any
	for path, kind := range map[string]string{
		render.StorageConf: "Restart", render.CRIODropIns: "Restart", render.HookConf: "Reload", render.MirrorsConf: "Reload",
		// The agent follows these.
		render.DaemonConf: "None", render.ClusterObject: "None",
	} {
		files = append(files, map[string]any{"path": path, "actions": []any{action(kind)}})
	}
	slices.SortFunc(files, func(a, b any) int {
		return strings.Compare(fmt.Sprint(a), fmt.Sprint(b))
	})
	return map[string]any{
		"files": files,
		"units": []any{map[string]any{"name": "crio.service", "actions": []any{action("DaemonReload"), action("Restart")}}},
	}
}
