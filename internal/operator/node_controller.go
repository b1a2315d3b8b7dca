// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubectl/pkg/drain"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/recorder"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// cordonedAnnotation says on a node that we have cordoned it, and for which configuration first. A node
// that somebody else has cordoned stays so.
const cordonedAnnotation = "holdfast.github.io/cordoned"

const (
	// drainRound is how long evictions are waited for before somebody else has a turn, and
	// drainPause how long until the next round. There is no end to it: disruption budgets count.
	drainRound = time.Minute
	drainPause = 10 * time.Second
	drains     = 8 // at once
)

// nodeReconciler cordons and drains nodes that are given a configuration for which they boot,
// and uncordons them when they have it.
type nodeReconciler struct {
	client client.Client
	events recorder.EventRecorder
	pods   kubernetes.Interface
	// namespace is the controller's.
	namespace string
}

func newNodeReconciler(mgr manager.Manager, events recorder.EventRecorder, namespace string) (*nodeReconciler, error) {
	pods, err := kubernetes.NewForConfigAndClient(mgr.GetConfig(), mgr.GetHTTPClient())
	if err != nil {
		return nil, fmt.Errorf("connecting to the API server: %w", err)
	}
	return &nodeReconciler{client: mgr.GetClient(), events: events, pods: pods, namespace: namespace}, nil
}

func (r *nodeReconciler) setUp(mgr manager.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).Named("node").
		For(&holdfastv1.ContainerRuntimeNode{}).
		Watches(&corev1.Node{}, &handler.EnqueueRequestForObject{}, builder.WithPredicates(nodeChanged())). // they have the same names
		WithOptions(controller.Options{MaxConcurrentReconciles: drains}).
		Complete(r)
}

// Reconcile implements [reconcile.Reconciler].
func (r *nodeReconciler) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	var state holdfastv1.ContainerRuntimeNode // without one there is nothing to boot for
	if err := r.client.Get(ctx, request.NamespacedName, &state); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, err
	}
	var node corev1.Node
	if err := r.client.Get(ctx, request.NamespacedName, &node); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	boots, err := r.boots(ctx, &state)
	if err != nil {
		return reconcile.Result{}, err
	}
	switch {
	case boots && state.Spec.DrainedFor != state.Spec.DesiredConfig && asksForDrain(&state):
		return r.drain(ctx, &state, &node)
	case node.Annotations[cordonedAnnotation] == "":
	case !node.Spec.Unschedulable: // somebody was faster; what they cordon next is theirs
		return result(r.uncordon(ctx, &node))
	case !boots && ready(&node):
		return result(r.uncordon(ctx, &node))
	}
	return reconcile.Result{}, nil
}

// boots reports whether a node has been given a configuration for which it boots, and has not
// come to an end with it.
func (r *nodeReconciler) boots(ctx context.Context, s *holdfastv1.ContainerRuntimeNode) (bool, error) {
	settled := s.Status.ObservedGeneration == s.Generation && s.Status.State != holdfastv1.NodeWorking
	if s.Spec.DesiredConfig == "" || settled {
		return false, nil
	}
	var mc apiv1.MachineConfig
	err := r.client.Get(ctx, client.ObjectKey{Name: s.Spec.DesiredConfig}, &mc)
	if apierrors.IsNotFound(err) {
		return true, nil // the cache may not have it yet; if there is none, its courier says so
	}
	return mc.Annotations[disruptionAnnotation] == string(apiv1.RebootNode), err
}

// asksForDrain reports whether a node's courier waits for it. One that is away, that cannot bring the
// configuration, or whose node has it already, does not: such a node is not drained for nothing.
func asksForDrain(s *holdfastv1.ContainerRuntimeNode) bool {
	c := meta.FindStatusCondition(s.Status.Conditions, holdfastv1.NodeApplied)
	return c != nil && c.Reason == holdfastv1.ReasonWaitsForDrain && s.Status.ObservedGeneration == s.Generation
}

