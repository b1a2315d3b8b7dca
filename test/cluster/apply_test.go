// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
)

// Apply makes objects what a file says, in its order, as `kubectl apply --server-side
// --force-conflicts` does: documents of YAML or JSON. Of an object with the subresource status it
// leaves the status alone. The namespace of an object that names none is default. When it
// returns, objects of definitions that it has applied can be made.
func (s *server) Apply(t testing.TB, manifests []byte) {
	t.Helper()
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(manifests), 4096)
	for {
		object := &unstructured.Unstructured{}
		if err := decoder.Decode(&object.Object); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("reading manifests: %v", err)
		}
		if len(object.Object) == 0 {
			continue // a comment
		}
		_, err := s.resource(t, object).Apply(t.Context(), object.GetName(), object, metav1.ApplyOptions{FieldManager: "test", Force: true})
		if err != nil {
			t.Fatalf("applying %s %q: %v", object.GetKind(), object.GetName(), err)
		}
		if gvk := object.GroupVersionKind(); gvk.Group == "apiextensions.k8s.io" && gvk.Kind == "CustomResourceDefinition" {
			s.waitDefined(t, object)
		}
	}
}

// InstallCRDs applies all definitions of api.
func (s *server) InstallCRDs(t testing.TB) {
	t.Helper()
	for _, pattern := range []string{"../../api/v1/crds/*.yaml", "../../api/*/v1/crds/*.yaml"} {
		names, err := filepath.Glob(pattern)
		if err != nil || len(names) == 0 {
			t.Fatalf("no definitions are %s: %v", pattern, err)
		}
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			s.Apply(t, data)
		}
	}
}

// Namespace makes a namespace, if there is none of that name, and the ServiceAccount default in
// it, without which there can be no pods.
func (s *server) Namespace(t testing.TB, name string) {
	t.Helper()
	s.Apply(t, fmt.Appendf(nil, `
apiVersion: v1
kind: Namespace
metadata: {name: %s}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: default, namespace: %[1]s}
`, name))
}

// resource is where objects of a kind are, in the namespace of one of them.
func (s *server) resource(t testing.TB, object *unstructured.Unstructured) dynamic.ResourceInterface {
	t.Helper()
	gvk := object.GroupVersionKind()
	mapping, err := s.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if err != nil {
		t.Fatalf("%s %q: %v", gvk.Kind, object.GetName(), err)
	}
	if mapping.Scope.Name() == meta.RESTScopeNameRoot {
		return s.objects.Resource(mapping.Resource)
	}
	namespace := object.GetNamespace()
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	return s.objects.Resource(mapping.Resource).Namespace(namespace)
}

// waitDefined waits until objects of a definition can be made.
func (s *server) waitDefined(t testing.TB, crd *unstructured.Unstructured) {
	t.Helper()
	s.eventually(t, crd.GetName()+" is established", func(ctx context.Context) error {
		got, err := s.resource(t, crd).Get(ctx, crd.GetName(), metav1.GetOptions{})
		if err != nil {
			return err
		}
		conditions, _, err := unstructured.NestedSlice(got.Object, "status", "conditions")
		for _, c := range conditions {
			if c, ok := c.(map[string]any); ok && c["type"] == "Established" && c["status"] == "True" {
				return nil
			}
		}
		return fmt.Errorf("its conditions are %v: %w", conditions, err)
	})
	group, _, _ := unstructured.NestedString(crd.Object, "spec", "group")
	kind, _, _ := unstructured.NestedString(crd.Object, "spec", "names", "kind")
	// It is served when the server says so, which is a moment later.
	s.eventually(t, crd.GetName()+" is served", func(context.Context) error {
		_, err := s.mapper.RESTMapping(schema.GroupKind{Group: group, Kind: kind})
		if meta.IsNoMatchError(err) {
			s.mapper.Reset()
		}
		return err
	})
}
