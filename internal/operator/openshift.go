// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
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
func openShiftName(pool string) string { return "99-" + pool + openShiftSuffix }

const openShiftSuffix = "-generated-holdfast"

// runtimeConfigName matches the names of what the Machine Config Operator makes of
// ContainerRuntimeConfigs.
var runtimeConfigName = regexp.MustCompile(`^99-.+-containerruntime(-[0-9]+)?$`)

// fromRuntimeConfig reports whether the Machine Config Operator has made something of the same objects
// that we merge. It says so itself; what says nothing is known by its name.
func fromRuntimeConfig(mc *apiv1.MachineConfig) bool {
	if owner := metav1.GetControllerOf(mc); owner != nil {
		return owner.Kind == "ContainerRuntimeConfig"
	}
	return runtimeConfigName.MatchString(mc.Name)
}

// reconcileOpenShift writes the one MachineConfig of a pool, and makes objects for its nodes, in
// which they say how they are. All else is the Machine Config Operator's.
func (r *poolReconciler) reconcileOpenShift(ctx context.Context, pool *apiv1.MachineConfigPool, pools []apiv1.MachineConfigPool, c configuration, nodes membership) error {
	// The policy first: it has to be there when a node gets files that are new to it.
	err := r.keepPolicy(ctx, pools)
	problem, failed := r.writeMerged(ctx, pool, &c)
	r.tell(pool, problem)
	return errors.Join(err, failed, r.handOut(ctx, pool.Name, "", nodes.members[pool.Name], nil))
}

// tell says by an event, once, what is wrong with a pool's MachineConfig. What is wrong with the objects
// is said on these.
func (r *poolReconciler) tell(pool *apiv1.MachineConfigPool, p *render.Problem) {
	message := ""
	if p != nil {
		message = p.Message
	}
	if r.said.news(pool.Name, message) {
		r.events.Eventf(pool, nil, corev1.EventTypeWarning, p.Reason, "Render", "%s", short(message))
	}
}

// writeMerged writes the MachineConfig of a pool. It is also written if all is inherited: what a custom
// pool's own MachineConfigs say counts after worker's, file by file, and would be without our
// settings. The problem is one that somebody has to do something about.
func (r *poolReconciler) writeMerged(ctx context.Context, pool *apiv1.MachineConfigPool, c *configuration) (*render.Problem, error) {
	name := openShiftName(pool.Name)
	if len(c.refs) == 0 {
		return nil, remove(ctx, r.client, name)
	}
	made, err := r.madeOf(ctx, pool)
	if err != nil {
		return nil, err
	}
	files, err := render.Files(c.spec, made.base, render.Options{})
	if err != nil {
		return &render.Problem{Reason: reasonRender, Message: err.Error()}, nil //nolint:nilerr // the problem says so
	}
	object, err := render.Object(pool.Name, c.spec, true)
	if err != nil {
		return nil, err
	}
	files = append(files, object)
	mc, err := generated(pool, name, files)
	if err == nil {
		mc.Spec.Config, err = withStoreDirectories(mc.Spec.Config, c.spec)
	}
	if err != nil {
		return nil, err
	}
	err = ensure(ctx, r.client, mc)
	var foreign *foreignError
	if errors.As(err, &foreign) {
		return &render.Problem{Reason: reasonForeign, Message: err.Error()}, nil
	}
	if err != nil {
		return nil, err
	}
	return made.overriding(mc, files), nil
}

// parts are the MachineConfigs of others that make up a pool's, in the order in which they count: of
// a file the last one's does.
type parts []*apiv1.MachineConfig

