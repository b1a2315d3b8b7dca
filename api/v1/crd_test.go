// SPDX-License-Identifier: Apache-2.0

package v1_test

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/objectmeta"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	schemavalidation "k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	v1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/api/v1/apitest"
)

const (
	configsCRD  = "crds/machineconfiguration.openshift.io_containerruntimeconfigs.yaml"
	poolsCRD    = "crds/machineconfiguration.openshift.io_machineconfigpools.yaml"
	machinesCRD = "crds/machineconfiguration.openshift.io_machineconfigs.yaml"
	nodesCRD    = "../holdfast/v1/crds/holdfast.github.io_containerruntimenodes.yaml"
)

// readCRD reads a definition as an API server does: strictly, with defaults.
func readCRD(t testing.TB, path string) (*apiextensionsv1.CustomResourceDefinition, *apiextensions.CustomResourceDefinition) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	crd := &apiextensionsv1.CustomResourceDefinition{}
	if err := yaml.UnmarshalStrict(data, crd); err != nil {
		t.Fatal(err)
	}
	apiextensionsv1.SetDefaults_CustomResourceDefinition(crd)
	internal := &apiextensions.CustomResourceDefinition{}
	if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(crd, internal, nil); err != nil {
		t.Fatal(err)
	}
	return crd, internal
}

// apiServer admits objects of one definition.
type apiServer struct {
	structural *structuralschema.Structural
	schema     schemavalidation.SchemaValidator
	rules      *cel.Validator // nil if there are none
}

func newAPIServer(t testing.TB, path string) *apiServer {
	t.Helper()
	_, crd := readCRD(t, path)
	// The conversion moves the schema of an only version to the top.
	props := crd.Spec.Validation.OpenAPIV3Schema
	structural, err := structuralschema.NewStructural(props)
	if err != nil {
		t.Fatal(err)
	}
	schema, _, err := schemavalidation.NewSchemaValidator(props)
	if err != nil {
		t.Fatal(err)
	}
	return &apiServer{structural: structural, schema: schema, rules: cel.NewValidator(structural, true, celconfig.PerCallLimit)}
}

// admit does what creating an object does, in the order of the API server:
// see unstructuredSchemaCoercer.apply and customResourceStrategy.Validate.
func (s *apiServer) admit(document []byte) (pruned []string, errs field.ErrorList, err error) {
	data, err := yaml.YAMLToJSON(document)
	if err != nil {
		return nil, nil, err
	}
	object := map[string]any{}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(data, &object); err != nil {
		return nil, nil, err
	}
	pruned = pruning.PruneWithOptions(object, s.structural, true, structuralschema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true})
	before := runtime.DeepCopyJSON(object)
	if defaulting.PruneNonNullableNullsWithoutDefaults(object, s.structural); !reflect.DeepEqual(before, object) {
		pruned = append(pruned, "null")
	}
	if meta, ok := object["metadata"].(map[string]any); ok {
		m := metav1.ObjectMeta{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(meta, &m); err != nil {
			return pruned, nil, err
		}
		errs = append(errs, apivalidation.ValidateObjectMeta(&m, false, apivalidation.NameIsDNSSubdomain, field.NewPath("metadata"))...)
	}
	errs = append(errs, schemavalidation.ValidateCustomResource(nil, object, s.schema)...)
	errs = append(errs, objectmeta.Validate(context.Background(), nil, object, s.structural, false)...)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, s.structural, object)...)
	if slices.ContainsFunc(errs, blocks) {
		return pruned, errs, nil
	}
	violated, budget := s.rules.Validate(context.Background(), nil, s.structural, object, nil, celconfig.RuntimeCELCostBudget)
	if budget < 0 {
		violated = append(violated, field.InternalError(nil, context.DeadlineExceeded))
	}
	return pruned, append(errs, violated...), nil
}

