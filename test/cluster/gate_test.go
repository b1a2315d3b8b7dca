// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// gated are the fields of the feature gate, each with how an object gets it.
var gated = map[string]func(*apiv1.ContainerRuntimeConfig){
	"spec.containerRuntimeConfig.additionalLayerStores": func(o *apiv1.ContainerRuntimeConfig) {
		o.Spec.ContainerRuntimeConfig.AdditionalLayerStores = []apiv1.AdditionalLayerStore{{Path: "/mnt/layers"}}
	},
	"spec.containerRuntimeConfig.additionalImageStores": func(o *apiv1.ContainerRuntimeConfig) {
		o.Spec.ContainerRuntimeConfig.AdditionalImageStores = []apiv1.AdditionalImageStore{{Path: "/mnt/images"}}
	},
	"spec.containerRuntimeConfig.additionalArtifactStores": func(o *apiv1.ContainerRuntimeConfig) {
		o.Spec.ContainerRuntimeConfig.AdditionalArtifactStores = []apiv1.AdditionalArtifactStore{{Path: "/mnt/artifacts"}}
	},
	"spec.holdfast": func(o *apiv1.ContainerRuntimeConfig) { o.Spec.Holdfast = &apiv1.HoldfastConfiguration{} },
	"metadata.annotations." + apiv1.SpecAnnotation: func(o *apiv1.ContainerRuntimeConfig) {
		o.Annotations = map[string]string{apiv1.SpecAnnotation: "holdfast: {sources: [registry]}"}
	},
}

// newConfig is an object that may be there whatever the feature set is.
func newConfig(name string) *apiv1.ContainerRuntimeConfig {
	o := &apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: name}}
	o.Spec.MachineConfigPoolSelector = &metav1.LabelSelector{MatchLabels: map[string]string{workerLabel: ""}}
	o.Spec.ContainerRuntimeConfig = &apiv1.ContainerRuntimeConfiguration{}
	return o
}

// warnings are what an API server says beside what it answers.
type warnings struct {
	mu  sync.Mutex
	all []string
}

// HandleWarningHeader implements [rest.WarningHandler].
func (w *warnings) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, text)
}

// take returns them once.
func (w *warnings) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := w.all
	w.all = nil
	return all
}

// gateTest is a cluster, and a user of it.
type gateTest struct {
	*cluster
	user     kube.Client
	warnings *warnings
	before   *apiv1.ContainerRuntimeConfig // an object with all that the gate is about
}

// TestGate turns the feature gate off, half on and on, under objects that need it.
func TestGate(t *testing.T) {
	g := &gateTest{cluster: newCluster(t, "kubernetes", numbered(1)...), warnings: &warnings{}}
	config := rest.CopyConfig(g.Config)
	config.WarningHandler = g.warnings
	var err error
	if g.user, err = kube.New(config, kube.Options{Scheme: g.client.Scheme()}); err != nil {
		t.Fatal(err)
	}
	g.before = newConfig("before")
	for _, set := range gated {
		set(g.before)
	}
	limit := int64(100)
	g.before.Spec.ContainerRuntimeConfig.PidsLimit = &limit
	for _, o := range []*apiv1.ContainerRuntimeConfig{g.before.DeepCopy(), newConfig("plain")} {
		if err := g.user.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}

	controller := startController(t, g.server, "--feature-set=Off")
	g.inForce(t)
	t.Run("refused", g.refused)
	t.Run("admitted", g.admitted)
	t.Run("there before", g.thereBefore)
	t.Run("repaired", g.repaired)

	stopController(t, controller)
	controller = startController(t, g.server, "--feature-set=TechPreviewNoUpgrade")
	t.Run("technology preview", g.preview)

	stopController(t, controller)
	startController(t, g.server, "--feature-set=Default")
	t.Run("default", g.open)
}

// refusedFor returns an error unless one is that an object was refused for a field, and says so.
func refusedFor(field string, err error) error {
	if err == nil {
		return errors.New("it is admitted")
	}
	for _, want := range []string{field + ": ", "the feature gate AdditionalStorageConfig is off in this cluster", "Remove it, or have an administrator"} {
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), want) {
			return fmt.Errorf("it is refused, not as it should be: %w: want %q", err, want)
		}
	}
	return nil
}

