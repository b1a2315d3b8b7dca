// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// indexed are the formats that bring an index along.
func indexed() []testimage.Format {
	return []testimage.Format{testimage.EStargz, testimage.ZstdChunked, testimage.ZstdChunkedStargz}
}

// sample is the image of real files, with little of a model in it.
func sample(t *testing.T) lab.Sample {
	return lab.Sample{
		Dir: filepath.Join(cacheDir(t), "sample"), WeightsSize: 24 << 20, Suite: "bookworm",
		Log: t.Logf,
	}
}

// cacheDir is where things are kept from run to run.
func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("HOLDFAST_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "holdfast")
}

// TestTrees compares mounted layers with what a normal pull extracts.
func TestTrees(t *testing.T) {
	for _, f := range indexed() {
		for _, untrusted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, untrusted=%t", f, untrusted), func(t *testing.T) {
				n := newNode(t, nodeOptions{untrusted: untrusted, settings: "top_layer_limit = \"0B\"\n"})
				n.start()
				normal := n.newClient("normal", false)
				for i, c := range testimage.Corpus() {
					if !slices.Contains(c.Formats, f) {
						continue
					}
					layer, err := testimage.ConvertBytes(t.Context(), c.Tar, f, testimage.Options{})
					n.must(err)
					t.Run(c.Name, func(t *testing.T) {
						n := n.in(t)
						img := testimage.Image{Layers: []testimage.Layer{layer}, Cmd: []string{"x"}}
						ref := n.push(fmt.Sprintf("corpus/%d", i), img)
						left := c.RawNames && !untrusted
						adjusts := []adjust{undescribed(describedByBytes(t, c.Tar))}
						n.compareLayers(normal, ref, img, left, f, untrusted, adjusts...)
					})
				}
			})
		}
	}
}

// TestTreesOfDebian compares real layers: a root file system and one above.
func TestTreesOfDebian(t *testing.T) {
	for _, f := range indexed() {
		t.Run(string(f), func(t *testing.T) {
			n := newNode(t, nodeOptions{settings: "top_layer_limit = \"0B\"\n"})
			n.start()
			img, err := sample(t).Image(t.Context(), f)
			n.must(err)
			ref := n.push("debian", img)
			// The tar describes all of its directories but the root of the weights.
			n.compareLayers(n.newClient("normal", false), ref, img, false, f, false, func(name string, f *file) {
				if name == "" {
					f.modTime = f.modTime.Truncate(0).Round(1 << 62)
				}
			})
		})
	}
}

// in is the node in a subtest.
func (n *node) in(t *testing.T) *node {
	return &node{t: t, dir: n.dir, registry: n.registry, daemon: n.daemon}
}

// compareLayers prepares an image and compares each of its layers. left means
// that the image must be left to the runtime.
func (n *node) compareLayers(normal *client, ref string, img testimage.Image, left bool, f testimage.Format, untrusted bool, adjusts ...adjust) {
	n.t.Helper()
	if f == testimage.EStargz && !untrusted {
		adjusts = append(adjusts, wholeSeconds)
	}
	res := n.prepare(ref)
	normal.pull(ref)
	for _, l := range res.Layers {
		if left != (l.Action == prepare.Left) {
			n.t.Fatalf("layer is %s: %s\n%s", l.Action, l.Reason, n.log())
		}
		if !left {
			compareTrees(n.t, readTree(n.t, normal.layerTree(l.ChainID)), readTree(n.t, n.layerTree(l.Digest)), adjusts...)
		}
	}
}

var _ context.Context