// madeOf finds what makes up a pool, without ours, and without what the Machine Config Operator makes of the
// objects that we merge.
func (r *poolReconciler) madeOf(ctx context.Context, pool *apiv1.MachineConfigPool) (parts, error) {
	selector, err := metav1.LabelSelectorAsSelector(pool.Spec.MachineConfigSelector)
	if err != nil {
		return nil, fmt.Errorf("reading machineConfigSelector of pool %s: %w", pool.Name, err)
	}
	var list apiv1.MachineConfigList
	if err := r.client.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("listing MachineConfigs: %w", err)
	}
	var all parts
	for i := range list.Items {
		mc := &list.Items[i]
		if selector.Matches(labels.Set(mc.Labels)) && !ours(mc) && !fromRuntimeConfig(mc) && mc.DeletionTimestamp == nil {
			all = append(all, mc)
		}
	}
	slices.SortFunc(all, inOrder)
	return all, nil
}

// inOrder compares MachineConfigs of a pool: those of worker come before those of a custom pool
// (pkg/controller/common, MergeMachineConfigs).
func inOrder(a, b *apiv1.MachineConfig) int {
	custom := func(mc *apiv1.MachineConfig) int {
		if mc.Labels[apiv1.RoleLabel] == workerPool {
			return 0
		}
		return 1
	}
	return cmp.Or(custom(a)-custom(b), strings.Compare(a.Name, b.Name))
}

// base is what the nodes of a pool have without us.
func (all parts) base(path string) ([]byte, error) {
	for _, mc := range slices.Backward(all) {
		data, err := render.Unpack(mc, path)
		if !errors.Is(err, fs.ErrNotExist) {
			return data, err
		}
	}
	return render.NoBase(path)
}

// overriding is the problem that a user's MachineConfig counts after ours, and has a file that is in
// ours: nodes get that one.
func (all parts) overriding(mc *apiv1.MachineConfig, files []render.File) *render.Problem {
	for _, other := range all {
		if inOrder(other, mc) < 0 {
			continue
		}
		for _, f := range files {
			if _, err := render.Unpack(other, f.Path); !errors.Is(err, fs.ErrNotExist) {
				return &render.Problem{Reason: "Overridden", Message: fmt.Sprintf(
					"MachineConfig %s has %s, too, and counts after %s: nodes get that file, without what ContainerRuntimeConfigs say. Give it a name that sorts before", other.Name, f.Path, mc.Name)}
			}
		}
	}
	return nil
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
// of others stay, and what they say of files of ours counts.
func (r *poolReconciler) keepPolicy(ctx context.Context, pools []apiv1.MachineConfigPool) error {
	have := machineConfiguration()
	if err := r.client.Get(ctx, client.ObjectKeyFromObject(have), have); err != nil {
		return client.IgnoreNotFound(err)
	}
	objects, err := r.objects(ctx)
	if err != nil {
		return err
	}
	wanted := wantsPolicy(pools, objects.objects)
	state := func(o *unstructured.Unstructured) string { return fmt.Sprint(o.GetUID(), o.GetGeneration(), wanted) }
	if state(have) == r.policy || !wanted && !applied(have) {
		return nil
	}
	want := policyObject(wanted, nil)
	err = r.client.Apply(ctx, client.ApplyConfigurationFromUnstructured(want), client.FieldOwner(Name))
	if apierrors.IsConflict(err) {
		r.events.Eventf(have, nil, corev1.EventTypeWarning, reasonForeign, "Apply", "%s",
			short(fmt.Sprintf("Another manager has a node disruption policy for files of ours, which counts: %v", err)))
		theirs := entriesOf(have, conflicts(err))
		if len(theirs) == 0 {
			r.policy = state(have)
			return nil
		}
		want = policyObject(wanted, theirs)
		err = r.client.Apply(ctx, client.ApplyConfigurationFromUnstructured(want), client.FieldOwner(Name))
	}
	if err != nil {
		return fmt.Errorf("writing the node disruption policy: %w", err)
	}
	r.policy = state(want)
	return nil
}

func machineConfiguration() *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "operator.openshift.io/v1", "kind": "MachineConfiguration", "metadata": map[string]any{"name": "cluster"},
	}}
}