// inForce waits until the policy refuses something: API servers take a moment to learn of it.
func (g *gateTest) inForce(t *testing.T) {
	t.Helper()
	const field = "spec.holdfast"
	o := newConfig("new")
	gated[field](o)
	g.eventually(t, "the gate is shut", func(ctx context.Context) error {
		return refusedFor(field, g.user.Create(ctx, o.DeepCopy(), kube.DryRunAll))
	})
}

func (g *gateTest) get(t *testing.T, name string) *apiv1.ContainerRuntimeConfig {
	t.Helper()
	o := &apiv1.ContainerRuntimeConfig{}
	if err := g.client.Get(t.Context(), kube.ObjectKey{Name: name}, o); err != nil {
		t.Fatal(err)
	}
	return o
}

// change changes an object as a user, again if the controller was faster.
func (g *gateTest) change(t *testing.T, name string, set func(*apiv1.ContainerRuntimeConfig), o ...kube.UpdateOption) error {
	t.Helper()
	for {
		object := g.get(t, name)
		set(object)
		if err := g.user.Update(t.Context(), object, o...); !apierrors.IsConflict(err) {
			return err
		}
	}
}

func (g *gateTest) refused(t *testing.T) {
	for field, set := range gated {
		made := newConfig("new")
		set(made)
		if err := refusedFor(field, g.user.Create(t.Context(), made)); err != nil {
			t.Errorf("%s, a new object: %v", field, err)
		}
		if err := refusedFor(field, g.change(t, "plain", set)); err != nil {
			t.Errorf("%s, a changed object: %v", field, err)
		}
	}
	if got := g.warnings.take(); got != nil {
		t.Errorf("warnings: %q", got)
	}
}

func (g *gateTest) admitted(t *testing.T) {
	o := newConfig("other")
	o.Annotations = map[string]string{"example.com/mine": "yes"}
	o.Spec.ContainerRuntimeConfig.LogLevel = "info"
	if err := g.user.Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if err := g.change(t, "other", func(o *apiv1.ContainerRuntimeConfig) { o.Spec.ContainerRuntimeConfig.LogLevel = "debug" }); err != nil {
		t.Fatal(err)
	}
	g.configSays(t, "other", apiv1.ContainerRuntimeConfigSuccess, "Success")
}

// thereBefore is about an object that has had all of it before the gate was shut.
func (g *gateTest) thereBefore(t *testing.T) {
	check := func(limit int64) {
		t.Helper()
		g.configSays(t, "before", apiv1.ContainerRuntimeConfigFailure, "the feature gate AdditionalStorageConfig is off in this cluster")
		o := g.get(t, "before")
		if last := o.Status.Conditions[len(o.Status.Conditions)-1]; last.Reason != "FeatureGateDisabled" {
			t.Errorf("the reason is %q", last.Reason)
		}
		g.before.Spec.ContainerRuntimeConfig.PidsLimit = &limit
		if diff := cmp.Diff(g.before.Spec, o.Spec) + cmp.Diff(g.before.Annotations, o.Annotations); diff != "" {
			t.Errorf("the object is not what it was:\n%s", diff)
		}
		spec := g.merged(t, g.updated(t, "worker", "before", "plain", "other"))
		want := apiv1.ContainerRuntimeConfigSpec{ContainerRuntimeConfig: &apiv1.ContainerRuntimeConfiguration{PidsLimit: &limit, LogLevel: "debug"}}
		spec.MachineConfigPoolSelector = nil
		if diff := cmp.Diff(want, spec); diff != "" {
			t.Errorf("nodes are to have:\n%s", diff)
		}
	}
	check(100)
	limit := int64(200)
	if err := g.change(t, "before", func(o *apiv1.ContainerRuntimeConfig) {
		o.Labels, o.Spec.ContainerRuntimeConfig.PidsLimit = map[string]string{"mine": "yes"}, &limit
	}); err != nil {
		t.Fatal(err)
	}
	check(200)

	for field, set := range map[string]func(*apiv1.ContainerRuntimeConfig){
		"spec.containerRuntimeConfig.additionalImageStores": func(o *apiv1.ContainerRuntimeConfig) {
			o.Spec.ContainerRuntimeConfig.AdditionalImageStores[0].Path = "/mnt/others"
		},
		"spec.holdfast": func(o *apiv1.ContainerRuntimeConfig) { o.Spec.Holdfast.Disruption = apiv1.RebootNode },
		"metadata.annotations." + apiv1.SpecAnnotation: func(o *apiv1.ContainerRuntimeConfig) { o.Annotations[apiv1.SpecAnnotation] = "{}" },
	} {
		if err := refusedFor(field, g.change(t, "before", set)); err != nil {
			t.Errorf("another %s: %v", field, err)
		}
	}
	if err := g.change(t, "before", func(o *apiv1.ContainerRuntimeConfig) { // what has to go may go
		o.Spec.Holdfast, o.Spec.ContainerRuntimeConfig.AdditionalLayerStores, o.Annotations = nil, nil, nil
	}, kube.DryRunAll); err != nil {
		t.Error(err)
	}
	if got := g.warnings.take(); got != nil {
		t.Errorf("warnings: %q", got)
	}
}

