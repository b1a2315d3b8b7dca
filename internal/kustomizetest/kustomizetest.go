// SPDX-License-Identifier: Apache-2.0

// Package kustomizetest builds the manifests of deploy/kustomize, for tests: as `kubectl apply -k`
// does, from the file system, with nothing read from outside of a kustomization's directory but
// other kustomizations.
package kustomizetest

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/api/resmap"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// overlays is where the overlays are, from the root of the repository.
const overlays = "deploy/kustomize/overlays"

// Root is the root of the repository, above the directory that a test runs in.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	for err == nil {
		if _, missing := os.Stat(filepath.Join(dir, "go.mod")); missing == nil {
			return dir
		}
		if filepath.Dir(dir) == dir {
			break
		}
		dir = filepath.Dir(dir)
	}
	t.Fatalf("looking for go.mod: there is none above, %v", err)
	return ""
}

// Overlays are the names of all overlays.
func Overlays(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(Root(t), overlays))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names
}

// Build returns the manifests of an overlay as YAML, in the order in which kubectl applies them.
func Build(t testing.TB, overlay string) []byte {
	t.Helper()
	text, err := build(t, filepath.Join(overlays, overlay)).AsYaml()
	if err != nil {
		t.Fatalf("encoding overlay %s: %v", overlay, err)
	}
	return text
}

// Objects returns the manifests of an overlay, in the same order.
func Objects(t testing.TB, overlay string) []*unstructured.Unstructured {
	t.Helper()
	return objects(t, filepath.Join(overlays, overlay))
}

// Definitions returns the definitions that have to be there before the pools of an overlay.
func Definitions(t testing.TB) []*unstructured.Unstructured {
	t.Helper()
	return objects(t, "api/v1/crds")
}

func objects(t testing.TB, dir string) []*unstructured.Unstructured {
	t.Helper()
	var all []*unstructured.Unstructured
	for _, r := range build(t, dir).Resources() {
		object, err := r.Map()
		if err != nil {
			t.Fatalf("decoding %s of %s: %v", r.CurId(), dir, err)
		}
		all = append(all, &unstructured.Unstructured{Object: object})
	}
	return all
}

func build(t testing.TB, dir string) resmap.ResMap {
	t.Helper()
	all, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join(Root(t), dir))
	if err != nil {
		t.Fatalf("building %s: %v", dir, err)
	}
	return all
}
