// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// object is one that selects pools by a label, with image stores.
func object(name, label string, change func(*apiv1.ContainerRuntimeConfig), stores ...string) apiv1.ContainerRuntimeConfig {
	o := apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: name, Generation: 3}, Spec: apiv1.ContainerRuntimeConfigSpec{
		MachineConfigPoolSelector: &metav1.LabelSelector{MatchLabels: map[string]string{label: ""}},
		ContainerRuntimeConfig:    &apiv1.ContainerRuntimeConfiguration{},
	}}
	for _, s := range stores {
		o.Spec.ContainerRuntimeConfig.AdditionalImageStores = append(o.Spec.ContainerRuntimeConfig.AdditionalImageStores, apiv1.AdditionalImageStore{Path: apiv1.StorePath(s)})
	}
	if change != nil {
		change(&o)
	}
	return o
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		name, features string
		change         func(*apiv1.ContainerRuntimeConfig)
		stays          bool
		stores         int
		reason, text   string
	}{
		{name: "as it is", features: "Default", stays: true, stores: 1},
		{name: "a preview", features: "TechPreviewNoUpgrade", stays: true, stores: 1},
		{name: "the gate is off", features: "Off", stays: true, reason: reasonGate, text: "AdditionalStorageConfig"},
		{
			name: "the annotation counts", features: "Default", stays: true, stores: 1,
			change: func(o *apiv1.ContainerRuntimeConfig) {
				o.Annotations = map[string]string{apiv1.SpecAnnotation: "holdfast: {cacheLimit: 1Gi}"}
			},
		},
		{
			name: "an annotation that is none", features: "Default", reason: reasonInvalid, text: apiv1.SpecAnnotation,
			change: func(o *apiv1.ContainerRuntimeConfig) {
				o.Annotations = map[string]string{apiv1.SpecAnnotation: "holdfast: [}"}
			},
		},
		{
			name: "a path that OpenShift lets through", features: "Default", reason: reasonInvalid, text: "'..' segments",
			change: func(o *apiv1.ContainerRuntimeConfig) {
				o.Spec.ContainerRuntimeConfig.AdditionalImageStores[0].Path = "/a/../b"
			},
		},
		{
			name: "a selector that is none", features: "Default", reason: reasonInvalid, text: "machineConfigPoolSelector",
			change: func(o *apiv1.ContainerRuntimeConfig) {
				o.Spec.MachineConfigPoolSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Maybe"}}
			},
		},
		{
			name: "on its way out", features: "Default",
			change: func(o *apiv1.ContainerRuntimeConfig) { o.DeletionTimestamp = new(metav1.Now()) },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			features, err := ParseFeatureSet(c.features)
			if err != nil {
				t.Fatal(err)
			}
			given := []apiv1.ContainerRuntimeConfig{object("o", "worker", c.change, "/a")}
			j := judge(given, features)
			if (len(j.objects) == 1) != c.stays || c.stays && len(j.objects[0].Spec.ContainerRuntimeConfig.AdditionalImageStores) != c.stores {
				t.Errorf("%+v", j.objects)
			}
			if got := reasonOf(j.problems); got != c.reason || !strings.Contains(messages(j.problems), c.text) {
				t.Errorf("%+v", j.problems)
			}
			if len(given[0].Spec.ContainerRuntimeConfig.AdditionalImageStores) != 1 {
				t.Error("what was given was changed: it is the cache's")
			}
		})
	}
	if _, err := ParseFeatureSet("Preview"); err == nil || !strings.Contains(err.Error(), "TechPreviewNoUpgrade") {
		t.Error(err)
	}
}

func TestConfigure(t *testing.T) {
	pools := []apiv1.MachineConfigPool{
		{ObjectMeta: metav1.ObjectMeta{Name: "worker", Labels: map[string]string{"worker": ""}}},
		{ObjectMeta: metav1.ObjectMeta{Name: "gpu", Labels: map[string]string{"gpu": ""}}},
		{ObjectMeta: metav1.ObjectMeta{Name: "master", Labels: map[string]string{"master": ""}}},
	}
	objects := []apiv1.ContainerRuntimeConfig{object("b", "worker", nil, "/b"), object("a", "worker", nil, "/a"), object("z", "gpu", nil, "/z"), object("n", "none", nil, "/n")}
	for pool, want := range map[string]struct {
		sources []string
		own     bool
	}{"worker": {[]string{"a", "b"}, true}, "gpu": {[]string{"z", "a", "b"}, true}, "master": {nil, false}} {
		i := slices.IndexFunc(pools, func(p apiv1.MachineConfigPool) bool { return p.Name == pool })
		c := configure(&pools[i], pools, objects)
		if !slices.Equal(c.sources(), want.sources) || c.own != want.own || len(c.problems) > 0 {
			t.Errorf("%s: %+v", pool, c)
		}
		for _, r := range c.refs {
			if r.Generation != 3 || r.Kind != "ContainerRuntimeConfig" {
				t.Errorf("%s: %+v", pool, r)
			}
		}
	}
}

// What a status says is bounded, whatever objects and nodes say.
func TestMessagesAreBounded(t *testing.T) {
	var problems []render.Problem
	for range 1000 {
		problems = append(problems, render.Problem{Objects: []string{"o"}, Reason: render.ReasonConflict, Message: strings.Repeat("ä", 1000)})
	}
	pool := &apiv1.MachineConfigPool{}
	for _, c := range poolStatus(pool, "", rollout{}, nil, problems).Conditions {
		if len(c.Message) > maxMessage+4 {
			t.Errorf("%s: %d bytes", c.Type, len(c.Message))
		}
	}
	o := object("o", "worker", nil)
	for _, c := range configStatus(&o, problems, nil).Conditions {
		if len(c.Message) > maxMessage+4 || !strings.HasSuffix(c.Message, " ...") {
			t.Errorf("%s: %d bytes", c.Type, len(c.Message))
		}
	}
	if n := len(short(strings.Repeat("ä", 1000))); n > 1024 {
		t.Errorf("an event of %d bytes", n)
	}
}
