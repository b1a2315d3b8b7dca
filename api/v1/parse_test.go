// SPDX-License-Identifier: Apache-2.0

package v1_test

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	v1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/api/v1/apitest"
)

const head = "apiVersion: machineconfiguration.openshift.io/v1\nkind: ContainerRuntimeConfig\n"

// minimal is a valid object.
func minimal(name string) string {
	return head + "metadata: {name: " + name + "}\nspec: {containerRuntimeConfig: {pidsLimit: 20}}\n"
}

// annotated is an object with the annotation, and stores /a and /b, of which /b
// has a filter.
func annotated(annotation, more string) string {
	return fmt.Sprintf(`%smetadata: {name: x, annotations: {holdfast.github.io/spec: %q}}
spec: {containerRuntimeConfig: {additionalArtifactStores: [{path: /a}, {path: /b, filter: {types: [t]}}]}%s}
`, head, annotation, more)
}

func TestParseDocuments(t *testing.T) {
	a, b := minimal("a"), minimal("b")
	jsonA, err := yaml.YAMLToJSON([]byte(a))
	if err != nil {
		t.Fatal(err)
	}
	indented := func(s string) string { return strings.ReplaceAll("\n"+strings.TrimSpace(s), "\n", "\n  ") }
	list := func(kind string) string {
		return kind + "\nmetadata: {resourceVersion: ''}\nitems:\n-" + indented(a) + "\n-" + indented(b) + "\n"
	}
	for _, c := range []struct {
		name, data string
		want       []string
	}{
		{"nothing", "", nil},
		{"a comment", "# nothing\n", nil},
		{"empty documents", "---\n---\n# nothing\n---\n", nil},
		{"one", a, []string{"a"}},
		{"two", a + "---\n" + b, []string{"a", "b"}},
		{"comments", "# one\n---\n" + a + "--- # two\n" + b + "---\n# three\n", []string{"a", "b"}},
		{"ends", a + "...\n" + b + "...\n", []string{"a", "b"}},
		{"an end and a start", a + "...\n---\n" + b, []string{"a", "b"}},
		{"CRLF", strings.ReplaceAll(a+"---\n"+b, "\n", "\r\n"), []string{"a", "b"}},
		{"byte order mark", "\ufeff" + a, []string{"a"}},
		{"flow on the line of the separator", "--- " + string(jsonA), []string{"a"}},
		{"JSON", string(jsonA), []string{"a"}},
		{"JSON with tabs and escapes", "\t" + strings.Replace(string(jsonA), `"name":"a"`, `"name":"\u0061", "labels":{"a":"\ud83d\ude00\/"}`, 1), []string{"a"}},
		{"JSON and YAML", string(jsonA) + "\n---\n" + b, []string{"a", "b"}},
		{"List", list("apiVersion: v1\nkind: List"), []string{"a", "b"}},
		{"list of the kind", list(strings.TrimSpace(strings.Replace(head, "Config\n", "ConfigList\n", 1))), []string{"a", "b"}},
		{"empty list", "{apiVersion: v1, kind: List, items: []}", nil},
		{"OpenShift's field", strings.Replace(a, "pidsLimit: 20", "containerGomaxprocsBehavior: Autosize", 1), []string{"a"}},
		{"separator in a text", strings.Replace(a, "{name: a}", "\n  name: a\n  annotations:\n    a: |\n      a\n      ---\n      b", 1), []string{"a"}},
		{"aliases", strings.Replace(a, "{pidsLimit: 20}", "{additionalImageStores: &s [{path: /a}], additionalArtifactStores: *s}", 1), []string{"a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			configs, err := v1.ParseContainerRuntimeConfigs([]byte(c.data))
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, o := range configs {
				names = append(names, o.Name)
				if errs := o.Validate(); len(errs) > 0 {
					t.Error(errs)
				}
			}
			if diff := cmp.Diff(c.want, names); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	a := minimal("a")
	with := func(old, new string) string {
		if !strings.Contains(a, old) {
			t.Fatal(old)
		}
		return strings.Replace(a, old, new, 1)
	}
	bomb := "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
	for i := range 12 {
		bomb += fmt.Sprintf("%c: &%[1]c [*%[2]c, *%[2]c, *%[2]c, *%[2]c, *%[2]c, *%[2]c, *%[2]c, *%[2]c]\n", 'b'+i, 'a'+i)
	}
	for _, c := range []struct {
		name, data string
		want       []string // parts of the error
	}{
		{"too large", strings.Repeat("#", 1<<20+1), []string{"reading 1048577 bytes", "at most 1048576"}},
		{"not YAML", "a: b: c", []string{"reading document 1: decoding YAML: "}},
		{"not a mapping", "---\n# none\n---\n- a", []string{"reading document 1: ", "want a mapping, have a list"}},
		{"another kind", a + "---\napiVersion: v1\nkind: ConfigMap\n", []string{"reading document 2: ", `kind "ConfigMap" of apiVersion "v1"`}},
		{"another version", with("openshift.io/v1", "openshift.io/v2"), []string{`kind "ContainerRuntimeConfig" of apiVersion "machineconfiguration.openshift.io/v2"`}},
		{"no kind", "metadata: {name: a}", []string{`kind "" of apiVersion ""`}},
		{"a list of a list", "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: List, items: []}]}", []string{"document 1: decoding items[0]: ", `kind "List"`}},
		{"a list of null", "{apiVersion: v1, kind: List, items: [null]}", []string{"items[0]: want a mapping, have nothing"}},
		{"a list without items", "{apiVersion: v1, kind: List}", []string{"items: want a list, have nothing"}},
		{"a list with more", "{apiVersion: v1, kind: List, items: [], item: {}}", []string{`unknown field "item"`}},
		{"no name", with("name: a", "labels: {}"), []string{`ContainerRuntimeConfig "": metadata.name: Required value`}},
		{"metadata null", with("{name: a}", "null"), []string{"metadata.name: Required value"}},
		{"unknown field", a + "---\n" + with("pidsLimit", "pidLimit"), []string{`reading document 2: decoding ContainerRuntimeConfig "a": `, `unknown field "spec.containerRuntimeConfig.pidLimit"`}},
		{"two unknown fields", with("pidsLimit: 20", "a: 1, b: 2"), []string{`"spec.containerRuntimeConfig.a"`, `"spec.containerRuntimeConfig.b"`}},
		{"case of a field", with("pidsLimit", "PidsLimit"), []string{`unknown field "spec.containerRuntimeConfig.PidsLimit"`}},
		{"OpenShift's field elsewhere", with("spec: {", "spec: {containerGomaxprocsBehavior: Autosize, "), []string{`unknown field "spec.containerGomaxprocsBehavior"`}},
		{"field of a store", with("pidsLimit: 20", "additionalImageStores: [{path: /a}, {paht: /b}]"), []string{`"spec.containerRuntimeConfig.additionalImageStores[1].paht"`}},
		{"field twice in YAML", with("pidsLimit: 20", "pidsLimit: 20, pidsLimit: 21"), []string{"document 1", `"pidsLimit" already`}},
		{"field twice in JSON", `{"kind": "List", "kind": "List"}`, []string{`duplicate field "kind"`}},
		{"type", with("20", "many"), []string{"spec.containerRuntimeConfig.pidsLimit of type int64"}},
		{"second document by another line break", strings.TrimSpace(a) + "\r---\r" + "b: c", []string{"document 1"}},
		{"nested deeply", strings.Repeat("[", 200) + strings.Repeat("]", 200), []string{"nested more than 100 deep"}},
		{"nested deeply in JSON", `{"a":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + "}", []string{"document 1"}},
		{"aliases that grow", bomb, []string{"more than 1048576 bytes"}},
		{"aliases of a long text", "a: &a " + strings.Repeat("x", 1<<18) + "\nb: [*a, *a, *a, *a]", []string{"more than 1048576 bytes"}},
		{"nulls without end", with("pidsLimit: 20", "additionalImageStores: ["+strings.Repeat("~,", 1<<18)+"]"), []string{"additionalImageStores[9]"}},
		{"fields without end", with("pidsLimit: 20", strings.Trim(apitest.List(1<<14, "f#: 1"), "[]")), []string{"unknown field"}},
		{"one field without end", strings.Repeat("a: 1\n", 1<<16), []string{`key "a" already set`}},
		{"alias of itself", "a: &a [*a]", []string{"document 1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			configs, err := v1.ParseContainerRuntimeConfigs([]byte(c.data))
			if err == nil || configs != nil {
				t.Fatalf("%v, %v", configs, err)
			}
			if n := len(err.Error()); n > 4096 {
				t.Errorf("an error of %d bytes: %.200s", n, err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v\nwant: %s", err, want)
				}
			}
		})
	}
}

func TestAnnotation(t *testing.T) {
	for _, c := range []struct {
		name, annotation, more string
		want                   string // of the spec, as YAML
	}{
		{"empty", "", "", "{}"},
		{"null", "null", "", "{}"},
		{"JSON", `{"holdfast":{"offline":true}}`, "", "{holdfast: {offline: true}}"},
		{"YAML", "holdfast:\n  include:\n  - a\n", "", "{holdfast: {include: [a]}}"},
		{"what the object says counts", "holdfast: {offline: true}", ", holdfast: {include: [b]}", "{holdfast: {include: [b]}}"},
		{"filter", "containerRuntimeConfig: {additionalArtifactStores: [{path: /a, filter: {maxSize: 1Gi}}]}", "", "{a: {maxSize: 1Gi}}"},
		{"filter, a slash", "containerRuntimeConfig: {additionalArtifactStores: [{path: /a/, filter: {maxSize: 1Gi}}]}", "", "{a: {maxSize: 1Gi}}"},
		{"filter of a store with one", "containerRuntimeConfig: {additionalArtifactStores: [{path: /b, filter: {maxSize: 1Gi}}]}", "", "{}"},
		{"no filter", "containerRuntimeConfig: {additionalArtifactStores: [{path: /a}]}", "", "{}"},
	} {
		t.Run(c.name, func(t *testing.T) {
			configs, err := v1.ParseContainerRuntimeConfigs([]byte(annotated(c.annotation, c.more)))
			if err != nil {
				t.Fatal(err)
			}
			var want struct {
				Holdfast *v1.HoldfastConfiguration `json:"holdfast"`
				A        *v1.ArtifactFilter        `json:"a"`
			}
			if err := yaml.UnmarshalStrict([]byte(c.want), &want); err != nil {
				t.Fatal(err)
			}
			stores := []v1.AdditionalArtifactStore{{Path: "/a", Filter: want.A}, {Path: "/b", Filter: &v1.ArtifactFilter{Types: []v1.Pattern{"t"}}}}
			got := configs[0]
			if diff := cmp.Diff(want.Holdfast, got.Spec.Holdfast); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(stores, got.Spec.ContainerRuntimeConfig.AdditionalArtifactStores); diff != "" {
				t.Error(diff)
			}
			again := *got.DeepCopy()
			if err := again.ApplyAnnotation(); err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(got, again); diff != "" {
				t.Errorf("a second time: %s", diff)
			}
		})
	}
}

func TestAnnotationErrors(t *testing.T) {
	stores := func(s string) string { return "containerRuntimeConfig: {additionalArtifactStores: [" + s + "]}" }
	for _, c := range []struct{ name, annotation, want string }{
		{"not YAML", "a: b: c", "decoding YAML"},
		{"not a mapping", "[a]", "cannot unmarshal array"},
		{"two documents", "holdfast: {}\n---\nholdfast: {}", "there is another document"},
		{"too large", strings.Repeat("#", 1<<20+1), "at most 1048576"},
		{"more of a spec", "machineConfigPoolSelector: {}", `unknown field "machineConfigPoolSelector"`},
		{"more of the settings", "containerRuntimeConfig: {pidsLimit: 20}", `unknown field "containerRuntimeConfig.pidsLimit"`},
		{"other stores", "containerRuntimeConfig: {additionalImageStores: [{path: /a}]}", `unknown field "containerRuntimeConfig.additionalImageStores"`},
		{"more of a store", stores("{path: /a, owner: me}"), `unknown field "containerRuntimeConfig.additionalArtifactStores[0].owner"`},
		{"unknown", "holdfast: {colour: blue}", `unknown field "holdfast.colour"`},
		{"null", "holdfast: null", `holdfast: Invalid value: "null"`},
		{"quantity", stores("{path: /a, filter: {maxSize: '1e3000000000'}}"), "maxSize: Invalid value"},
		{"store that is not there", stores("{path: /a}, {path: /c}"), `containerRuntimeConfig.additionalArtifactStores[1].path: Not found: "/c"`},
		{"store without a path", stores("{}"), `additionalArtifactStores[0].path: Not found: ""`},
		{"store twice", stores("{path: /a}, {path: /a/}"), `additionalArtifactStores[1].path: Duplicate value: "/a/"`},
		{"many stores", stores(strings.Repeat("{path: /a}, ", 11)), "must have at most 10 items"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := v1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{v1.SpecAnnotation: c.annotation}}}
			o.Spec.ContainerRuntimeConfig = &v1.ContainerRuntimeConfiguration{AdditionalArtifactStores: []v1.AdditionalArtifactStore{{Path: "/a"}}}
			before := *o.DeepCopy()
			err := o.ApplyAnnotation()
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "metadata.annotations["+v1.SpecAnnotation+"]") {
				t.Errorf("%v\nwant: %s", err, c.want)
			}
			if diff := cmp.Diff(before, o); diff != "" {
				t.Errorf("changed by an annotation that is wrong: %s", diff)
			}
		})
	}
	// Parsed, the document and the object are named, too.
	_, err := v1.ParseContainerRuntimeConfigs([]byte(annotated("a: 1", "")))
	if err == nil || !strings.Contains(err.Error(), `document 1: decoding ContainerRuntimeConfig "x": `) {
		t.Error(err)
	}
}

func TestAnnotationWithoutStores(t *testing.T) {
	o := v1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{v1.SpecAnnotation: "containerRuntimeConfig: {additionalArtifactStores: [{path: /a}]}"}}}
	if err := o.ApplyAnnotation(); err == nil {
		t.Error("a store of an object without settings")
	}
	o.Annotations[v1.SpecAnnotation] = "containerRuntimeConfig: {}\nholdfast: {offline: true}"
	if err := o.ApplyAnnotation(); err != nil || o.Spec.Holdfast == nil {
		t.Errorf("%v, %+v", err, o.Spec.Holdfast)
	}
}

// What a decoder other than this package's lets through must neither take long nor panic.
func TestValidateAnything(t *testing.T) {
	var none *v1.ContainerRuntimeConfig
	if len(none.Validate()) == 0 || len((&v1.ContainerRuntimeConfig{}).Validate()) == 0 {
		t.Error("nothing is valid")
	}
	for _, text := range []string{"1e30000000", "-1e30000000"} {
		q := resource.MustParse(text)
		o := v1.ContainerRuntimeConfig{ObjectMeta: metav1.ObjectMeta{Name: "x"}}
		o.Spec.ContainerRuntimeConfig = &v1.ContainerRuntimeConfiguration{LogSizeMax: &q, OverlaySize: &q,
			AdditionalArtifactStores: []v1.AdditionalArtifactStore{{Path: "/a", Filter: &v1.ArtifactFilter{MaxSize: &q}}}}
		if errs := o.Validate(); len(errs) != 3 {
			t.Errorf("%s: %v", text, errs)
		}
	}
	most := int64(math.MinInt64)
	o := v1.ContainerRuntimeConfig{}
	o.Spec.ContainerRuntimeConfig = &v1.ContainerRuntimeConfiguration{PidsLimit: &most, LogSizeMax: &resource.Quantity{},
		AdditionalLayerStores: make([]v1.AdditionalLayerStore, 1<<20)}
	o.Spec.Holdfast = &v1.HoldfastConfiguration{Sources: make([]string, 1<<20), RegistryMirrors: make([]v1.RegistryMirror, 1<<20)}
	if errs := o.Validate(); len(errs) != 5 {
		t.Errorf("%d errors: %v", len(errs), errs)
	}
}

func FuzzParse(f *testing.F) {
	for _, c := range apitest.Configs() {
		f.Add([]byte(c.Document))
	}
	f.Add([]byte(minimal("a") + "---\n" + minimal("b")))
	f.Add([]byte(annotated("holdfast: {offline: true}\ncontainerRuntimeConfig: {additionalArtifactStores: [{path: /a, filter: {maxSize: 1Gi}}]}", "")))
	f.Add([]byte(`{"apiVersion":"v1","kind":"List","items":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		configs, err := v1.ParseContainerRuntimeConfigs(data)
		if err != nil {
			return
		}
		for _, o := range configs {
			if len(o.Validate()) > 0 {
				continue
			}
			// What only servers write has no place in files, and times lose precision.
			o.ObjectMeta = metav1.ObjectMeta{Name: o.Name, Labels: o.Labels, Annotations: o.Annotations}
			o.Status = v1.ContainerRuntimeConfigStatus{}
			written, err := yaml.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			again, err := v1.ParseContainerRuntimeConfigs(written)
			if err != nil || len(again) != 1 {
				t.Fatalf("%v, from\n%s", err, written)
			}
			if errs := again[0].Validate(); len(errs) > 0 {
				t.Errorf("%v, from\n%s", errs, written)
			}
			if diff := cmp.Diff(o, again[0], cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
		}
	})
}
