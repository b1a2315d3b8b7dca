// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	kube "sigs.k8s.io/controller-runtime/pkg/client"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/api/v1/apitest"
)

// kinds are the kinds of objects that have cases.
var kinds = []struct {
	path  string // of all objects
	new   func() kube.Object
	cases func() []apitest.Case
}{
	{"/apis/machineconfiguration.openshift.io/v1/containerruntimeconfigs", func() kube.Object { return &apiv1.ContainerRuntimeConfig{} }, apitest.Configs},
	{"/apis/machineconfiguration.openshift.io/v1/machineconfigpools", func() kube.Object { return &apiv1.MachineConfigPool{} }, apitest.Pools},
	{"/apis/holdfast.github.io/v1/containerruntimenodes", func() kube.Object { return &holdfastv1.ContainerRuntimeNode{} }, apitest.Nodes},
}

// TestAdmission makes the objects of all cases.
func TestAdmission(t *testing.T) {
	s := startServer(t)
	s.InstallCRDs(t)
	config := rest.CopyConfig(s.Config)
	config.WarningHandler = rest.NoWarnings{} // results have them
	web := client(t, config).Discovery().RESTClient()
	for _, kind := range kinds {
		for _, c := range kind.cases() {
			t.Run(kind.path[strings.LastIndexByte(kind.path, '/')+1:]+" "+c.Name, func(t *testing.T) {
				admit(t, web, kind.path, kind.new(), c)
			})
		}
	}
	t.Run("a program that sets nothing", func(t *testing.T) { writeZeroes(t, newClient(t, s)) })
}

// tree is an object as JSON has it.
type tree map[string]any

func decode(t testing.TB, data []byte) tree {
	t.Helper()
	object := tree{}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(data, (*map[string]any)(&object)); err != nil {
		t.Fatal(err)
	}
	return object
}

// write sends an object as `kubectl apply` does: a file may be YAML, a request is JSON.
func write(t testing.TB, request *rest.Request, object tree, validation string) (got tree, warnings []string, err error) {
	t.Helper()
	data, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	result := request.Param("fieldValidation", validation).SetHeader("Content-Type", "application/json").Body(data).Do(t.Context())
	for _, w := range result.Warnings() {
		warnings = append(warnings, w.Text)
	}
	raw, err := result.Raw()
	if err != nil {
		return nil, warnings, result.Error() // with what the server says
	}
	return decode(t, raw), warnings, nil
}

// admit makes an object and its status. What the server has is then what it was sent. A Go type has
// a place for all of it.
func admit(t *testing.T, web rest.Interface, path string, into kube.Object, c apitest.Case) {
	data, err := yaml.YAMLToJSON([]byte(c.Document))
	if err != nil {
		t.Fatal(err)
	}
	sent := decode(t, data)
	got, warnings, err := write(t, web.Post().AbsPath(path), sent, "Warn")
	if err == nil {
		defer func() {
			if err := web.Delete().AbsPath(path, "x").Do(t.Context()).Error(); err != nil {
				t.Error(err)
			}
		}()
	}
	if status, ok := sent["status"]; ok && err == nil {
		if got["status"] != nil {
			t.Errorf("who makes an object writes its status: %v", got["status"])
		}
		got["status"] = status
		var more []string
		got, more, err = write(t, web.Put().AbsPath(path, "x", "status"), got, "Warn")
		warnings = append(warnings, more...)
	}
	if !c.Admitted() {
		if err == nil || !strings.Contains(err.Error(), c.Want) {
			t.Errorf("%v\nwant: %s", err, c.Want)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	raw, err := web.Get().AbsPath(path, "x").Do(t.Context()).Raw()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, decode(t, raw)); diff != "" {
		t.Errorf("what was answered is not what there is:\n%s", diff)
	}
	if strict, err := kjson.UnmarshalStrict(raw, into); err != nil || len(strict) > 0 {
		t.Errorf("decoding %s: %v, %v", raw, err, strict)
	}
	if c.Want == "" {
		if len(warnings) > 0 {
			t.Errorf("warnings: %q", warnings)
		}
		setDefaults(sent)
		if diff := cmp.Diff(sent["spec"], got["spec"]) + cmp.Diff(sent["status"], got["status"]); diff != "" {
			t.Error(diff)
		}
		if o, ok := into.(*apiv1.ContainerRuntimeConfig); ok && len(o.Validate()) > 0 {
			t.Errorf("Validate: %v", o.Validate())
		}
		return
	}
	if c.Want != apitest.Dropped {
		if len(warnings) > 0 { // nor does strict validation refuse null
			t.Errorf("of null it says %q", warnings)
		}
		return
	}
	if !slices.ContainsFunc(warnings, func(w string) bool { return strings.Contains(w, c.Want) }) {
		t.Errorf("warnings %q, want %q", warnings, c.Want)
	}
	if _, ok := sent["status"]; ok {
		return // what makes an object does not look at it
	}
	sent["metadata"] = tree{"name": "y"}
	if _, _, err := write(t, web.Post().AbsPath(path), sent, "Strict"); err == nil || !strings.Contains(err.Error(), c.Want) {
		t.Errorf("with strict validation: %v, want %q", err, c.Want)
	}
}

// setDefaults sets the only defaults that there are: a count that is missing is 0, which a patch of
// Go's objects leaves out.
func setDefaults(object tree) {
	status, ok := object["status"].(map[string]any)
	if !ok {
		return
	}
	counts := map[any][]string{
		"MachineConfigPool":    {"machineCount", "updatedMachineCount", "readyMachineCount", "unavailableMachineCount", "degradedMachineCount"},
		"ContainerRuntimeNode": {"healthyStores", "withheldStores"},
	}
	for _, name := range counts[object["kind"]] {
		if status[name] == nil {
			status[name] = int64(0)
		}
	}
}

// writeZeroes makes objects of Go, and writes their statuses, of which nothing is set that need
// not be.
func writeZeroes(t *testing.T, c kube.Client) {
	meta := metav1.ObjectMeta{Name: "zero"}
	for _, o := range []kube.Object{
		&apiv1.ContainerRuntimeConfig{ObjectMeta: meta, Spec: apiv1.ContainerRuntimeConfigSpec{ContainerRuntimeConfig: &apiv1.ContainerRuntimeConfiguration{}}},
		&apiv1.MachineConfigPool{ObjectMeta: meta},
		&holdfastv1.ContainerRuntimeNode{ObjectMeta: meta},
		&apiv1.MachineConfig{ObjectMeta: meta},
	} {
		if err := c.Create(t.Context(), o); err != nil {
			t.Errorf("%T: %v", o, err)
			continue
		}
		// There is no status of a MachineConfig.
		if err := c.Status().Update(t.Context(), o); err != nil && !apierrors.IsNotFound(err) {
			t.Errorf("the status of %T: %v", o, err)
		}
		if err := c.Update(t.Context(), o); err != nil {
			t.Errorf("%T again: %v", o, err)
		}
	}
}
