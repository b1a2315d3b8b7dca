// SPDX-License-Identifier: Apache-2.0

package deploy_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/kustomizetest"
)

const (
	kubernetes = "kubernetes"
	openshift  = "openshift"
	singleNode = "single-node"
	uninstall  = "uninstall"

	namespace = "holdfast-system"
	image     = "localhost/holdfast:latest"
)

// scheme knows all kinds that manifests may have.
func scheme(t *testing.T) *runtime.Scheme {
	t.Helper()
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, rbacv1.AddToScheme,
		policyv1.AddToScheme, admissionv1.AddToScheme, apiextensionsv1.AddToScheme, apiv1.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// overlay is the objects of an overlay.
type overlay struct {
	name string
	all  []runtime.Object
}

// load decodes an overlay: a field that a kind does not have is an error.
func load(t *testing.T, name string) overlay {
	t.Helper()
	o := overlay{name: name}
	s := scheme(t)
	for _, u := range kustomizetest.Objects(t, name) {
		object, err := s.New(u.GroupVersionKind())
		if err != nil {
			t.Fatalf("%s: %s: %v", name, id(u), err)
		}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(u.Object, object, true); err != nil {
			t.Errorf("%s: %s: %v", name, id(u), err)
		}
		o.all = append(o.all, object)
	}
	return o
}

func id(u *unstructured.Unstructured) string {
	return fmt.Sprintf("%s %s/%s", u.GroupVersionKind().GroupKind(), u.GetNamespace(), u.GetName())
}

// of are the objects of one kind.
func of[T runtime.Object](o overlay) []T {
	var all []T
	for _, object := range o.all {
		if typed, ok := object.(T); ok {
			all = append(all, typed)
		}
	}
	return all
}

// named is the one of a kind and a name.
func named[T interface {
	runtime.Object
	metav1.Object
}](t *testing.T, o overlay, name string) T {
	t.Helper()
	for _, object := range of[T](o) {
		if object.GetName() == name {
			return object
		}
	}
	var none T
	t.Fatalf("%s has no %T %s", o.name, none, name)
	return none
}

func TestOverlays(t *testing.T) {
	want := []string{kubernetes, openshift, singleNode, uninstall}
	if got := kustomizetest.Overlays(t); !slices.Equal(got, want) {
		t.Fatalf("there are the overlays %q, and tests of %q", got, want)
	}
	for _, name := range want {
		t.Run(name, func(t *testing.T) {
			o := load(t, name)
			checkNames(t, o)
			checkPods(t, o)
			checkRights(t, o)
		})
	}
}

// checkNames looks for objects that are there twice, and for namespaces that are not there.
func checkNames(t *testing.T, o overlay) {
	t.Helper()
	seen := map[string]bool{}
	for _, u := range kustomizetest.Objects(t, o.name) {
		if seen[id(u)] {
			t.Errorf("%s is there twice", id(u))
		}
		seen[id(u)] = true
		if ns := u.GetNamespace(); ns != "" && ns != namespace && !strings.HasPrefix(id(u), "Role") {
			t.Errorf("%s: in another namespace", id(u))
		}
		if u.GetKind() == "Secret" {
			t.Errorf("%s: nothing here needs one", id(u))
		}
	}
	if !seen["Namespace /"+namespace] && o.name != uninstall {
		t.Error("the namespace is missing")
	}
	known := map[string]bool{}
	for _, crd := range of[*apiextensionsv1.CustomResourceDefinition](o) {
		known[crd.Spec.Group+" "+crd.Spec.Names.Kind] = true
	}
	for _, pool := range of[*apiv1.MachineConfigPool](o) {
		if !known[apiv1.GroupVersion.Group+" MachineConfigPool"] {
			t.Errorf("pool %s has no definition", pool.Name)
		}
	}
}

// checkRights: no rules that say everything, and no bindings to what is not there.
func checkRights(t *testing.T, o overlay) {
	t.Helper()
	rules := map[string][]rbacv1.PolicyRule{}
	for _, r := range of[*rbacv1.ClusterRole](o) {
		if r.AggregationRule != nil {
			t.Errorf("ClusterRole %s takes rules of others", r.Name)
		}
		rules["ClusterRole /"+r.Name] = r.Rules
	}
	for _, r := range of[*rbacv1.Role](o) {
		rules["Role "+r.Namespace+"/"+r.Name] = r.Rules
	}
	for name, list := range rules {
		for _, rule := range list {
			for _, word := range slices.Concat(rule.APIGroups, rule.Resources, rule.Verbs, rule.NonResourceURLs) {
				if strings.Contains(word, "*") || slices.Contains([]string{"secrets", "escalate", "bind", "impersonate", "deletecollection", "nodes/proxy", "pods/exec"}, word) {
					t.Errorf("%s: %q in %+v", name, word, rule)
				}
			}
		}
	}
	bound := map[string]bool{}
	binding := func(name, ns string, ref rbacv1.RoleRef, subjects []rbacv1.Subject) {
		to := ref.Kind + " " + ns + "/" + ref.Name
		bound[to] = true
		if rules[to] == nil {
			t.Errorf("binding %s: %s is not here", name, to)
		}
		for _, s := range subjects {
			if s.Kind != rbacv1.ServiceAccountKind || !slices.ContainsFunc(of[*corev1.ServiceAccount](o), func(a *corev1.ServiceAccount) bool { return a.Name == s.Name && a.Namespace == s.Namespace }) {
				t.Errorf("binding %s: %+v is not here", name, s)
			}
		}
	}
	for _, b := range of[*rbacv1.ClusterRoleBinding](o) {
		binding(b.Name, "", b.RoleRef, b.Subjects)
	}
	for _, b := range of[*rbacv1.RoleBinding](o) {
		binding(b.Name, b.Namespace, b.RoleRef, b.Subjects)
	}
	for name := range rules {
		if !bound[name] {
			t.Errorf("nobody has %s", name)
		}
	}
}

// TestOpenShiftLeavesWhatIsTheOperators: definitions and pools there are the Machine Config
// Operator's, and so is what is done with nodes.
func TestOpenShiftLeavesWhatIsTheOperators(t *testing.T) {
	o := load(t, openshift)
	for _, crd := range of[*apiextensionsv1.CustomResourceDefinition](o) {
		if crd.Spec.Group == apiv1.GroupVersion.Group {
			t.Errorf("it has the definition %s", crd.Name)
		}
	}
	for _, u := range kustomizetest.Objects(t, openshift) {
		if g := u.GroupVersionKind().Group; g == apiv1.GroupVersion.Group || strings.HasSuffix(g, ".openshift.io") {
			t.Errorf("it has %s", id(u))
		}
	}
	for _, r := range of[*rbacv1.ClusterRole](o) {
		for _, rule := range r.Rules {
			for _, resource := range rule.Resources {
				writes := slices.ContainsFunc(rule.Verbs, func(v string) bool { return !slices.Contains([]string{"get", "list", "watch"}, v) })
				if writes && !slices.Contains([]string{"machineconfigs", "machineconfigurations", "containerruntimenodes", "containerruntimenodes/status"}, resource) {
					t.Errorf("%s: it may write %s", r.Name, resource)
				}
			}
		}
	}
	for _, m := range named[*appsv1.DaemonSet](t, o, "holdfast-node").Spec.Template.Spec.Containers[0].VolumeMounts {
		if !m.ReadOnly {
			t.Errorf("couriers may write in %s", m.MountPath)
		}
	}
	for _, u := range kustomizetest.Objects(t, openshift) {
		if text := fmt.Sprint(u.Object["rules"]); strings.Contains(u.GetName(), "courier") && strings.Contains(text, "machineconfig") {
			t.Errorf("%s: MachineConfigs of the operator have secrets: %s", id(u), text)
		}
	}
	if s := named[*appsv1.Deployment](t, o, "holdfast-controller").Spec.Template.Spec.SecurityContext; s.RunAsUser != nil || s.RunAsGroup != nil {
		t.Error("restricted-v2 admits no ids of the pod's own")
	}
}

// TestUninstallReplaces: the pods that uninstall are of the DaemonSet that installed.
func TestUninstallReplaces(t *testing.T) {
	was, is := named[*appsv1.DaemonSet](t, load(t, kubernetes), "holdfast-node"), named[*appsv1.DaemonSet](t, load(t, uninstall), "holdfast-node")
	if was.Namespace != is.Namespace || metav1.FormatLabelSelector(was.Spec.Selector) != metav1.FormatLabelSelector(is.Spec.Selector) {
		t.Errorf("%s/%s is not %s/%s", is.Namespace, is.Spec.Selector, was.Namespace, was.Spec.Selector)
	}
	for _, d := range []*appsv1.DaemonSet{was, is} {
		if tolerations := d.Spec.Template.Spec.Tolerations; len(tolerations) != 1 || tolerations[0] != (corev1.Toleration{Operator: corev1.TolerationOpExists}) {
			t.Errorf("it tolerates %+v: want everything", tolerations)
		}
	}
}

// TestPools puts nodes as clusters have them into pools.
func TestPools(t *testing.T) {
	linux := func(roles ...string) labels.Set {
		set := labels.Set{"kubernetes.io/os": "linux", "kubernetes.io/hostname": "a"}
		for _, r := range roles {
			set["node-role.kubernetes.io/"+r] = ""
		}
		return set
	}
	nodes := map[string]labels.Set{
		"a worker of kubeadm":         linux(),
		"a worker with a role":        linux("worker"),
		"a control plane of kubeadm":  linux("control-plane"),
		"a control plane that works":  linux("control-plane", "master", "worker"),
		"a node with another system ": {"kubernetes.io/os": "windows"},
	}
	want := map[string]map[string][]string{
		kubernetes: {"worker": {"a worker of kubeadm", "a worker with a role"}, "master": {"a control plane of kubeadm", "a control plane that works"}},
		singleNode: {"worker": {"a control plane of kubeadm", "a control plane that works", "a worker of kubeadm", "a worker with a role"}},
	}
	for name, pools := range want {
		o := load(t, name)
		if got := len(of[*apiv1.MachineConfigPool](o)); got != len(pools) {
			t.Errorf("%s has %d pools", name, got)
		}
		for pool, members := range pools {
			p := named[*apiv1.MachineConfigPool](t, o, pool)
			selector, err := metav1.LabelSelectorAsSelector(p.Spec.NodeSelector)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for node, set := range nodes {
				if selector.Matches(set) {
					got = append(got, node)
				}
			}
			if slices.Sort(got); !slices.Equal(got, members) {
				t.Errorf("%s: pool %s has %q, want %q", name, pool, got, members)
			}
			// Objects for OpenShift select it here, too.
			if _, ok := p.Labels["pools.operator.machineconfiguration.openshift.io/"+pool]; !ok {
				t.Errorf("%s: pool %s has the labels %v", name, pool, p.Labels)
			}
		}
	}
}
