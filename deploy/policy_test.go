// SPDX-License-Identifier: Apache-2.0

package deploy_test

import (
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/cel"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/admission/plugin/webhook/matchconditions"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/cel/environment"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
)

// validator compiles a policy as an API server does.
func validator(t *testing.T, p *admissionv1.ValidatingAdmissionPolicy) validating.Validator {
	t.Helper()
	c, err := cel.NewCompositedCompiler(environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()))
	if err != nil {
		t.Fatal(err)
	}
	options := cel.OptionalVariableDeclarations{HasAuthorizer: true}
	for _, v := range p.Spec.Variables {
		if r := c.CompileAndStoreVariable(&validating.Variable{Name: v.Name, Expression: v.Expression}, options, environment.StoredExpressions); r.Error != nil {
			t.Fatalf("variable %s: %v", v.Name, r.Error)
		}
	}
	var conditions, rules, messages []cel.ExpressionAccessor
	for i := range p.Spec.MatchConditions {
		conditions = append(conditions, (*matchconditions.MatchCondition)(&p.Spec.MatchConditions[i]))
	}
	for _, v := range p.Spec.Validations {
		rules = append(rules, &validating.ValidationCondition{Expression: v.Expression, Message: v.Message, Reason: v.Reason})
		messages = append(messages, &validating.MessageExpressionCondition{MessageExpression: v.MessageExpression})
	}
	fail := admissionv1.Fail
	matcher := matchconditions.NewMatcher(c.CompileCondition(conditions, options, environment.StoredExpressions), &fail, "policy", "validate", p.Name)
	return validating.NewValidator(c.CompileCondition(rules, options, environment.StoredExpressions), matcher,
		c.CompileCondition(nil, options, environment.StoredExpressions),
		c.CompileCondition(messages, cel.OptionalVariableDeclarations{}, environment.StoredExpressions), p.Spec.FailurePolicy, nil)
}

// TestCourierPolicy: a courier writes of its own node only.
func TestCourierPolicy(t *testing.T) {
	const node = "authentication.kubernetes.io/node-name"
	courier := &user.DefaultInfo{Name: "system:serviceaccount:holdfast-system:holdfast-courier", Extra: map[string][]string{node: {"a"}}}
	unbound := &user.DefaultInfo{Name: courier.Name}
	for _, o := range []string{kubernetes, openshift, singleNode} {
		all := load(t, o)
		p := named[*admissionv1.ValidatingAdmissionPolicy](t, all, "holdfast-courier")
		binding := named[*admissionv1.ValidatingAdmissionPolicyBinding](t, all, "holdfast-courier")
		if binding.Spec.PolicyName != p.Name || len(binding.Spec.ValidationActions) != 1 || binding.Spec.ValidationActions[0] != admissionv1.Deny {
			t.Errorf("%s: the policy is not in force: %+v", o, binding.Spec)
		}
		v := validator(t, p)
		for _, c := range []struct {
			name, of, subresource string
			by                    user.Info
			refused               string
		}{
			{name: "its own", of: "a", subresource: "status", by: courier},
			{name: "another's", of: "b", subresource: "status", by: courier, refused: "the courier of node a may write the status of its own node only"},
			{name: "what its node is to have", of: "a", by: courier, refused: "status of its own node only"},
			{name: "a token that is bound to no node", of: "a", subresource: "status", by: unbound, refused: "bound to no node"},
			{name: "such a token, and no name", of: "", subresource: "status", by: unbound, refused: "bound to no node"},
			{name: "the controller", of: "b", by: &user.DefaultInfo{Name: "system:serviceaccount:holdfast-system:holdfast-controller"}},
		} {
			object := &holdfastv1.ContainerRuntimeNode{ObjectMeta: metav1.ObjectMeta{Name: c.of}}
			gvr := holdfastv1.GroupVersion.WithResource("containerruntimenodes")
			kind := holdfastv1.GroupVersion.WithKind("ContainerRuntimeNode")
			attributes := admission.NewAttributesRecord(object, object, kind, "", c.of, gvr, c.subresource, admission.Update, &metav1.UpdateOptions{}, false, c.by)
			versioned := &admission.VersionedAttributes{Attributes: attributes, VersionedKind: kind, VersionedObject: admission.NewLazyObject(object), VersionedOldObject: admission.NewLazyObject(object)}
			result := v.Validate(t.Context(), gvr, versioned, nil, nil, celconfig.RuntimeCELCostBudget, nil)
			said := ""
			for _, d := range result.Decisions {
				if d.Action == validating.ActionDeny {
					said += d.Message + "\n"
				}
			}
			if (said != "") != (c.refused != "") || !strings.Contains(said, c.refused) {
				t.Errorf("%s: %s: %q, want %q", o, c.name, said, c.refused)
			}
		}
	}
}
