// SPDX-License-Identifier: Apache-2.0

package repotest

import (
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/kustomizetest"
	"github.com/holdfast/holdfast/internal/render"
)

// manifests are the YAML files of deploy, as the documents that they are of.
func manifests(t *testing.T) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	for _, name := range files(t, "*.yaml", "kustomization.yml") {
		if !strings.HasPrefix(name, "deploy/") && filepath.Base(name) != "kustomization.yml" {
			continue
		}
		text := read(t, name)
		if !strings.HasPrefix(text, "# SPDX-License-Identifier: Apache-2.0\n") {
			t.Errorf("%s: no SPDX line at its top", name)
		}
		all[name] = strings.Split(text, "\n---\n")
	}
	return all
}

// TestManifestsParse: each document is one object; a key that is there twice is an error.
func TestManifestsParse(t *testing.T) {
	for name, documents := range manifests(t) {
		for _, text := range documents {
			var object struct {
				APIVersion string `json:"apiVersion"`
				Kind       string `json:"kind"`
			}
			raw, err := yaml.YAMLToJSONStrict([]byte(text))
			if err == nil {
				err = yaml.Unmarshal(raw, &object)
			}
			if err != nil || object.APIVersion == "" || object.Kind == "" {
				t.Errorf("%s: %+v, %v\n%s", name, object, err, text)
			}
		}
	}
}

// TestSamples: each ContainerRuntimeConfig is valid, has files made of it, and selects a pool that
// there is.
func TestSamples(t *testing.T) {
	pools := map[string]map[string]string{} // their labels
	for _, u := range kustomizetest.Objects(t, "kubernetes") {
		if u.GetKind() == "MachineConfigPool" {
			pools[u.GetName()] = u.GetLabels()
		}
	}
	var objects []apiv1.ContainerRuntimeConfig
	for name, documents := range manifests(t) {
		if !strings.HasPrefix(name, "deploy/samples/") {
			continue
		}
		if index := read(t, "deploy/samples/README.md"); !strings.Contains(index, "("+filepath.Base(name)+")") {
			t.Errorf("%s is not in the list of samples", name)
		}
		for _, text := range documents {
			if strings.Contains(text, "kind: MachineConfigPool\n") {
				pool := &apiv1.MachineConfigPool{}
				if err := decodeStrict([]byte(text), pool); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				pools[pool.Name] = pool.Labels
				continue
			}
			configs, err := render.Objects(name, strings.NewReader(text)) // parses and validates
			if err != nil {
				t.Error(err)
				continue
			}
			spec, problems := render.Merge(configs)
			rendered, err := render.Files(spec, render.NoBase, render.Options{})
			if err != nil || len(rendered) == 0 || len(problems) > 0 {
				t.Errorf("%s: %d files, problems %+v, %v", name, len(rendered), problems, err)
			}
			objects = append(objects, configs...)
		}
	}
	if len(objects) < 6 {
		t.Errorf("the samples are %d objects, fewer than there should be", len(objects))
	}
	selected := map[string]bool{}
	for _, set := range pools {
		of, err := render.Select(objects, set)
		if err != nil {
			t.Error(err)
		}
		for _, c := range of {
			selected[c.Name] = true
		}
	}
	for _, c := range objects {
		if !selected[c.Name] {
			t.Errorf("sample %s selects no pool", c.Name)
		}
	}
}

// decodeStrict decodes an object of which each field must be known.
func decodeStrict(text []byte, into any) error {
	var raw map[string]any
	if err := yaml.UnmarshalStrict(text, &raw); err != nil {
		return err
	}
	return runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(raw, into, true)
}
