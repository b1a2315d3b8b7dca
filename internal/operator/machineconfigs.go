// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

const (
	managedLabel = "app.kubernetes.io/managed-by"
	// disruptionAnnotation is on a rendered MachineConfig that wants nodes to boot.
	disruptionAnnotation = "holdfast.github.io/disruption"
	renderedPrefix       = "rendered-"
)

// ours reports whether we have made an object.
func ours(o client.Object) bool { return o.GetLabels()[managedLabel] == Name }

// generated is the MachineConfig that is made for a pool, by a name.
func generated(pool *apiv1.MachineConfigPool, name string, files []render.File) (*apiv1.MachineConfig, error) {
	mc, err := render.MachineConfig(pool.Name, files)
	if err != nil {
		return nil, err
	}
	mc.Name = name
	mc.Labels[managedLabel] = Name
	owner := metav1.NewControllerRef(pool, apiv1.GroupVersion.WithKind("MachineConfigPool"))
	owner.BlockOwnerDeletion = nil // it would need the right to change the pool's finalizers
	mc.OwnerReferences = []metav1.OwnerReference{*owner}
	return mc, nil
}

// rendered is what nodes are told to have. It is never changed: another configuration has
// another name, as with the Machine Config Operator, so that a node which is given one late, or
// boots in between, gets what was meant. It outlives its pool as long as nodes refer to it.
func rendered(pool *apiv1.MachineConfigPool, files []render.File, disruption apiv1.Disruption) (*apiv1.MachineConfig, error) {
	mc, err := generated(pool, "", files)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(mc.Spec.Config.Raw)
	mc.Name = renderedPrefix + pool.Name + "-" + hex.EncodeToString(sum[:16])
	delete(mc.Labels, apiv1.RoleLabel) // it is not one of those that make up a pool's
	mc.OwnerReferences = nil
	if disruption == apiv1.RebootNode {
		mc.Annotations = map[string]string{disruptionAnnotation: string(disruption)}
	}
	return mc, nil
}

// foreignError means that a MachineConfig by the name that we need is not ours.
type foreignError struct{ name, owner string }

func (e *foreignError) Error() string {
	return fmt.Sprintf("MachineConfig %s belongs to %s: it is left alone, and the pool gets nothing", e.name, e.owner)
}

// ensure makes a MachineConfig what it should be. What others have added beside it stays.
func ensure(ctx context.Context, c client.Client, want *apiv1.MachineConfig) error {
	var have apiv1.MachineConfig
	err := c.Get(ctx, client.ObjectKeyFromObject(want), &have)
	if errors.IsNotFound(err) {
		if err := c.Create(ctx, want); err != nil {
			return fmt.Errorf("creating MachineConfig %s: %w", want.Name, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading MachineConfig %s: %w", want.Name, err)
	}
	if !ours(&have) {
		return &foreignError{have.Name, ownerOf(&have)}
	}
	before := have.DeepCopy()
	have.Labels = merged(have.Labels, want.Labels)
	have.Annotations = merged(have.Annotations, want.Annotations)
	if len(want.OwnerReferences) > 0 {
		have.OwnerReferences = want.OwnerReferences
	}
	if !sameJSON(have.Spec.Config.Raw, want.Spec.Config.Raw) {
		have.Spec = want.Spec
	}
	if same(before, &have) {
		return nil
	}
	if err := c.Patch(ctx, &have, since(before)); err != nil {
		return fmt.Errorf("writing MachineConfig %s: %w", want.Name, err)
	}
	return nil
}

// remove deletes a MachineConfig if it is there, and ours.
func remove(ctx context.Context, c client.Client, name string) error {
	var have apiv1.MachineConfig
	err := c.Get(ctx, client.ObjectKey{Name: name}, &have)
	if err == nil && ours(&have) && have.DeletionTimestamp == nil {
		err = c.Delete(ctx, &have, client.Preconditions{UID: &have.UID})
	}
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("removing MachineConfig %s: %w", name, err)
	}
	return nil
}

// removeUnused deletes rendered MachineConfigs of a pool, and of pools that have gone, that neither
// the pool nor a node refers to any more. Those of other pools it leaves alone: what they refer to
// now, the cache may not have yet.
func (r *poolReconciler) removeUnused(ctx context.Context, pool *apiv1.MachineConfigPool, pools []apiv1.MachineConfigPool, states []holdfastv1.ContainerRuntimeNode) error {
	used := map[string]bool{pool.Spec.Configuration.Name: true, pool.Status.Configuration.Name: true}
	for i := range states {
		used[states[i].Spec.DesiredConfig], used[states[i].Status.CurrentConfig] = true, true
	}
	var all apiv1.MachineConfigList
	if err := r.client.List(ctx, &all, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("listing MachineConfigs: %w", err)
	}
	for i := range all.Items {
		name := all.Items[i].Name
		of := renderedFor(name)
		other := of != pool.Name && slices.ContainsFunc(pools, func(p apiv1.MachineConfigPool) bool { return p.Name == of })
		if ours(&all.Items[i]) && of != "" && !other && !used[name] {
			if err := remove(ctx, r.client, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// renderedFor is the pool that a rendered MachineConfig is of, by its name.
func renderedFor(name string) string {
	rest, ok := strings.CutPrefix(name, renderedPrefix)
	if i := strings.LastIndexByte(rest, '-'); ok && i > 0 {
		return rest[:i]
	}
	return ""
}

func merged(have, want map[string]string) map[string]string {
	if len(want) == 0 {
		return have
	}
	all := maps.Clone(have)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, want)
	return all
}

func ownerOf(o client.Object) string {
	if owner := metav1.GetControllerOf(o); owner != nil {
		return owner.Kind + " " + owner.Name
	}
	return "somebody else"
}

func sameJSON(a, b []byte) bool {
	var va, vb any
	return json.Unmarshal(a, &va) == nil && json.Unmarshal(b, &vb) == nil && reflect.DeepEqual(va, vb)
}
