// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"errors"
	"fmt"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// policyName is the name of the admission policy, and of its binding. It is ours, whatever labels they have.
const policyName = "holdfast-additional-storage-config"

// gateReconciler keeps the policy by which an API server refuses additional stores where the
// feature gate AdditionalStorageConfig is off, instead of storing what will not be applied.
type gateReconciler struct {
	client   client.Client
	features FeatureSet
}

func (r *gateReconciler) setUp(mgr manager.Manager) error {
	one := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: client.ObjectKey{Name: policyName}}}
	})
	first := make(chan event.GenericEvent, 1) // also if there is no policy yet
	first <- event.GenericEvent{Object: &admissionv1.ValidatingAdmissionPolicy{}}
	return ctrl.NewControllerManagedBy(mgr).Named("gate").
		Watches(&admissionv1.ValidatingAdmissionPolicy{}, one).
		Watches(&admissionv1.ValidatingAdmissionPolicyBinding{}, one).
		WatchesRawSource(source.Channel(first, one)).
		Complete(r)
}

// Reconcile implements [reconcile.Reconciler].
func (r *gateReconciler) Reconcile(ctx context.Context, _ reconcile.Request) (reconcile.Result, error) {
	object := metav1.ObjectMeta{Name: policyName}
	policy, binding := &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: object}, &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: object}
	if r.features == Default {
		return result(errors.Join(r.remove(ctx, policy), r.remove(ctx, binding)))
	}
	policySpec, bindingSpec := gatePolicy(r.features)
	return result(errors.Join(
		r.keep(ctx, policy, func() { policy.Spec = policySpec }),
		r.keep(ctx, binding, func() { binding.Spec = bindingSpec })))
}

// keep makes an object what set makes of it, if it is not that already.
func (r *gateReconciler) keep(ctx context.Context, o client.Object, set func()) error {
	_, err := controllerutil.CreateOrPatch(ctx, r.client, o, func() error {
		o.SetLabels(merged(o.GetLabels(), map[string]string{managedLabel: Name}))
		set()
		return nil
	})
	if err != nil {
		return fmt.Errorf("keeping %T %s: %w", o, policyName, err)
	}
	return nil
}

// remove deletes an object that is there.
func (r *gateReconciler) remove(ctx context.Context, o client.Object) error {
	err := r.client.Get(ctx, client.ObjectKeyFromObject(o), o)
	if err == nil {
		err = r.client.Delete(ctx, o)
	}
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("removing %T %s: %w", o, policyName, err)
	}
	return nil
}

// gatePolicy is the policy of a feature set. What is a default of the API server is written
// out: what is read is then what was written.
func gatePolicy(features FeatureSet) (admissionv1.ValidatingAdmissionPolicySpec, admissionv1.ValidatingAdmissionPolicyBindingSpec) {
	action, why := admissionv1.Deny, "the feature gate AdditionalStorageConfig is off in this cluster. "+
		"Remove it, or have an administrator start the controller with --feature-set Default"
	if features == TechPreview {
		action, why = admissionv1.Warn, "AdditionalStorageConfig is a technology preview in this cluster (--feature-set TechPreviewNoUpgrade): "+
			"what it makes of nodes may change with an upgrade"
	}
	var rules []admissionv1.Validation
	for _, field := range []string{
		"spec.containerRuntimeConfig.additionalLayerStores", "spec.containerRuntimeConfig.additionalImageStores",
		"spec.containerRuntimeConfig.additionalArtifactStores", "spec.holdfast",
	} {
		rules = append(rules, rule(field, fmt.Sprintf("has(object.%s)", field),
			fmt.Sprintf("has(oldObject.%[1]s) && object.%[1]s == oldObject.%[1]s", field), why))
	}
	const has = "has(%[1]s.metadata.annotations) && '%[2]s' in %[1]s.metadata.annotations"
	rules = append(rules, rule("metadata.annotations."+apiv1.SpecAnnotation, fmt.Sprintf(has, "object", apiv1.SpecAnnotation),
		fmt.Sprintf(has+" && object.metadata.annotations['%[2]s'] == oldObject.metadata.annotations['%[2]s']", "oldObject", apiv1.SpecAnnotation), why))

	fail, equivalent, all := admissionv1.Fail, admissionv1.Equivalent, admissionv1.AllScopes
	policy := admissionv1.ValidatingAdmissionPolicySpec{
		FailurePolicy: &fail,
		MatchConstraints: &admissionv1.MatchResources{
			MatchPolicy: &equivalent, NamespaceSelector: &metav1.LabelSelector{}, ObjectSelector: &metav1.LabelSelector{},
			ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
				Operations: []admissionv1.OperationType{admissionv1.Create, admissionv1.Update},
				Rule: admissionv1.Rule{
					APIGroups: []string{apiv1.GroupVersion.Group}, APIVersions: []string{"*"}, Resources: []string{"containerruntimeconfigs"}, Scope: &all,
				},
			}}},
		},
		Validations: rules,
	}
	binding := admissionv1.ValidatingAdmissionPolicyBindingSpec{PolicyName: policyName, ValidationActions: []admissionv1.ValidationAction{action}}
	return policy, binding
}

// rule refuses what an object has, unless it had it before: such an object can still be changed.
func rule(field, has, had, why string) admissionv1.Validation {
	forbidden := metav1.StatusReasonForbidden
	return admissionv1.Validation{
		Expression: fmt.Sprintf("!(%s) || oldObject != null && %s", has, had),
		Message:    field + ": " + why,
		Reason:     &forbidden,
	}
}