// policyName is the name of the policy, and of its binding.
const policyName = "holdfast-additional-storage-config"

// repaired edits and deletes the policy and its binding.
func (g *gateTest) repaired(t *testing.T) {
	key := metav1.ObjectMeta{Name: policyName}
	policy, binding := &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: key}, &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: key}
	g.isBack(t, policy, binding)
	versions := []string{policy.ResourceVersion, binding.ResourceVersion}
	still(t, "they are left alone", func() bool {
		g.isBack(t, policy, binding)
		return slices.Equal(versions, []string{policy.ResourceVersion, binding.ResourceVersion})
	})
	wantPolicy, wantBinding := policy.Spec.DeepCopy(), binding.Spec.DeepCopy()
	repaired := func(what string) {
		t.Helper()
		g.eventually(t, what+" is put right", func(context.Context) error {
			g.isBack(t, policy, binding)
			if diff := cmp.Diff(*wantPolicy, policy.Spec) + cmp.Diff(*wantBinding, binding.Spec); diff != "" {
				return errors.New(diff)
			}
			if policy.Labels["app.kubernetes.io/managed-by"] == "" || binding.Labels["app.kubernetes.io/managed-by"] == "" {
				return fmt.Errorf("labels %v, %v", policy.Labels, binding.Labels)
			}
			return nil
		})
		g.inForce(t)
	}
	ignore := admissionv1.Ignore
	for what, f := range map[string]func(*admissionv1.ValidatingAdmissionPolicy){
		"a rule that is gone":    func(p *admissionv1.ValidatingAdmissionPolicy) { p.Spec.Validations = p.Spec.Validations[:1] },
		"a failure that is none": func(p *admissionv1.ValidatingAdmissionPolicy) { p.Spec.FailurePolicy = &ignore },
		"a label that is gone":   func(p *admissionv1.ValidatingAdmissionPolicy) { p.Labels = nil },
		"a selector": func(p *admissionv1.ValidatingAdmissionPolicy) {
			p.Spec.MatchConstraints.ObjectSelector.MatchLabels = map[string]string{"a": "b"}
		},
		"a condition": func(p *admissionv1.ValidatingAdmissionPolicy) {
			p.Spec.MatchConditions = []admissionv1.MatchCondition{{Name: "never", Expression: "false"}}
		},
		"an exception": func(p *admissionv1.ValidatingAdmissionPolicy) {
			p.Spec.MatchConstraints.ExcludeResourceRules = p.Spec.MatchConstraints.ResourceRules
		},
		"a variable and no update": func(p *admissionv1.ValidatingAdmissionPolicy) {
			p.Spec.Variables = []admissionv1.Variable{{Name: "a", Expression: "1"}}
			p.Spec.MatchConstraints.ResourceRules[0].Operations = []admissionv1.OperationType{admissionv1.Create}
		},
	} {
		change(t, g.client, g.client, policy, f)
		repaired(what)
	}
	for what, f := range map[string]func(*admissionv1.ValidatingAdmissionPolicyBinding){
		"another action": func(b *admissionv1.ValidatingAdmissionPolicyBinding) {
			b.Spec.ValidationActions = []admissionv1.ValidationAction{admissionv1.Audit}
		},
		"a binding of what matches": func(b *admissionv1.ValidatingAdmissionPolicyBinding) {
			b.Spec.MatchResources = &admissionv1.MatchResources{ObjectSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}}
		},
		"a binding without a label": func(b *admissionv1.ValidatingAdmissionPolicyBinding) { b.Labels = nil },
	} {
		change(t, g.client, g.client, binding, f)
		repaired(what)
	}
	for _, o := range []kube.Object{policy, binding} {
		if err := g.client.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		repaired(fmt.Sprintf("%T", o))
	}
}

