// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// cluster reads what there is, out of the cache.
type cluster struct {
	client   client.Client
	features FeatureSet
}

// pools returns all pools that are there to stay.
func (c *cluster) pools(ctx context.Context) ([]apiv1.MachineConfigPool, error) {
	var list apiv1.MachineConfigPoolList
	if err := c.client.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("listing MachineConfigPools: %w", err)
	}
	var all []apiv1.MachineConfigPool
	for _, p := range list.Items {
		if p.DeletionTimestamp == nil {
			all = append(all, p)
		}
	}
	return all, nil
}

// requests are for all objects of a list.
func (c *cluster) requests(ctx context.Context, list client.ObjectList) []reconcile.Request {
	var all []reconcile.Request
	if err := c.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return nil // it comes from memory
	}
	_ = meta.EachListItem(list, func(o runtime.Object) error {
		if named, err := meta.Accessor(o); err == nil {
			all = append(all, reconcile.Request{NamespacedName: client.ObjectKey{Name: named.GetName()}})
		}
		return nil
	})
	return all
}

// objects returns what can be applied of all ContainerRuntimeConfigs.
func (c *cluster) objects(ctx context.Context) (judged, error) {
	var list apiv1.ContainerRuntimeConfigList
	if err := c.client.List(ctx, &list); err != nil {
		return judged{}, fmt.Errorf("listing ContainerRuntimeConfigs: %w", err)
	}
	return judge(list.Items, c.features), nil
}

// membership finds the pool of each node. The nodes and states are the cache's own, which must
// not be changed: there are many.
func (c *cluster) membership(ctx context.Context, pools []apiv1.MachineConfigPool) (membership, error) {
	var nodes corev1.NodeList
	if err := c.client.List(ctx, &nodes, client.UnsafeDisableDeepCopy); err != nil {
		return membership{}, fmt.Errorf("listing nodes: %w", err)
	}
	var states holdfastv1.ContainerRuntimeNodeList
	if err := c.client.List(ctx, &states, client.UnsafeDisableDeepCopy); err != nil {
		return membership{}, fmt.Errorf("listing ContainerRuntimeNodes: %w", err)
	}
	return assign(pools, nodes.Items, states.Items), nil
}

// since is a patch with what has changed since an object was read. The API server refuses it if
// somebody else has written the object meanwhile.
func since(before client.Object) client.Patch {
	return client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
}