func (r *nodeReconciler) drain(ctx context.Context, state *holdfastv1.ContainerRuntimeNode, node *corev1.Node) (reconcile.Result, error) {
	config := state.Spec.DesiredConfig
	only, err := r.only(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	if !only {
		if err = r.cordon(ctx, node, config); err != nil {
			return result(err)
		}
		err = r.evict(ctx, node.Name)
	}
	if ctx.Err() != nil {
		return reconcile.Result{}, ctx.Err()
	}
	if err != nil {
		r.events.Eventf(node, state, corev1.EventTypeWarning, "DrainWaits", "Drain", "%s", short(fmt.Sprintf("Draining for %s: %v", config, err)))
		return reconcile.Result{RequeueAfter: drainPause}, nil
	}
	before := state.DeepCopy()
	state.Spec.DrainedFor = config
	if err := r.client.Patch(ctx, state, since(before)); err != nil {
		return result(fmt.Errorf("noting that node %s is drained: %w", node.Name, err))
	}
	if !only {
		r.events.Eventf(node, state, corev1.EventTypeNormal, "Drained", "Drain", "Drained for %s", config)
	}
	return reconcile.Result{}, nil
}

// only reports whether there is one node in the cluster: its pods have nowhere to go, and wait for it to
// boot. The Machine Config Operator does not drain such a node either (pkg/daemon, drainRequired).
func (r *nodeReconciler) only(ctx context.Context) (bool, error) {
	var nodes corev1.NodeList
	if err := r.client.List(ctx, &nodes, client.UnsafeDisableDeepCopy); err != nil {
		return false, fmt.Errorf("counting nodes: %w", err)
	}
	return len(nodes.Items) == 1, nil
}

// evict moves the pods of a node elsewhere, as `kubectl drain --ignore-daemonsets
// --delete-emptydir-data --force` does, and as the Machine Config Operator does.
func (r *nodeReconciler) evict(ctx context.Context, node string) error {
	helper := &drain.Helper{
		Ctx: ctx, Client: r.pods, Force: true, IgnoreAllDaemonSets: true, DeleteEmptyDirData: true,
		GracePeriodSeconds: -1, Timeout: drainRound, Out: io.Discard, ErrOut: io.Discard,
		AdditionalFilters: []drain.PodFilter{r.isController},
	}
	list, errs := helper.GetPodsForDeletion(node)
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	return helper.DeleteOrEvictPods(list.Pods())
}

// isController has the controllers stay: whoever evicts itself does not come to the end of it, and
// where no other node takes its pod the node would stay cordoned for ever. It goes when the node
// boots, and gives its lease back.
func (r *nodeReconciler) isController(pod corev1.Pod) drain.PodDeleteStatus {
	if pod.Namespace == r.namespace && pod.Labels["app.kubernetes.io/name"] == "holdfast" && pod.Labels["app.kubernetes.io/component"] == "controller" {
		return drain.MakePodDeleteStatusSkip()
	}
	return drain.MakePodDeleteStatusOkay()
}

func (r *nodeReconciler) cordon(ctx context.Context, node *corev1.Node, config string) error {
	if node.Spec.Unschedulable {
		return nil
	}
	before := node.DeepCopy()
	node.Spec.Unschedulable = true
	node.Annotations = merged(node.Annotations, map[string]string{cordonedAnnotation: config})
	if err := r.client.Patch(ctx, node, since(before)); err != nil {
		return fmt.Errorf("cordoning node %s: %w", node.Name, err)
	}
	return nil
}

func (r *nodeReconciler) uncordon(ctx context.Context, node *corev1.Node) error {
	// Word for word: of the annotations the cache has only ours (stripNode), and a patch that was made
	// of it without that one would take them all away.
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": node.ResourceVersion, "annotations": map[string]any{cordonedAnnotation: nil}},
		"spec":     map[string]any{"unschedulable": nil},
	})
	if err == nil {
		err = r.client.Patch(ctx, node, client.RawPatch(types.MergePatchType, patch))
	}
	if err != nil {
		return fmt.Errorf("uncordoning node %s: %w", node.Name, err)
	}
	return nil
}
