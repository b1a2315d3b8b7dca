// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/recorder"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// poolReconciler brings the nodes of a pool to what the objects that select it say.
type poolReconciler struct {
	cluster
	events   recorder.EventRecorder
	platform Platform
	// written are the generations of nodes' objects that the cache may not have yet.
	written map[types.UID]int64
	policy  string // on OpenShift: what the disruption policy was, and was made of
	said    said   // on OpenShift: of each pool
}

// setUp has a pool reconciled when anything of it may have changed. Most things can concern
// several pools, and there are few: all are looked at.
func (r *poolReconciler) setUp(mgr manager.Manager) error {
	all := handler.EnqueueRequestsFromMapFunc(r.allPools)
	return ctrl.NewControllerManagedBy(mgr).Named("pool").
		For(&apiv1.MachineConfigPool{}).
		// Its nodes, and those of others, may be another's now.
		Watches(&apiv1.MachineConfigPool{}, all, builder.WithPredicates(predicate.Or(predicate.GenerationChangedPredicate{}, predicate.LabelChangedPredicate{}))).
		Watches(&apiv1.ContainerRuntimeConfig{}, all).
		Watches(&apiv1.MachineConfig{}, all).
		Watches(&corev1.Node{}, all, builder.WithPredicates(nodeChanged())).
		Watches(&holdfastv1.ContainerRuntimeNode{}, all).
		Complete(r)
}

// nodeChanged lets events of nodes pass in which something has changed that is looked at: a
// node's heartbeats are many.
func nodeChanged() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		before, ok1 := e.ObjectOld.DeepCopyObject().(*corev1.Node)
		after, ok2 := e.ObjectNew.(*corev1.Node)
		if !ok1 || !ok2 {
			return true
		}
		before.ResourceVersion = after.ResourceVersion
		return !same(before, after)
	}}
}

// allPools is also the pool of an object of ours whose pool has gone: what was made for it goes.
func (r *poolReconciler) allPools(ctx context.Context, o client.Object) []reconcile.Request {
	all := r.requests(ctx, &apiv1.MachineConfigPoolList{})
	pool := renderedFor(o.GetName())
	if owner := metav1.GetControllerOf(o); owner != nil {
		pool = owner.Name
	}
	request := reconcile.Request{NamespacedName: client.ObjectKey{Name: pool}}
	if pool != "" && ours(o) && !slices.Contains(all, request) {
		all = append(all, request)
	}
	return all
}

// Reconcile implements [reconcile.Reconciler].
func (r *poolReconciler) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	pools, err := r.pools(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	at := slices.IndexFunc(pools, func(p apiv1.MachineConfigPool) bool { return p.Name == request.Name })
	nodes, err := r.membership(ctx, pools)
	if err != nil {
		return reconcile.Result{}, err
	}
	if r.behind(nodes.states) {
		return reconcile.Result{RequeueAfter: retry}, nil
	}
	if err := r.release(ctx, request.Name, nodes); err != nil {
		return result(err)
	}
	if at < 0 {
		return result(r.removeAll(ctx, request.Name, pools, nodes))
	}
	objects, err := r.objects(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	pool := &pools[at]
	c := configure(pool, pools, objects.objects)
	if r.platform == OpenShift {
		err = r.reconcileOpenShift(ctx, pool, pools, c, nodes)
	} else {
		err = r.reconcile(ctx, pool, pools, c, nodes)
	}
	return result(err)
}

// behind reports whether the cache has not got all yet that nodes were told. What is decided without it
// could be that more nodes are changed at once than may be.
func (r *poolReconciler) behind(states []holdfastv1.ContainerRuntimeNode) bool {
	waits := map[types.UID]int64{}
	for i := range states {
		if told, ok := r.written[states[i].UID]; ok && states[i].Generation < told {
			waits[states[i].UID] = told
		}
	}
	r.written = waits // what is not there any more is not waited for
	return len(waits) > 0
}

// result is what a reconciliation has come to. Somebody else who was faster is no error.
func result(err error) (reconcile.Result, error) {
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return reconcile.Result{RequeueAfter: retry}, nil
	}
	return reconcile.Result{}, err
}

