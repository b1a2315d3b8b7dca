// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

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
				normal, podman := n.newClient("normal", false), n.newPodman("podman", false)
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
						res := n.prepare(ref)
						switch {
						case c.RawNames && !untrusted: // a table of contents cannot hold them
							n.wantLeft(res)
							return
						case c.RawNames: // go.podman.io/storage v1.64.2 fails to pull that
							n.must(podman.Pull(t.Context(), ref))
							n.compareLayers(podman.Root(), res, undescribed(describedBy(t, bytes.NewReader(c.Tar))))
							return
						}
						adjusts := []adjust{undescribed(describedBy(t, bytes.NewReader(c.Tar)))}
						if !untrusted {
							adjusts = append(adjusts, precision(f))
						}
						normal.pull(ref)
						n.compareLayers(normal.base.Root, res, adjusts...)
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
			res, normal := n.prepare(ref), n.newClient("normal", false)
			normal.pull(ref)
			n.compareLayers(normal.base.Root, res, precision(f), func(name string, f *file) {
				if name == "" { // all other directories are described
					f.modTime = time.Time{}
				}
			})
		})
	}
}

// precision makes up for what a format cannot say.
func precision(f testimage.Format) adjust {
	if f == testimage.ZstdChunked {
		return func(string, *file) {}
	}
	return wholeSeconds
}

// TestImpliedRoots compares layers that do not describe their root directory: a
// normal pull gives them the one of the layer below.
func TestImpliedRoots(t *testing.T) {
	root := func(mode int64, uid int) []byte {
		return testimage.Tar(testimage.File{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: mode, Uid: uid, Gid: uid}})
	}
	upper := testimage.Tar(testimage.File{Header: tar.Header{Name: "upper"}})
	middle := testimage.Tar(testimage.File{Header: tar.Header{Name: "middle"}})
	for _, untrusted := range []bool{false, true} {
		t.Run(fmt.Sprintf("untrusted=%t", untrusted), func(t *testing.T) {
			n := newNode(t, nodeOptions{untrusted: untrusted, settings: "top_layer_limit = \"0B\"\n"})
			n.start()
			normal := n.newClient("normal", false)
			image := func(name string, tars ...[]byte) *prepare.Result {
				img := testimage.Image{Cmd: []string{"x"}}
				for _, raw := range tars {
					l, err := testimage.ConvertBytes(t.Context(), raw, testimage.ZstdChunked, testimage.Options{})
					n.must(err)
					img.Layers = append(img.Layers, l)
				}
				ref := n.push(name, img)
				normal.pull(ref)
				return n.prepare(ref)
			}
			onlyFiles := undescribed(map[string]bool{})
			n.compareLayers(normal.base.Root, image("a", root(0o1775, 7), middle, upper), onlyFiles)
			n.compareLayers(normal.base.Root, image("b", root(0o1775, 7), upper), onlyFiles)
			if res := image("c", root(0o700, 8), upper); res.Lazy() != 1 || res.Layers[1].Action != prepare.Left {
				t.Errorf("a layer is used on top of another root directory: %+v", res)
			}
		})
	}
}

// in is the node in a subtest.
func (n *node) in(t *testing.T) *node {
	return &node{t: t, dir: n.dir, registry: n.registry, daemon: n.daemon, traffic: n.traffic}
}

// compareLayers compares all layers of a prepared image with those that a normal
// pull has put into a storage root.
func (n *node) compareLayers(root string, res *prepare.Result, adjusts ...adjust) {
	n.t.Helper()
	for _, l := range res.Layers {
		if l.Action == prepare.Left {
			n.t.Fatalf("layer %s is %s: %s\n%s", l.Digest, l.Action, l.Reason, n.log())
		}
		want := readTree(n.t, filepath.Join(root, "overlay", l.ChainID, "diff"))
		compareTrees(n.t, want, readTree(n.t, n.layerTree(l.Digest)), adjusts...)
	}
}

// wantLeft fails the test unless all of the image is left to the runtime.
func (n *node) wantLeft(res *prepare.Result) {
	n.t.Helper()
	if res.Lazy() != 0 {
		n.t.Errorf("not left to the runtime: %+v", res)
	}
}
