// SPDX-License-Identifier: Apache-2.0

package deploy_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	psapi "k8s.io/pod-security-admission/api"
	psapolicy "k8s.io/pod-security-admission/policy"
)

// workload is what starts pods.
type workload struct {
	name, namespace string
	selector        *metav1.LabelSelector
	template        corev1.PodTemplateSpec
}

func workloads(o overlay) []workload {
	var all []workload
	for _, d := range of[*appsv1.Deployment](o) {
		all = append(all, workload{d.Name, d.Namespace, d.Spec.Selector, d.Spec.Template})
	}
	for _, d := range of[*appsv1.DaemonSet](o) {
		all = append(all, workload{d.Name, d.Namespace, d.Spec.Selector, d.Spec.Template})
	}
	return all
}

func checkPods(t *testing.T, o overlay) {
	t.Helper()
	accounts := of[*corev1.ServiceAccount](o)
	if o.name == uninstall { // it is applied on top of another
		accounts = of[*corev1.ServiceAccount](load(t, kubernetes))
	}
	for _, w := range workloads(o) {
		spec := w.template.Spec
		if !slices.ContainsFunc(accounts, func(a *corev1.ServiceAccount) bool {
			return a.Name == spec.ServiceAccountName && a.Namespace == w.namespace
		}) {
			t.Errorf("%s runs as %q, which is not there", w.name, spec.ServiceAccountName)
		}
		selector, err := metav1.LabelSelectorAsSelector(w.selector)
		if err != nil || selector.Empty() || !selector.Matches(labels.Set(w.template.Labels)) {
			t.Errorf("%s does not select its pods: %v, %v", w.name, selector, err)
		}
		if !strings.HasPrefix(spec.PriorityClassName, "system-") || spec.HostNetwork || spec.HostIPC {
			t.Errorf("%s: priority %q, host network %t, host IPC %t", w.name, spec.PriorityClassName, spec.HostNetwork, spec.HostIPC)
		}
		for _, v := range spec.Volumes {
			if v.HostPath == nil {
				t.Errorf("%s: volume %s is no directory of the node: whose is it?", w.name, v.Name)
			}
		}
		for _, c := range spec.InitContainers {
			checkContainer(t, w.name, c)
		}
		for _, c := range spec.Containers {
			checkContainer(t, w.name, c)
			checkConfined(t, w.name, spec, c)
		}
	}
	for _, pdb := range of[*policyv1.PodDisruptionBudget](o) {
		selector, err := metav1.LabelSelectorAsSelector(pdb.Spec.Selector)
		if err != nil || !slices.ContainsFunc(workloads(o), func(w workload) bool { return selector.Matches(labels.Set(w.template.Labels)) }) {
			t.Errorf("the budget %s is for no pod: %v", pdb.Name, err)
		}
	}
}

func checkContainer(t *testing.T, workload string, c corev1.Container) {
	t.Helper()
	if c.Image != image || c.ImagePullPolicy != corev1.PullIfNotPresent {
		t.Errorf("%s/%s has image %s, pulled %s", workload, c.Name, c.Image, c.ImagePullPolicy)
	}
	if !slices.Equal(c.Command, []string{"/usr/local/bin/holdfast-operator"}) || len(c.Args) == 0 {
		t.Errorf("%s/%s runs %q %q", workload, c.Name, c.Command, c.Args)
	}
	if c.Resources.Requests.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() || c.Resources.Limits.Memory().IsZero() {
		t.Errorf("%s/%s: resources %+v", workload, c.Name, c.Resources)
	}
	if c.SecurityContext == nil || c.SecurityContext.ReadOnlyRootFilesystem == nil || !*c.SecurityContext.ReadOnlyRootFilesystem {
		t.Errorf("%s/%s may write into its own file system", workload, c.Name)
	}
	if len(c.EnvFrom) > 0 {
		t.Errorf("%s/%s: an environment from elsewhere", workload, c.Name)
	}
	for _, e := range c.Env {
		if e.ValueFrom == nil || e.ValueFrom.FieldRef == nil {
			t.Errorf("%s/%s: %s is nothing that the pod itself says", workload, c.Name, e.Name)
		}
	}
}

// checkConfined: nothing but init containers is privileged.
func checkConfined(t *testing.T, workload string, spec corev1.PodSpec, c corev1.Container) {
	t.Helper()
	s := c.SecurityContext
	if s.Privileged != nil && *s.Privileged || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation {
		t.Errorf("%s/%s is, or may become, privileged", workload, c.Name)
	}
	if s.Capabilities == nil || len(s.Capabilities.Add) > 0 || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("%s/%s has capabilities: %+v", workload, c.Name, s.Capabilities)
	}
	seccomp := s.SeccompProfile
	if seccomp == nil && spec.SecurityContext != nil {
		seccomp = spec.SecurityContext.SeccompProfile
	}
	if seccomp == nil || seccomp.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("%s/%s: seccomp %+v", workload, c.Name, seccomp)
	}
	mounts := map[string]string{}
	for _, m := range c.VolumeMounts {
		mounts[m.Name] = m.MountPath
		if m.MountPath != "/host/etc/holdfast" && !m.ReadOnly {
			t.Errorf("%s/%s may write in %s", workload, c.Name, m.MountPath)
		}
	}
	for _, v := range spec.Volumes {
		if at, ok := mounts[v.Name]; ok && at != "/host"+v.HostPath.Path || ok && !slices.Contains([]string{"/etc/holdfast", "/var/lib/holdfast-agent"}, v.HostPath.Path) {
			t.Errorf("%s/%s has %s of the node at %s", workload, c.Name, v.HostPath.Path, at)
		}
	}
}

// TestControllerIsRestricted asks what an API server asks of pods in a restricted namespace.
func TestControllerIsRestricted(t *testing.T) {
	evaluator, err := psapolicy.NewEvaluator(psapolicy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	level := psapi.LevelVersion{Level: psapi.LevelRestricted, Version: psapi.LatestVersion()}
	for _, name := range []string{kubernetes, openshift, singleNode} {
		d := named[*appsv1.Deployment](t, load(t, name), "holdfast-controller")
		result := psapolicy.AggregateCheckResults(evaluator.EvaluatePod(level, &d.Spec.Template.ObjectMeta, &d.Spec.Template.Spec))
		if !result.Allowed {
			t.Errorf("%s: %s: %s", name, result.ForbiddenReason(), result.ForbiddenDetail())
		}
		want := int32(2)
		if name == singleNode {
			want = 1
		}
		if *d.Spec.Replicas != want || d.Spec.Template.Spec.Containers[0].Resources.Limits.Memory().String() != "128Mi" {
			t.Errorf("%s: %d replicas, %v", name, *d.Spec.Replicas, d.Spec.Template.Spec.Containers[0].Resources)
		}
	}
}

// TestImageIsLeftToTheRuntime: Holdfast prepares no image without a command, so that the pods
// which repair or remove it do not need it, and are not what keeps it in use.
func TestImageIsLeftToTheRuntime(t *testing.T) {
	text, err := os.ReadFile("Containerfile")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if word, _, _ := strings.Cut(line, " "); slices.Contains([]string{"ENTRYPOINT", "CMD", "USER"}, word) {
			t.Errorf("the image has a %s", line)
		}
	}
}
