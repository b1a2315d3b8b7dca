// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/recorder"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// configReconciler says on each ContainerRuntimeConfig what has become of it.
type configReconciler struct {
	cluster
	events   recorder.EventRecorder
	platform Platform
	said     said // on OpenShift: of each object
}

func (r *configReconciler) setUp(mgr manager.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).Named("containerruntimeconfig").
		For(&apiv1.ContainerRuntimeConfig{}).
		// What others say can be at odds with it; what is said on them cannot.
		Watches(&apiv1.ContainerRuntimeConfig{}, handler.EnqueueRequestsFromMapFunc(r.all), builder.WithPredicates(
			predicate.Or(predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{}))).
		Watches(&apiv1.MachineConfigPool{}, handler.EnqueueRequestsFromMapFunc(r.all)).
		Complete(r)
}

func (r *configReconciler) all(ctx context.Context, _ client.Object) []reconcile.Request {
	return r.requests(ctx, &apiv1.ContainerRuntimeConfigList{})
}

// Reconcile implements [reconcile.Reconciler].
func (r *configReconciler) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	var o apiv1.ContainerRuntimeConfig
	if err := r.client.Get(ctx, request.NamespacedName, &o); err != nil {
		delete(r.said, request.Name)
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if o.DeletionTimestamp != nil { // it is in no pool any more, which is no failure
		return reconcile.Result{}, nil
	}
	pools, err := r.pools(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	objects, err := r.objects(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	own := slices.DeleteFunc(objects.problems, func(p render.Problem) bool { return !slices.Contains(p.Objects, o.Name) })
	var in []involved
	for i := range pools {
		c := configure(&pools[i], pools, objects.objects)
		if !c.involves(o.Name) {
			continue
		}
		var refusal *render.Problem
		if r.platform == Kubernetes && !takenFrom(&pools[i], c.refs) {
			if refusal = refused(&pools[i]); refusal == nil {
				// It has not been rendered yet: what is said now would be changed at once.
				return reconcile.Result{}, nil
			}
			refusal.Objects = []string{o.Name}
			c.problems = []render.Problem{*refusal}
		}
		in = append(in, involved{&pools[i], c.problems, refusal != nil})
	}
	if len(in) == 0 && len(own) == 0 {
		// As the Machine Config Operator says it.
		own = []render.Problem{{Objects: []string{o.Name}, Reason: reasonNoPool,
			Message: "could not find any MachineConfigPool set for ContainerRuntimeConfig " + o.Name}}
	}
	s := configStatus(&o, own, in)
	if r.platform == OpenShift {
		r.say(&o, s) // the status is the Machine Config Operator's
		return reconcile.Result{}, nil
	}
	return result(r.report(ctx, &o, s))
}

// takenFrom reports whether a pool's configuration was made of objects as they are now, and its
// status is about that.
func takenFrom(pool *apiv1.MachineConfigPool, refs []apiv1.ObjectReference) bool {
	return pool.Status.ObservedGeneration == pool.Generation && slices.Equal(pool.Spec.Configuration.Source, refs)
}

func (r *configReconciler) report(ctx context.Context, o *apiv1.ContainerRuntimeConfig, s apiv1.ContainerRuntimeConfigStatus) error {
	if same(o.Status, s) {
		return nil
	}
	before := o.DeepCopy()
	o.Status = s
	if err := r.client.Status().Patch(ctx, o, since(before)); err != nil {
		return fmt.Errorf("writing the status of ContainerRuntimeConfig %s: %w", o.Name, err)
	}
	if failed := failure(s); failed != nil && !same(failed, failure(before.Status)) {
		r.events.Eventf(o, nil, corev1.EventTypeWarning, failed.Reason, "Render", "%s", short(failed.Message))
	}
	return nil
}

// say tells of an object's problems by an event, once.
func (r *configReconciler) say(o *apiv1.ContainerRuntimeConfig, s apiv1.ContainerRuntimeConfigStatus) {
	var failed apiv1.ContainerRuntimeConfigCondition
	if f := failure(s); f != nil {
		failed = *f
	}
	if r.said.news(o.Name, failed.Message) {
		r.events.Eventf(o, nil, corev1.EventTypeWarning, failed.Reason, "Render", "%s", short(failed.Message))
	}
}

// failure is the condition that says what has not been rendered, nil if all has.
func failure(s apiv1.ContainerRuntimeConfigStatus) *apiv1.ContainerRuntimeConfigCondition {
	for i := range s.Conditions {
		if s.Conditions[i].Type == apiv1.ContainerRuntimeConfigFailure {
			return &s.Conditions[i]
		}
	}
	return nil
}
