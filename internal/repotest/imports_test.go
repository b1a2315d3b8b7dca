// SPDX-License-Identifier: Apache-2.0

package repotest

import (
	"slices"
	"strings"
	"testing"
)

// levels is the order of the packages: each may import those of lower levels.
// A new package goes where ARCHITECTURE.md would draw it.
var levels = map[string]int{
	"api/v1":              0,
	"api/holdfast/v1":     0,
	"internal/atomicfile": 0,
	"internal/blob":       0,
	"internal/cli":        0,
	"internal/filelock":   0,
	"internal/index":      0,
	"internal/inflate":    0,
	"internal/refpattern": 0,
	"internal/rootsocket": 0,
	"internal/shards":     0,
	"internal/shared":     0,
	"internal/startup":    0,
	"internal/tomledit":   0,

	"deploy":                 0,
	"internal/render":        1,
	"internal/blob/ocidir":   1,
	"internal/blob/parts":    1,
	"internal/blob/registry": 1,
	"internal/blob/retry":    1,
	"internal/cache":         1,
	"internal/chunklist":     1,
	"internal/erofs":         1,
	"internal/index/soci":    1,
	"internal/index/toc":     1,
	"internal/loopback":      1,
	"internal/mirrorconf":    1,
	"internal/profile":       1,

	"internal/credentials":       2,
	"internal/image":             2,
	"internal/index/estargz":     2,
	"internal/index/stream":      2,
	"internal/index/zstdchunked": 2,
	"internal/device":            2,
	"internal/fusedev":           2,
	"internal/indexstore":        2,
	"internal/mount":             2,

	"internal/imagestore":    3,
	"internal/indexes":       3,
	"internal/keeper":        3,
	"internal/layer":         3,
	"internal/lazyblob":      3,
	"internal/sources":       3,
	"internal/unpack":        3,
	"internal/verify":        3,
	"internal/bundle":        4,
	"internal/fill":          4,
	"internal/sharedstore":   4,
	"internal/indexer":       4,
	"internal/pins":          4,
	"internal/prepare":       4,
	"internal/artifactstore": 5,
	"internal/artifacts":     6,
	"internal/config":        7,
	"internal/control":       7,
	"internal/uninstall":     8,
	"internal/daemon":        8,
	"internal/agent":         8,
	"internal/operator":      8,
	"internal/courier":       9,
	"cmd/holdfast":           10,
	"cmd/holdfast-operator":  10,
}

// testOnly are the packages that only tests, the demo and the bench may import.
func testOnly(path string) bool {
	switch path {
	case "api/v1/apitest", "internal/agent/agenttest", "internal/blob/blobtest", "internal/index/indextest",
		"internal/killtest", "internal/kustomizetest", "internal/layer/layertest", "internal/repotest",
		"internal/shape", "internal/testimage", "internal/testregistry":
		return true
	}
	return strings.HasPrefix(path, "test/")
}

func TestImportDirection(t *testing.T) {
	for _, p := range packages(t) {
		if testOnly(p.path()) {
			continue
		}
		level, ok := levels[p.path()]
		if !ok {
			t.Errorf("%s: give it a level in internal/repotest/imports_test.go, or make it test only there and in .golangci.yml", p.path())
			continue
		}
		for _, imp := range p.Imports {
			rel, own := strings.CutPrefix(imp, module+"/")
			if !own {
				continue
			}
			if testOnly(rel) {
				t.Errorf("%s imports %s, which is for tests only", p.path(), rel)
			} else if l, ok := levels[rel]; ok && l >= level {
				t.Errorf("%s (level %d) imports %s (level %d)", p.path(), level, rel, l)
			}
		}
	}
}

func TestImportsHaveTheirPlace(t *testing.T) {
	kubernetes := []string{"api/v1", "api/holdfast/v1", "internal/render", "internal/operator", "internal/agent", "internal/courier", "cmd/holdfast-operator"}
	for _, rule := range []struct {
		imports string // a package, with all below it
		only    []string
	}{
		{"net/http", []string{"internal/blob/registry", "internal/control", "internal/daemon", "internal/loopback"}},
		{"github.com/prometheus", []string{"internal/daemon"}},
		{"github.com/hanwen/go-fuse", []string{"internal/fusedev"}},
		{module + "/internal/fusedev", []string{"internal/daemon", "internal/keeper"}},
		{"github.com/spf13/cobra", []string{"cmd/holdfast", "cmd/holdfast-operator", "internal/cli"}},
		{"github.com/vbauerster/mpb", []string{"cmd/holdfast"}},
		{"k8s.io", kubernetes},
		{"sigs.k8s.io", kubernetes},
		{"testing", nil},
	} {
		for _, p := range packages(t) {
			if testOnly(p.path()) || slices.Contains(rule.only, p.path()) {
				continue
			}
			for _, imp := range p.Imports {
				if imp == rule.imports || strings.HasPrefix(imp, rule.imports+"/") {
					t.Errorf("%s imports %s; only %v may", p.path(), imp, rule.only)
				}
			}
		}
	}
}

// TestProgramIsFreeOfTests looks at everything that gets linked.
func TestProgramIsFreeOfTests(t *testing.T) {
	for imp := range strings.Lines(string(command(t, "go", "list", "-deps", "./cmd/holdfast"))) {
		imp = strings.TrimSpace(imp)
		rel, own := strings.CutPrefix(imp, module+"/")
		// `holdfast render` needs the API's types; clients and their caches stay out.
		cluster := strings.HasPrefix(imp, "k8s.io/") && !strings.HasPrefix(imp, "k8s.io/apimachinery/") && !strings.HasPrefix(imp, "k8s.io/utils/") &&
			!strings.HasPrefix(imp, "k8s.io/klog/") && !strings.HasPrefix(imp, "k8s.io/kube-openapi/")
		if imp == "testing" || own && testOnly(rel) || cluster {
			t.Errorf("the holdfast program contains %s", imp)
		}
	}
}
