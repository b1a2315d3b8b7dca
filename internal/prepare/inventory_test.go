// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"go.podman.io/storage"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/layer/layertest"
)

// check checks all that must hold after a start: what is recorded is served, what
// runtimes use is there, and there is nothing else.
func (d *doomed) check(t *testing.T) {
	t.Helper()
	records := d.records(t)
	for id, r := range records {
		tree := filepath.Join(d.store.Root(), "overlay", id, "diff")
		if difference := layertest.Compare(tree, d.trees[r.BlobDigest]); difference != "" {
			t.Errorf("layer %s: %s", r.BlobDigest, difference)
		}
	}
	all, err := d.Images()
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range all {
		for _, l := range img.Layers {
			if _, ok := records[l.ChainID]; !ok {
				t.Errorf("image %v lacks the record of layer %s", img.References, l.Digest)
			}
		}
	}
	d.checkFiles(t)
	d.checkMounts(t)
	if text := d.log.String(); strings.Contains(text, "level=ERROR") {
		t.Errorf("the log has errors: %s", text)
	}
}

// checkFiles compares the names on disk with those that must be there.
func (d *doomed) checkFiles(t *testing.T) {
	t.Helper()
	want := []string{
		"images", "layers", "records",
		"store", "store/overlay", "store/overlay/l", "store/staging",
		"store/overlay-layers", "store/overlay-layers/layers.json", "store/overlay-layers/layers.lock",
		"store/overlay-images", "store/overlay-images/images.json", "store/overlay-images/images.lock",
	}
	optional := map[string]bool{}
	all, err := d.Images()
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range all {
		want = append(want, "images/"+img.Digest.Encoded()+".json")
	}
	for _, l := range d.layers.All() {
		dir := "layers/" + l.Digest.Encoded()
		want = append(want, dir)
		for _, name := range []string{"layer.json", "image.erofs", "chunks", "digests", "data"} {
			want = append(want, dir+"/"+name)
		}
		optional[dir+"/present"], optional[dir+"/frozen"] = true, true
	}
	for id, r := range d.records(t) {
		view := "records/" + id[:32]
		want = append(want, "store/overlay/"+id, view, view+"/tree", view+"/link")
		if r.Parent != "" {
			want = append(want, view+"/lower", view+"/lower-layers")
		}
		if name := "store/overlay/" + erofs.Name(r.BlobDigest); !slices.Contains(want, name) {
			want = append(want, name)
		}
	}
	var got []string
	for _, top := range []string{"images", "layers", "records", "store"} {
		err := filepath.WalkDir(filepath.Join(d.dir, top), func(path string, e os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(d.dir, path)
			if !optional[rel] {
				got = append(got, rel)
			}
			if filepath.Base(rel) == "tree" {
				return filepath.SkipDir // what is mounted there
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("on disk (-want +got):\n%s", diff)
	}
}

// checkMounts compares what is mounted with what must be.
func (d *doomed) checkMounts(t *testing.T) {
	t.Helper()
	want := []string{"devices"}
	for _, l := range d.layers.All() {
		want = append(want, "mounts/"+erofs.Name(l.Digest))
	}
	for id := range d.records(t) {
		want = append(want, "records/"+id[:32]+"/tree")
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(d.dir))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range mounts {
		got = append(got, strings.TrimPrefix(m.Mountpoint, d.dir+"/"))
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("mounted (-want +got):\n%s", diff)
	}
	entries, err := os.ReadDir(filepath.Join(d.dir, "mounts"))
	if err != nil || len(entries) != len(d.layers.All()) {
		t.Errorf("mount points %v, error %v", entries, err)
	}
}

// checkStore opens the runtime's store, with ours beside it, by containers/storage.
// It is a copy: of a place that it knows, containers/storage remembers too much.
func (d *doomed) checkStore(t *testing.T) {
	t.Helper()
	root := t.TempDir()
	images, err := os.ReadFile(filepath.Join(d.policy.RuntimeRoots[0], runtimeImages))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, runtimeImages), string(images))
	reader, err := storage.GetStore(storage.StoreOptions{
		GraphRoot: root, RunRoot: filepath.Join(d.dir, "runtime-run"), GraphDriverName: "overlay",
		GraphDriverOptions: []string{"overlay.imagestore=" + d.store.Root()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := reader.Shutdown(true); err != nil {
			t.Error(err)
		}
	}()
	records := d.records(t)
	if all, err := reader.Layers(); err != nil || len(all) != len(records) {
		t.Errorf("containers/storage has layers %v, error %v", all, err)
	}
	for _, r := range records {
		got, err := reader.LayersByCompressedDigest(r.BlobDigest)
		if err != nil || !slices.ContainsFunc(got, func(l storage.Layer) bool { return l.ID == r.ID && l.Parent == r.Parent }) {
			t.Errorf("containers/storage finds %v for %s, error %v", got, r.BlobDigest, err)
		}
		if got, err := reader.LayersByUncompressedDigest(r.DiffID); err != nil || len(got) == 0 {
			t.Errorf("containers/storage finds %v for %s, error %v", got, r.DiffID, err)
		}
	}
	all, err := reader.Images()
	if err != nil || len(all) != 1 {
		t.Fatalf("the runtime has images %v, error %v", all, err)
	}
	for id := all[0].TopLayer; id != ""; {
		l, err := reader.Layer(id)
		if err != nil {
			t.Fatalf("the runtime's image lacks a layer: %v", err)
		}
		id = l.Parent
	}
}
