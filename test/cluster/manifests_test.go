// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	authv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/kustomizetest"
)

// TestManifests applies every overlay as it is, one after the other. What is applied again is not
// changed, and what uninstalls goes on top.
func TestManifests(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	// That of OpenShift first: there are no definitions of the Machine Config Operator's in it.
	for _, overlay := range []string{"openshift", "single-node", "kubernetes"} {
		t.Run(overlay, func(t *testing.T) {
			manifests := kustomizetest.Build(t, overlay)
			s.Apply(t, manifests)
			versions := s.versions(t, overlay)
			s.Apply(t, manifests)
			if again := s.versions(t, overlay); !maps.Equal(versions, again) {
				t.Errorf("applied again, objects are others:\n%v\n%v", versions, again)
			}
			s.Apply(t, kustomizetest.Build(t, "uninstall"))
		})
	}
	t.Run("samples", func(t *testing.T) {
		names, err := filepath.Glob("../../deploy/samples/*.yaml")
		if err != nil || len(names) == 0 {
			t.Fatalf("there are no samples: %v", err)
		}
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			s.Apply(t, data)
		}
	})
}

// versions are the resource versions of an overlay's objects.
func (s *server) versions(t testing.TB, overlay string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, o := range kustomizetest.Objects(t, overlay) {
		have, err := s.resource(t, o).Get(t.Context(), o.GetName(), metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		all[o.GetKind()+" "+o.GetName()] = have.GetResourceVersion()
	}
	return all
}

// refused checks that a request was, with a text in what the server says.
func refused(t *testing.T, what string, err error, text string) {
	t.Helper()
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: %v, want it refused with %q", what, err, text)
	}
}

// rights are those that a user has beyond what every service account has, a line for each.
func (s *server) rights(t testing.TB, config *rest.Config) []string {
	t.Helper()
	ask := func(config *rest.Config) (all []string) {
		review := &authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: namespace}}
		review, err := client(t, config).AuthorizationV1().SelfSubjectRulesReviews().Create(t.Context(), review, metav1.CreateOptions{})
		if err != nil || review.Status.Incomplete {
			t.Fatalf("%v: %v", review, err)
		}
		for _, r := range review.Status.ResourceRules {
			all = append(all, strings.TrimSpace(fmt.Sprintf("%s %s %s", strings.Join(r.Verbs, ","), strings.Join(r.Resources, ","), strings.Join(r.ResourceNames, ","))))
		}
		return all
	}
	every := ask(s.ConfigFor(t, "system:serviceaccount:"+namespace+":other", "system:serviceaccounts", "system:serviceaccounts:"+namespace))
	own := slices.DeleteFunc(ask(config), func(r string) bool { return slices.Contains(every, r) })
	slices.Sort(own)
	return own
}

// TestRights: what couriers and the controller may, and what they may not. That what the controller
// may is enough, the tests in which it works show.
func TestRights(t *testing.T) {
	t.Parallel()
	c := newEmptyCluster(t, "kubernetes")
	makeNodes(t, c.client, linux, "a", "b")
	for _, name := range []string{"a", "b"} {
		if err := c.client.Create(t.Context(), &holdfastv1.ContainerRuntimeNode{ObjectMeta: metav1.ObjectMeta{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("courier", func(t *testing.T) { testCourierRights(t, c) })
	t.Run("controller", func(t *testing.T) { testControllerRights(t, c) })
}

func testCourierRights(t *testing.T, c *cluster) {
	config := c.courierConfig(t, "a")
	own, unbound := clientFor(t, config), clientFor(t, c.tokenConfig(t, courierAccount, nil))
	status := func(user kube.Client, node string) error {
		s := c.state(t, node)
		s.Status.Message += "."
		return user.Status().Update(t.Context(), s)
	}
	c.eventually(t, "the policy counts", func(context.Context) error {
		if status(own, "b") == nil {
			return errors.New("the courier of a has written for b")
		}
		return nil
	})
	if err := status(own, "a"); err != nil {
		t.Errorf("its own status: %v", err)
	}
	refused(t, "another node's", status(own, "b"), "the courier of node a may write the status of its own node only")
	refused(t, "a token that is bound to no pod", status(unbound, "a"), "the token of this courier is bound to no node")
	s := c.state(t, "a")
	s.Spec.Pool = "mine"
	refused(t, "its own spec", own.Update(t.Context(), s), "")
	refused(t, "deleting its own", own.Delete(t.Context(), s), "")
	refused(t, "secrets", own.List(t.Context(), &corev1.SecretList{}, kube.InNamespace(namespace)), "")
	want := []string{
		"get machineconfigs",
		"get,list,watch containerruntimenodes",
		"update containerruntimenodes/status",
	}
	if got := c.rights(t, config); !slices.Equal(got, want) {
		t.Errorf("it may\n%s", strings.Join(got, "\n"))
	}
	// Whatever RBAC says: with a role of an administrator's, too, it writes no other object.
	c.Apply(t, fmt.Appendf(nil, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: mistake}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{kind: ServiceAccount, name: %s, namespace: %s}]
`, courierAccount, namespace))
	c.eventually(t, "the role counts", func(ctx context.Context) error {
		return own.List(ctx, &corev1.SecretList{}, kube.InNamespace(namespace))
	})
	const onlyStatus = "the courier of node a may write the status of its own node only"
	refused(t, "its own spec", own.Update(t.Context(), s), onlyStatus)
	refused(t, "deleting its own", own.Delete(t.Context(), s), onlyStatus)
	refused(t, "making one", own.Create(t.Context(), &holdfastv1.ContainerRuntimeNode{ObjectMeta: metav1.ObjectMeta{Name: "c"}}), onlyStatus)
}

func testControllerRights(t *testing.T, c *cluster) {
	controller := clientFor(t, c.controllerConfig(t))
	s := c.state(t, "b")
	before := s.DeepCopy()
	s.Spec.Pool = "worker"
	if err := controller.Patch(t.Context(), s, kube.MergeFrom(before)); err != nil {
		t.Errorf("what a node is to have: %v", err)
	}
	s.Status.Message = "well"
	refused(t, "what a node has", controller.Status().Patch(t.Context(), s, kube.MergeFrom(before)), "")
	refused(t, "secrets", controller.List(t.Context(), &corev1.SecretList{}), "")
	refused(t, "its own namespace's secrets", controller.List(t.Context(), &corev1.SecretList{}, kube.InNamespace(namespace)), "")
	refused(t, "pods", controller.Delete(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "courier-a", Namespace: namespace}}), "")
	refused(t, "objects of users", controller.Update(t.Context(), &apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: "x"}}), "")
	refused(t, "all policies", controller.List(t.Context(), &admissionv1.ValidatingAdmissionPolicyList{}), "")
	if err := controller.List(t.Context(), &admissionv1.ValidatingAdmissionPolicyList{}, kube.MatchingFields{"metadata.name": "holdfast-additional-storage-config"}); err != nil {
		t.Errorf("its own policy: %v", err)
	}
	couriers := metav1.ObjectMeta{Name: "holdfast-courier"}
	refused(t, "the couriers' policy", controller.Delete(t.Context(), &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: couriers}), "")
	refused(t, "its binding", controller.Delete(t.Context(), &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: couriers}), "")
	refused(t, "nodes", controller.Delete(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}}), "")
	refused(t, "the status of nodes", controller.Status().Update(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}}), "")
	refused(t, "tokens", controller.SubResource("token").Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: courierAccount, Namespace: namespace}}, &authv1.TokenRequest{}), "")
}