// release lets go of nodes that were in a pool and are in none now. They stay as they are.
func (r *poolReconciler) release(ctx context.Context, pool string, nodes membership) error {
	for i := range nodes.states {
		s := &nodes.states[i]
		if s.Spec.Pool != pool || nodes.pools[s.Name] != "" {
			continue
		}
		after := s.DeepCopy()
		after.Spec.Pool = ""
		err := r.client.Patch(ctx, after, since(s.DeepCopy()))
		if client.IgnoreNotFound(err) != nil { // it goes with its node
			return fmt.Errorf("letting go of node %s: %w", s.Name, err)
		}
	}
	return nil
}

// removeAll removes what was made for a pool that has gone. Its nodes stay as they are.
func (r *poolReconciler) removeAll(ctx context.Context, pool string, pools []apiv1.MachineConfigPool, nodes membership) error {
	gone := &apiv1.MachineConfigPool{ObjectMeta: metav1.ObjectMeta{Name: pool}}
	return errors.Join(remove(ctx, r.client, r.generatedName(pool)), r.removeUnused(ctx, gone, pools, nodes.states))
}

// generatedName is the name of the MachineConfig that is made for a pool.
func (r *poolReconciler) generatedName(pool string) string {
	if r.platform == OpenShift {
		return openShiftName(pool)
	}
	return render.MachineConfigName(pool)
}

// reconcile writes, in this order: what a pool is to have, that it is to have it, which nodes
// are to have it now, and how far it is. So whatever is referred to is there.
func (r *poolReconciler) reconcile(ctx context.Context, pool *apiv1.MachineConfigPool, pools []apiv1.MachineConfigPool, c configuration, nodes membership) error {
	t, err := r.render(ctx, pool, &c)
	if err != nil {
		return err
	}
	c.problems = append(c.problems, nodes.problems(pool.Name)...)
	members := nodes.members[pool.Name]
	plan := plan(pool, t, members)
	if err := r.handOut(ctx, pool.Name, t, members, plan.next); err != nil {
		return err
	}
	if err := r.report(ctx, pool, poolStatus(pool, t, plan, members, c.problems)); err != nil {
		return err
	}
	return r.removeUnused(ctx, pool, pools, nodes.states)
}

// render writes the MachineConfigs of a pool, and refers to them in it. If they cannot be made
// the pool stays with what it has.
func (r *poolReconciler) render(ctx context.Context, pool *apiv1.MachineConfigPool, c *configuration) (target, error) {
	old := target(pool.Spec.Configuration.Name)
	if c.err != nil {
		c.refuse(reasonRender, c.err)
		return old, nil //nolint:nilerr // the pool says so
	}
	var disruption apiv1.Disruption
	if c.spec.Holdfast != nil {
		disruption = c.spec.Holdfast.Disruption
	}
	files, err := filesOf(pool.Name, c.spec)
	if err != nil {
		c.refuse(reasonRender, err)
		return old, nil
	}
	visible, err := generated(pool, render.MachineConfigName(pool.Name), files)
	if err != nil {
		return old, err
	}
	mc, err := rendered(pool, files, disruption)
	if err != nil {
		return old, err
	}
	if c.own {
		err = ensure(ctx, r.client, visible)
	} else {
		err = remove(ctx, r.client, visible.Name)
	}
	if err == nil {
		err = ensure(ctx, r.client, mc)
	}
	var foreign *foreignError
	switch {
	case errors.As(err, &foreign):
		c.refuse(reasonForeign, err)
		return old, nil
	case apierrors.IsInvalid(err) || apierrors.IsRequestEntityTooLargeError(err):
		c.refuse(reasonRender, err)
		return old, nil
	case err != nil:
		return old, err
	}
	return target(mc.Name), r.refer(ctx, pool, mc.Name, c)
}

// filesOf are the files of a MachineConfig: the configuration itself, which agents read, and for
// people what it makes of a node of which nothing is known.
func filesOf(pool string, spec apiv1.ContainerRuntimeConfigSpec) ([]render.File, error) {
	object, err := render.Object(pool, spec, false)
	if err != nil {
		return nil, err
	}
	files, err := render.Files(spec, render.NoBase, render.Options{})
	return append(files, object), err
}

