// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	apiv1 "github.com/holdfast/holdfast/api/v1"
)

func object(name string, age int, change func(*apiv1.ContainerRuntimeConfigSpec)) apiv1.ContainerRuntimeConfig {
	o := apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(time.Date(2026, 1, age, 0, 0, 0, 0, time.UTC))}}
	o.Spec.ContainerRuntimeConfig = &apiv1.ContainerRuntimeConfiguration{}
	change(&o.Spec)
	return o
}

func imageStores(paths ...string) func(*apiv1.ContainerRuntimeConfigSpec) {
	return func(s *apiv1.ContainerRuntimeConfigSpec) {
		for _, p := range paths {
			s.ContainerRuntimeConfig.AdditionalImageStores = append(s.ContainerRuntimeConfig.AdditionalImageStores, apiv1.AdditionalImageStore{Path: apiv1.StorePath(p)})
		}
	}
}

func quantity(s string) *resource.Quantity { q := resource.MustParse(s); return &q }

func pointer[T any](v T) *T { return &v }

func TestMerge(t *testing.T) {
	filtered := func(path string, f *apiv1.ArtifactFilter) func(*apiv1.ContainerRuntimeConfigSpec) {
		return func(s *apiv1.ContainerRuntimeConfigSpec) {
			s.ContainerRuntimeConfig.AdditionalArtifactStores = []apiv1.AdditionalArtifactStore{{Path: apiv1.StorePath(path), Filter: f}}
		}
	}
	many := func(prefix string, n int) []string {
		var all []string
		for i := range n {
			all = append(all, fmt.Sprintf("/%s/%d", prefix, i))
		}
		return all
	}
	for _, c := range []struct {
		name     string
		objects  []apiv1.ContainerRuntimeConfig
		check    func(s apiv1.ContainerRuntimeConfigSpec) any
		want     any
		problems []Problem
	}{
		{
			name:    "nothing",
			objects: nil, check: func(s apiv1.ContainerRuntimeConfigSpec) any {
				return s.Holdfast == nil && s.ContainerRuntimeConfig != nil
			}, want: true,
		},
		{
			name:    "stores by age, one spelling",
			objects: []apiv1.ContainerRuntimeConfig{object("b", 2, imageStores("/x/", "/c")), object("a", 1, imageStores("/z", "/x"))},
			check:   images, want: []string{"/z", "/x", "/c"},
		},
		{
			name:    "the same age: by name",
			objects: []apiv1.ContainerRuntimeConfig{object("b", 1, imageStores("/b")), object("a", 1, imageStores("/a"))},
			check:   images, want: []string{"/a", "/b"},
		},
		{
			name:    "as many as there may be",
			objects: []apiv1.ContainerRuntimeConfig{object("a", 1, imageStores(many("a", 6)...)), object("b", 2, imageStores(append(many("b", 4), "/a/0")...))},
			check:   images, want: append(many("a", 6), many("b", 4)...),
		},
		{
			name:    "one too many",
			objects: []apiv1.ContainerRuntimeConfig{object("a", 1, imageStores(many("a", 6)...)), object("b", 2, imageStores(many("b", 4)...)), object("c", 3, imageStores("/a/1", "/c"))},
			check:   images, want: append(many("a", 6), many("b", 4)...),
			problems: []Problem{{[]string{"a", "b", "c"}, ReasonLimit, "additionalImageStores: all objects together name more than 10: /c of c is left out"}},
		},
		{
			name: "values that differ",
			objects: []apiv1.ContainerRuntimeConfig{
				object("young", 3, func(s *apiv1.ContainerRuntimeConfigSpec) {
					s.ContainerRuntimeConfig.PidsLimit, s.ContainerRuntimeConfig.LogLevel = pointer(int64(100)), "info"
				}),
				object("old", 1, func(s *apiv1.ContainerRuntimeConfigSpec) { s.ContainerRuntimeConfig.PidsLimit = pointer(int64(0)) }),
			},
			check: func(s apiv1.ContainerRuntimeConfigSpec) any {
				return fmt.Sprint(*s.ContainerRuntimeConfig.PidsLimit, s.ContainerRuntimeConfig.LogLevel)
			}, want: "0info",
			problems: []Problem{{[]string{"old", "young"}, ReasonConflict, "pidsLimit: old wants 0, young wants 100: that of old counts, which comes first"}},
		},
		{
			name: "values that are the same",
			objects: []apiv1.ContainerRuntimeConfig{
				object("a", 1, func(s *apiv1.ContainerRuntimeConfigSpec) { s.ContainerRuntimeConfig.OverlaySize = quantity("1Gi") }),
				object("b", 2, func(s *apiv1.ContainerRuntimeConfigSpec) { s.ContainerRuntimeConfig.OverlaySize = quantity("1024Mi") }),
			},
			check: func(s apiv1.ContainerRuntimeConfigSpec) any { return s.ContainerRuntimeConfig.OverlaySize.String() }, want: "1Gi",
		},
		{
			name: "filters",
			objects: []apiv1.ContainerRuntimeConfig{
				object("a", 1, filtered("/m", nil)), object("b", 2, filtered("/m/", &apiv1.ArtifactFilter{MaxSize: quantity("1")})),
				object("c", 3, filtered("/m", &apiv1.ArtifactFilter{MaxSize: quantity("2")})),
			},
			check: func(s apiv1.ContainerRuntimeConfigSpec) any {
				return fmt.Sprint(len(s.ContainerRuntimeConfig.AdditionalArtifactStores), s.ContainerRuntimeConfig.AdditionalArtifactStores[0].Filter.MaxSize)
			}, want: "1 1",
			problems: []Problem{{[]string{"b", "c"}, ReasonConflict, "additionalArtifactStores /m.filter: b wants {\"maxSize\":\"1\"}, c wants {\"maxSize\":\"2\"}: that of b counts, which comes first"}},
		},
		{
			name: "ours",
			objects: []apiv1.ContainerRuntimeConfig{
				object("a", 1, func(s *apiv1.ContainerRuntimeConfigSpec) {
					s.Holdfast = &apiv1.HoldfastConfiguration{Trusted: []apiv1.Pattern{"a", "b"}, CacheLimit: "1Gi", RegistryMirrors: []apiv1.RegistryMirror{{Source: "r", Mirrors: []string{"x"}}}}
				}),
				object("b", 2, func(*apiv1.ContainerRuntimeConfigSpec) {}),
				object("c", 3, func(s *apiv1.ContainerRuntimeConfigSpec) {
					s.Holdfast = &apiv1.HoldfastConfiguration{Trusted: []apiv1.Pattern{"b", "c"}, CacheLimit: "2Gi", RegistryMirrors: []apiv1.RegistryMirror{{Source: "r", Mirrors: []string{"y", "x"}}}}
				}),
			},
			check: func(s apiv1.ContainerRuntimeConfigSpec) any { return fmt.Sprint(*s.Holdfast) },
			want: fmt.Sprint(apiv1.HoldfastConfiguration{
				Trusted: []apiv1.Pattern{"a", "b", "c"}, CacheLimit: "1Gi", RegistryMirrors: []apiv1.RegistryMirror{{Source: "r", Mirrors: []string{"x", "y"}}},
			}),
			problems: []Problem{{[]string{"a", "c"}, ReasonConflict, "holdfast.cacheLimit: a wants 1Gi, c wants 2Gi: that of a counts, which comes first"}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			for range 10 { // the order in which they are listed does not matter
				rand.Shuffle(len(c.objects), func(i, j int) { c.objects[i], c.objects[j] = c.objects[j], c.objects[i] })
				spec, problems := Merge(c.objects)
				if diff := cmp.Diff(c.want, c.check(spec)); diff != "" {
					t.Fatal(diff)
				}
				if diff := cmp.Diff(c.problems, problems); diff != "" {
					t.Fatal(diff)
				}
			}
		})
	}
}