// blocks reports whether an error keeps an API server from evaluating rules.
func blocks(err *field.Error) bool {
	return slices.Contains([]field.ErrorType{field.ErrorTypeNotSupported, field.ErrorTypeRequired, field.ErrorTypeTooLong,
		field.ErrorTypeTooMany, field.ErrorTypeTypeInvalid}, err.Type)
}

func TestDefinitionsAreValid(t *testing.T) {
	paths, err := filepath.Glob("crds/*.yaml")
	more, err2 := filepath.Glob("../holdfast/v1/crds/*.yaml")
	if paths = append(paths, more...); err != nil || err2 != nil || len(paths) != 4 {
		t.Fatalf("definitions: %v, %v, %v", paths, err, err2)
	}
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			_, crd := readCRD(t, path)
			for _, err := range crdvalidation.ValidateCustomResourceDefinition(context.Background(), crd) {
				t.Error(err)
			}
		})
	}
}

func TestUnknownFieldsArePruned(t *testing.T) {
	s := newAPIServer(t, configsCRD)
	pruned, errs, err := s.admit([]byte(apitest.Object(`
  containerRuntimeConfig:
    containerGomaxprocsBehavior: Autosize
    additionalImageStores: [{path: /a, owner: me}]
  holdfast: {colour: blue}`)))
	if err != nil || len(errs) > 0 {
		t.Fatal(err, errs)
	}
	slices.Sort(pruned)
	want := []string{
		"spec.containerRuntimeConfig.additionalImageStores[0].owner",
		"spec.containerRuntimeConfig.containerGomaxprocsBehavior",
		"spec.holdfast.colour",
	}
	if diff := cmp.Diff(want, pruned); diff != "" {
		t.Error(diff)
	}
}

// TestFieldsOfOpenShift has what github.com/openshift/api's
// machineconfiguration/v1/types.go says of the fields that are also ours, but
// the one that it has behind the gate GomaxprocsInjection.
func TestFieldsOfOpenShift(t *testing.T) {
	crd, _ := readCRD(t, configsCRD)
	if got := crd.Spec.Names; got.Plural != "containerruntimeconfigs" || got.Kind != "ContainerRuntimeConfig" || !slices.Equal(got.ShortNames, []string{"ctrcfg"}) {
		t.Errorf("names: %+v", got)
	}
	if crd.Spec.Group != "machineconfiguration.openshift.io" || crd.Spec.Scope != apiextensionsv1.ClusterScoped {
		t.Errorf("group %s, scope %s", crd.Spec.Group, crd.Spec.Scope)
	}
	version := crd.Spec.Versions[0]
	if version.Name != "v1" || !version.Served || !version.Storage || version.Subresources.Status == nil {
		t.Errorf("version %+v", version)
	}
	root := version.Schema.OpenAPIV3Schema
	spec := root.Properties["spec"]
	if !slices.Equal(root.Required, []string{"spec"}) || !slices.Equal(spec.Required, []string{"containerRuntimeConfig"}) {
		t.Errorf("required: %v, %v", root.Required, spec.Required)
	}
	if selector := spec.Properties["machineConfigPoolSelector"]; len(selector.Properties) != 2 {
		t.Errorf("machineConfigPoolSelector: %+v", selector)
	}
	settings := spec.Properties["containerRuntimeConfig"].Properties
	if p := settings["pidsLimit"]; p.Type != "integer" || p.Format != "int64" {
		t.Errorf("pidsLimit: %+v", p)
	}
	if p := settings["logLevel"]; p.Type != "string" {
		t.Errorf("logLevel: %+v", p)
	}
	for _, name := range []string{"logSizeMax", "overlaySize"} {
		if p := settings[name]; !p.XIntOrString || p.Pattern == "" {
			t.Errorf("%s: %+v", name, p)
		}
	}
	if p := settings["defaultRuntime"]; len(p.Enum) != 2 || string(p.Enum[0].Raw) != `"crun"` || string(p.Enum[1].Raw) != `"runc"` {
		t.Errorf("defaultRuntime: %+v", p)
	}
	for name, most := range map[string]int64{"additionalLayerStores": 5, "additionalImageStores": 10, "additionalArtifactStores": 10} {
		checkStores(t, name, settings[name], most)
	}
	status := root.Properties["status"].Properties
	conditions := status["conditions"]
	if status["observedGeneration"].Format != "int64" || conditions.Type != "array" || *conditions.XListType != "atomic" {
		t.Errorf("status: %+v", status)
	}
	for _, name := range []string{"type", "status", "lastTransitionTime", "reason", "message"} {
		if conditions.Items.Schema.Properties[name].Type != "string" {
			t.Errorf("conditions have no %s", name)
		}
	}
}