// isBack waits until objects are there.
func (g *gateTest) isBack(t *testing.T, objects ...kube.Object) {
	t.Helper()
	for _, o := range objects {
		g.eventually(t, fmt.Sprintf("there is %T %s", o, o.GetName()), func(ctx context.Context) error {
			return g.client.Get(ctx, kube.ObjectKeyFromObject(o), o)
		})
	}
}

// preview is about the feature set that warns.
func (g *gateTest) preview(t *testing.T) {
	for field, set := range gated {
		o := newConfig("preview")
		set(o)
		g.eventually(t, "there is a warning of "+field, func(ctx context.Context) error {
			g.warnings.take()
			if err := g.user.Create(ctx, o.DeepCopy(), kube.DryRunAll); err != nil {
				return err // still as it was
			}
			got := g.warnings.take()
			if len(got) != 1 || !strings.Contains(got[0], field+": ") || !strings.Contains(got[0], "technology preview") {
				return fmt.Errorf("warnings: %q", got)
			}
			return nil
		})
	}
	if err := g.user.Create(t.Context(), newConfig("quiet"), kube.DryRunAll); err != nil || g.warnings.take() != nil {
		t.Errorf("an object that needs nothing of it: %v, or a warning", err)
	}
	// What was there all the time is applied now, and may be changed without a word.
	g.configSays(t, "before", apiv1.ContainerRuntimeConfigSuccess, "Success")
	g.hasAll(t)
	relabel := func(o *apiv1.ContainerRuntimeConfig) { o.Labels = map[string]string{"mine": "no"} }
	if err := g.change(t, "before", relabel); err != nil || g.warnings.take() != nil {
		t.Errorf("a label: %v, or a warning", err)
	}
}

// hasAll checks that nodes are to have what the gate is about.
func (g *gateTest) hasAll(t *testing.T) {
	t.Helper()
	spec := g.merged(t, g.updated(t, "worker", "before", "plain", "other"))
	c := spec.ContainerRuntimeConfig
	if len(c.AdditionalLayerStores) != 1 || len(c.AdditionalImageStores) != 1 || len(c.AdditionalArtifactStores) != 1 || spec.Holdfast == nil {
		t.Errorf("nodes are to have %+v, %+v", c, spec.Holdfast)
	}
}

// open is about the feature set in which there is no gate.
func (g *gateTest) open(t *testing.T) {
	key := metav1.ObjectMeta{Name: policyName}
	for _, o := range []kube.Object{&admissionv1.ValidatingAdmissionPolicy{ObjectMeta: key}, &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: key}} {
		g.eventually(t, fmt.Sprintf("%T is gone", o), func(ctx context.Context) error {
			err := g.client.Get(ctx, kube.ObjectKeyFromObject(o), o)
			if err == nil {
				return errors.New("it is there")
			}
			return kube.IgnoreNotFound(err)
		})
	}
	g.eventually(t, "objects are admitted, and nothing said", func(ctx context.Context) error {
		g.warnings.take()
		for field, set := range gated {
			o := newConfig("new")
			set(o)
			if err := g.user.Create(ctx, o, kube.DryRunAll); err != nil {
				return fmt.Errorf("%s: %w", field, err)
			}
		}
		if got := g.warnings.take(); got != nil {
			return fmt.Errorf("warnings: %q", got)
		}
		return nil
	})
	g.configSays(t, "before", apiv1.ContainerRuntimeConfigSuccess, "Success")
	g.hasAll(t)
}