// What a pool inherits counts after what selects it itself, and gives way without a word.
func TestMergeInherited(t *testing.T) {
	set := func(pids int64, stores ...string) func(*apiv1.ContainerRuntimeConfigSpec) {
		return func(s *apiv1.ContainerRuntimeConfigSpec) {
			s.ContainerRuntimeConfig.PidsLimit = pointer(pids)
			imageStores(stores...)(s)
		}
	}
	own := []apiv1.ContainerRuntimeConfig{object("gpu", 5, set(500, "/gpu")), object("both", 6, imageStores("/both"))}
	inherited := []apiv1.ContainerRuntimeConfig{
		object("b", 2, set(200, "/b")), object("a", 1, set(100, "/a", "/gpu")), own[1],
	}
	spec, problems := Merge(own, inherited...)
	if len(problems) > 0 || *spec.ContainerRuntimeConfig.PidsLimit != 500 {
		t.Error(problems, *spec.ContainerRuntimeConfig.PidsLimit)
	}
	if diff := cmp.Diff([]string{"/gpu", "/both", "/a", "/b"}, images(spec)); diff != "" {
		t.Error(diff)
	}
	// Where the pool says nothing, those that it inherits from are at odds with each other.
	_, problems = Merge(own[1:], inherited...)
	if len(problems) != 1 || problems[0].Message != "pidsLimit: a wants 100, b wants 200: that of a counts, which comes first" {
		t.Error(problems)
	}
}