func checkStores(t *testing.T, name string, list apiextensionsv1.JSONSchemaProps, most int64) {
	t.Helper()
	if list.Type != "array" || list.MinItems == nil || *list.MinItems != 1 || list.MaxItems == nil || *list.MaxItems != most ||
		list.XListType == nil || *list.XListType != "atomic" {
		t.Fatalf("%s: %+v", name, list)
	}
	item := list.Items.Schema
	path := item.Properties["path"]
	if !slices.Equal(item.Required, []string{"path"}) || path.Type != "string" || *path.MinLength != 1 || *path.MaxLength != 256 {
		t.Errorf("%s: %+v", name, item)
	}
	var rules []string
	for _, r := range slices.Concat(list.XValidations, path.XValidations) {
		rules = append(rules, r.Message)
	}
	for _, want := range []string{
		name + " must not contain duplicate paths",
		"path must be absolute and contain only alphanumeric characters, '/', '.', '_', and '-'",
		"path must not contain consecutive forward slashes",
	} {
		if !slices.Contains(rules, want) {
			t.Errorf("%s: no rule says %q", name, want)
		}
	}
	for want, rule := range map[string]string{"^/[a-zA-Z0-9/._-]+$": path.XValidations[0].Rule, "self.contains('//')": path.XValidations[1].Rule} {
		if !strings.Contains(rule, want) {
			t.Errorf("%s: rule %s has no %s", name, rule, want)
		}
	}
}

// messagesIn collects the messages of all rules below a node of a YAML tree.
func messagesIn(node any, into map[string]bool) {
	switch node := node.(type) {
	case []any:
		for _, n := range node {
			messagesIn(n, into)
		}
	case map[string]any:
		if rules, ok := node["x-kubernetes-validations"].([]any); ok {
			for _, r := range rules {
				message, _ := r.(map[string]any)["message"].(string)
				into[message] = true
			}
		}
		for _, n := range node {
			messagesIn(n, into)
		}
	}
}

func TestEveryRuleIsTested(t *testing.T) {
	for _, c := range []struct {
		path  string
		cases []apitest.Case
		least int // of messages
	}{{configsCRD, apitest.Configs(), 10}, {poolsCRD, apitest.Pools(), 2}, {nodesCRD, apitest.Nodes(), 0}} {
		data, err := os.ReadFile(c.path)
		if err != nil {
			t.Fatal(err)
		}
		var tree any
		if err := yaml.Unmarshal(data, &tree); err != nil {
			t.Fatal(err)
		}
		messages := map[string]bool{}
		messagesIn(tree, messages)
		if len(messages) < c.least {
			t.Fatalf("only %d messages in %s", len(messages), c.path)
		}
		for message := range messages {
			if message == "" {
				t.Errorf("%s: a rule has no message", c.path)
			}
			if !slices.ContainsFunc(c.cases, func(c apitest.Case) bool { return strings.Contains(c.Want, message) }) {
				t.Errorf("%s: no case wants %q", c.path, message)
			}
		}
	}
}

func TestCases(t *testing.T) {
	s := newAPIServer(t, configsCRD)
	for _, c := range apitest.Configs() {
		t.Run(c.Name, func(t *testing.T) {
			checkAdmitted(t, s, c)
			checkSaid(t, "Validate", parseAndValidate([]byte(c.Document)), c.Want)
		})
	}
}