// wantsPolicy reports whether nodes have files of ours, or are to have some, and no object wants nodes to
// reboot for them. Until a pool is rid of the files it needs the policy.
func wantsPolicy(pools []apiv1.MachineConfigPool, objects []apiv1.ContainerRuntimeConfig) bool {
	isOurs := func(o apiv1.ObjectReference) bool { return strings.HasSuffix(o.Name, openShiftSuffix) }
	used := false
	for i := range pools {
		p := &pools[i]
		c := configure(p, pools, objects)
		if c.spec.Holdfast != nil && c.spec.Holdfast.Disruption == apiv1.RebootNode {
			return false
		}
		used = used || len(c.refs) > 0 || slices.ContainsFunc(p.Spec.Configuration.Source, isOurs) ||
			slices.ContainsFunc(p.Status.Configuration.Source, isOurs)
	}
	return used
}

// conflictEntry finds the entry in what an API server says of a conflict:
// .spec.nodeDisruptionPolicy.files[path="/etc/containers/storage.conf"].actions
var conflictEntry = regexp.MustCompile(`\[(?:path|name)="([^"]+)"\]`)

// conflicts are the paths and units of entries that somebody else has.
func conflicts(err error) []string {
	var status apierrors.APIStatus
	if !errors.As(err, &status) || status.Status().Details == nil {
		return nil
	}
	var all []string
	for _, cause := range status.Status().Details.Causes {
		if m := conflictEntry.FindStringSubmatch(cause.Field); m != nil {
			all = append(all, m[1])
		}
	}
	return all
}

// applied reports whether we have written a part of an object.
func applied(o client.Object) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(f metav1.ManagedFieldsEntry) bool {
		return f.Manager == Name && f.Operation == metav1.ManagedFieldsOperationApply
	})
}

// entriesOf are the actions of entries of a MachineConfiguration, by path or name.
func entriesOf(o *unstructured.Unstructured, names []string) map[string]any {
	all := map[string]any{}
	for _, list := range [][2]string{{"files", "path"}, {"units", "name"}} {
		entries, _, err := unstructured.NestedSlice(o.Object, "spec", "nodeDisruptionPolicy", list[0])
		if err != nil {
			continue // its definition does not allow that
		}
		for _, e := range entries {
			entry, _ := e.(map[string]any)
			if name, ok := entry[list[1]].(string); ok && slices.Contains(names, name) {
				all[name] = entry["actions"]
			}
		}
	}
	return all
}

// policyObject is what a change of our files does to a node, if it is to be said. What others say of the
// same files is said with them: an entry that was ours before they changed it would go if we did not.
func policyObject(wanted bool, others map[string]any) *unstructured.Unstructured {
	object := machineConfiguration()
	if !wanted {
		return object
	}
	const crio = "crio.service"
	actions := map[string]map[string]any{
		"None":         {"type": "None"},
		"DaemonReload": {"type": "DaemonReload"},
		"Reload":       {"type": "Reload", "reload": map[string]any{"serviceName": crio}},
		"Restart":      {"type": "Restart", "restart": map[string]any{"serviceName": crio}},
	}
	entries := func(key string, of map[string][]string) []any {
		all := []any{}
		for _, name := range slices.Sorted(maps.Keys(of)) {
			var list []any
			for _, kind := range of[name] {
				list = append(list, actions[kind])
			}
			entry := map[string]any{key: name, "actions": list}
			if theirs, ok := others[name]; ok {
				entry["actions"] = theirs
			}
			all = append(all, entry)
		}
		return all
	}
	object.Object["spec"] = map[string]any{"nodeDisruptionPolicy": map[string]any{
		"files": entries("path", map[string][]string{
			render.StorageConf: {"Restart"}, render.CRIODropIns: {"Restart"}, render.HookConf: {"Reload"}, render.MirrorsConf: {"Reload"},
			// The agent follows these.
			render.DaemonConf: {"None"}, render.ClusterObject: {"None"},
		}),
		"units": entries("name", map[string][]string{crio: {"DaemonReload", "Restart"}}),
	}}
	return object
}