// However much objects ask for together, what comes out is one that an API server takes.
func TestMergedIsValid(t *testing.T) {
	many := func(name string, n int) []apiv1.Pattern {
		var all []apiv1.Pattern
		for i := range n {
			all = append(all, apiv1.Pattern(fmt.Sprintf("example.com/%s/%d", name, i)))
		}
		return all
	}
	places := func(name string, n int) []string {
		var all []string
		for i := range n {
			all = append(all, fmt.Sprintf("docker://example.com/%s/%d", name, i))
		}
		return all
	}
	var objects []apiv1.ContainerRuntimeConfig
	for i := range 3 {
		name := fmt.Sprintf("o%d", i)
		var mirrors []apiv1.RegistryMirror
		for j := range 40 {
			mirrors = append(mirrors, apiv1.RegistryMirror{Source: fmt.Sprintf("%s-%d.example.com", name, j), Mirrors: []string{"m.example.com"}})
		}
		mirrors = append(mirrors, apiv1.RegistryMirror{Source: "same.example.com", Mirrors: []string{}})
		for j := range 9 {
			mirrors[40].Mirrors = append(mirrors[40].Mirrors, fmt.Sprintf("%s-%d.example.com", name, j))
		}
		o := object(name, 1+i, func(s *apiv1.ContainerRuntimeConfigSpec) {
			s.Holdfast = &apiv1.HoldfastConfiguration{
				Include: many(name, 100), Exclude: many(name, 100), Trusted: many(name, 100), Sources: places(name, 30), TrustedSources: places(name, 30),
				Pinned: many(name, 200), Artifacts: many(name, 100), IndexStores: places(name, 30), IndexPublish: places(name, 30), RegistryMirrors: mirrors,
			}
		})
		if errs := o.Validate(); len(errs) > 0 {
			t.Fatal(errs)
		}
		objects = append(objects, o)
	}
	spec, problems := Merge(objects)
	merged := apiv1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: "merged"}, Spec: spec}
	if errs := merged.Validate(); len(errs) > 0 {
		t.Error(errs)
	}
	if len(problems) != 2*11 { // each list that the second and the third have no room in
		t.Errorf("%d problems: %v", len(problems), problems)
	}
	if want := "holdfast.pinned: all objects together name more than 256: example.com/o1/56, with 143 more, of o1 is left out"; !slices.ContainsFunc(problems, func(p Problem) bool { return p.Message == want }) {
		t.Errorf("%v", problems)
	}
}

func images(s apiv1.ContainerRuntimeConfigSpec) any {
	var all []string
	for _, i := range s.ContainerRuntimeConfig.AdditionalImageStores {
		all = append(all, clean(i.Path))
	}
	return all
}

func TestCondition(t *testing.T) {
	problems := []Problem{{[]string{"a", "b"}, ReasonConflict, "one"}, {[]string{"b", "c"}, ReasonLimit, "two"}}
	for object, want := range map[string]string{"a": "Failure Conflict one", "b": "Failure Conflict one; two", "c": "Failure LimitExceeded two", "d": "Success  Success"} {
		c := Condition(object, problems, metav1.Now())
		if got := fmt.Sprint(c.Type, " ", c.Reason, " ", c.Message); got != want {
			t.Errorf("%s: %s", object, got)
		}
	}
}

func TestSelect(t *testing.T) {
	selecting := func(name string, s *metav1.LabelSelector) apiv1.ContainerRuntimeConfig {
		return object(name, 1, func(spec *apiv1.ContainerRuntimeConfigSpec) { spec.MachineConfigPoolSelector = s })
	}
	all := []apiv1.ContainerRuntimeConfig{
		selecting("none", nil), selecting("empty", &metav1.LabelSelector{}),
		selecting("gpu", &metav1.LabelSelector{MatchLabels: map[string]string{"gpu": "yes"}}),
		selecting("any", &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "gpu", Operator: metav1.LabelSelectorOpExists}}}),
	}
	found, err := Select(all, map[string]string{"gpu": "no"})
	if err != nil || len(found) != 1 || found[0].Name != "any" {
		t.Errorf("%v, %v", found, err)
	}
	bad := selecting("bad", &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "gpu", Operator: "Maybe"}}})
	if _, err := Select([]apiv1.ContainerRuntimeConfig{bad}, nil); err == nil || !strings.Contains(err.Error(), "bad") {
		t.Error(err)
	}
}

// Every field of the section is merged: a new one that is forgotten fails here.
func TestAllFieldsAreMerged(t *testing.T) {
	full := objects(t, "testdata/daemon/objects.yaml")[0]
	full.Spec.ContainerRuntimeConfig.PidsLimit = pointer(int64(30))
	spec, problems := Merge([]apiv1.ContainerRuntimeConfig{full})
	if diff := cmp.Diff(full.Spec.Holdfast, spec.Holdfast); diff != "" || len(problems) > 0 {
		t.Error(diff, problems)
	}
	if diff := cmp.Diff(full.Spec.ContainerRuntimeConfig, spec.ContainerRuntimeConfig); diff != "" {
		t.Error(diff)
	}
	if names := slices.Sorted(slices.Values(unset(spec.Holdfast))); len(names) > 0 {
		t.Errorf("testdata/daemon does not set %v", names)
	}
}

func unset(h *apiv1.HoldfastConfiguration) []string {
	var all []string
	v := reflect.ValueOf(*h)
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			all = append(all, v.Type().Field(i).Name)
		}
	}
	return all
}