// TestOtherCases is those of kinds that there are in clusters only.
func TestOtherCases(t *testing.T) {
	for _, kind := range []struct {
		path  string
		cases []apitest.Case
	}{{poolsCRD, apitest.Pools()}, {nodesCRD, apitest.Nodes()}} {
		s := newAPIServer(t, kind.path)
		for _, c := range kind.cases {
			t.Run(c.Name, func(t *testing.T) { checkAdmitted(t, s, c) })
		}
	}
}

func checkAdmitted(t *testing.T, s *apiServer, c apitest.Case) {
	t.Helper()
	pruned, errs, err := s.admit([]byte(c.Document))
	if err != nil {
		t.Fatal(err)
	}
	if c.Drops() {
		if len(pruned) == 0 || len(errs) > 0 {
			t.Errorf("the API server drops %q, and says %v", pruned, errs)
		}
		return
	}
	checkSaid(t, "the API server", errs.ToAggregate(), c.Want)
	if c.Want == "" && len(pruned) > 0 {
		t.Errorf("the API server drops %q", pruned)
	}
}

// TestGoObjects: an object of which a program has set nothing but what must be is admitted, with its
// status, also where Go has a nil that JSON would have as null.
func TestGoObjects(t *testing.T) {
	meta := metav1.ObjectMeta{Name: "x"}
	for _, c := range []struct {
		path   string
		object runtime.Object
	}{
		{configsCRD, &v1.ContainerRuntimeConfig{ObjectMeta: meta, Spec: v1.ContainerRuntimeConfigSpec{ContainerRuntimeConfig: &v1.ContainerRuntimeConfiguration{}}}},
		{configsCRD, &v1.ContainerRuntimeConfig{
			ObjectMeta: meta,
			Spec: v1.ContainerRuntimeConfigSpec{
				MachineConfigPoolSelector: &metav1.LabelSelector{},
				ContainerRuntimeConfig:    &v1.ContainerRuntimeConfiguration{AdditionalArtifactStores: []v1.AdditionalArtifactStore{{Path: "/a", Filter: &v1.ArtifactFilter{}}}},
				Holdfast:                  &v1.HoldfastConfiguration{},
			},
			Status: v1.ContainerRuntimeConfigStatus{Conditions: []v1.ContainerRuntimeConfigCondition{{}}},
		}},
		{poolsCRD, &v1.MachineConfigPool{ObjectMeta: meta}},
		{poolsCRD, &v1.MachineConfigPool{
			ObjectMeta: meta,
			Spec:       v1.MachineConfigPoolSpec{NodeSelector: &metav1.LabelSelector{}, Configuration: v1.MachineConfigPoolConfiguration{Source: []v1.ObjectReference{{}}}},
			Status:     v1.MachineConfigPoolStatus{Conditions: []v1.MachineConfigPoolCondition{{}}},
		}},
		{machinesCRD, &v1.MachineConfig{ObjectMeta: meta}},
		{nodesCRD, &holdfastv1.ContainerRuntimeNode{ObjectMeta: meta}},
	} {
		document, err := yaml.Marshal(c.object)
		if err != nil {
			t.Fatal(err)
		}
		pruned, errs, err := newAPIServer(t, c.path).admit(document)
		if err != nil || len(errs) > 0 || len(pruned) > 0 {
			t.Errorf("%T: %v, %v, drops %q, of\n%s", c.object, err, errs, pruned, document)
		}
	}
}

// parseAndValidate is what takes the place of an API server.
func parseAndValidate(document []byte) error {
	configs, err := v1.ParseContainerRuntimeConfigs(document)
	if err != nil {
		return err
	}
	var errs field.ErrorList
	for i := range configs {
		errs = append(errs, configs[i].Validate()...)
	}
	return errs.ToAggregate()
}

func checkSaid(t *testing.T, who string, err error, want string) {
	t.Helper()
	if want == "" && err != nil {
		t.Errorf("%s: %v", who, err)
	}
	if want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("%s: %v\nwant: %s", who, err, want)
	}
}