// refer says in the pool's spec what its nodes are to have.
func (r *poolReconciler) refer(ctx context.Context, pool *apiv1.MachineConfigPool, name string, c *configuration) error {
	want := apiv1.MachineConfigPoolConfiguration{Name: name, Source: c.refs}
	if same(pool.Spec.Configuration, want) {
		return nil
	}
	before := pool.DeepCopy()
	pool.Spec.Configuration = want
	if err := r.client.Patch(ctx, pool, since(before)); err != nil {
		return fmt.Errorf("writing the configuration of pool %s: %w", pool.Name, err)
	}
	if before.Spec.Configuration.Name != name {
		r.events.Eventf(pool, nil, corev1.EventTypeNormal, "ConfigurationChanged", "Render", "%s",
			short(fmt.Sprintf("Nodes are to have %s, made of %s", name, cmp.Or(names(c.sources()), "nothing"))))
	}
	return nil
}

// handOut makes an object for each node that has none, and tells those that are next.
func (r *poolReconciler) handOut(ctx context.Context, pool string, t target, members []member, next []string) error {
	for _, m := range members {
		if m.state == nil {
			if err := r.createState(ctx, m.node, pool); err != nil {
				return err
			}
			continue
		}
		told := slices.Contains(next, m.node.Name)
		if m.state.Spec.Pool == pool && !told {
			continue
		}
		before := m.state.DeepCopy()
		after := m.state.DeepCopy()
		after.Spec.Pool = pool
		if told {
			after.Spec.DesiredConfig = string(t)
			after.Spec.DrainedFor = "" // it may have had this one before
		}
		if err := r.client.Patch(ctx, after, since(before)); err != nil {
			return fmt.Errorf("telling node %s what it is to have: %w", m.node.Name, err)
		}
		r.written[after.UID] = after.Generation
	}
	return nil
}

// createState makes the object of a node, which goes with it.
func (r *poolReconciler) createState(ctx context.Context, node *corev1.Node, pool string) error {
	state := &holdfastv1.ContainerRuntimeNode{
		ObjectMeta: metav1.ObjectMeta{
			Name:            node.Name,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}},
		},
		Spec: holdfastv1.ContainerRuntimeNodeSpec{Pool: pool},
	}
	if err := r.client.Create(ctx, state); err != nil {
		return fmt.Errorf("making the ContainerRuntimeNode of %s: %w", node.Name, err)
	}
	return nil
}

// report writes the status of a pool, and an event for what has changed in it.
func (r *poolReconciler) report(ctx context.Context, pool *apiv1.MachineConfigPool, s apiv1.MachineConfigPoolStatus) error {
	if same(pool.Status, s) {
		return nil
	}
	before := pool.DeepCopy()
	pool.Status = s
	if err := r.client.Status().Patch(ctx, pool, since(before)); err != nil {
		return fmt.Errorf("writing the status of pool %s: %w", pool.Name, err)
	}
	for _, c := range s.Conditions {
		i := slices.IndexFunc(before.Status.Conditions, func(o apiv1.MachineConfigPoolCondition) bool { return o.Type == c.Type })
		if i >= 0 && before.Status.Conditions[i].Status == c.Status {
			continue
		}
		switch {
		case c.Type == apiv1.PoolUpdated && c.Status == metav1.ConditionTrue:
			r.events.Eventf(pool, nil, corev1.EventTypeNormal, c.Reason, "RollOut", "%s", c.Message)
		case (c.Type == apiv1.PoolNodeDegraded || c.Type == apiv1.PoolRenderDegraded) && c.Status == metav1.ConditionTrue,
			c.Type == apiv1.PoolStoresAvailable && c.Status == metav1.ConditionFalse:
			r.events.Eventf(pool, nil, corev1.EventTypeWarning, c.Reason, "RollOut", "%s", short(c.Message))
		}
	}
	return nil
}

// short is a message that fits into an event.
func short(s string) string { return cut(s, maxEvent) }
