// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// runtimeStore writes the lists of a runtime's main store.
type runtimeStore struct {
	t    *testing.T
	root string
}

func newRuntimeStore(t *testing.T) *runtimeStore { return &runtimeStore{t, t.TempDir()} }

func (r *runtimeStore) write(name, content string) {
	r.t.Helper()
	name = filepath.Join(r.root, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		r.t.Fatal(err)
	}
	// As runtimes do: a new file takes the place of the old one.
	if err := os.WriteFile(name+".new", []byte(content), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		r.t.Fatal(err)
	}
}

func TestReferences(t *testing.T) {
	c := chain(t, 3)
	top, base := c[1].ID, c[0].ID
	for _, test := range []struct {
		name  string
		lists map[string]string
		want  map[string][]string // what refers, by layer, without the root
	}{
		{name: "no store"},
		{name: "an image without layers", lists: map[string]string{"overlay-images/images.json": `[{"id":"i"}]`}},
		{
			name:  "an image, by its name",
			lists: map[string]string{"overlay-images/images.json": `[{"id":"i","names":["quay.io/x:1","quay.io/x:2"],"layer":"` + top + `"}]`},
			want:  map[string][]string{top: {"image quay.io/x:1"}, base: {"image quay.io/x:1"}},
		},
		{
			name:  "two images that share",
			lists: map[string]string{"overlay-images/images.json": `[{"id":"i","layer":"` + top + `"},{"id":"j","layer":"` + base + `"}]`},
			want:  map[string][]string{top: {"image i"}, base: {"image i", "image j"}},
		},
		{
			name:  "an image with a mapped layer",
			lists: map[string]string{"overlay-images/images.json": `[{"id":"i","layer":"` + top + `","mapped-layers":["` + base + `"]}]`},
			want:  map[string][]string{top: {"image i"}, base: {"image i"}},
		},
		{
			name: "a container alone",
			lists: map[string]string{
				"overlay-containers/containers.json": `[{"id":"c","names":["db"],"layer":"rw"}]`,
				"overlay-layers/layers.json":         `[{"id":"rw","parent":"` + base + `"}]`,
			},
			want: map[string][]string{"rw": {"container db"}, base: {"container db"}},
		},
		{
			name: "a volatile container",
			lists: map[string]string{
				"overlay-containers/volatile-containers.json": `[{"id":"c","layer":"rw"}]`,
				"overlay-layers/volatile-layers.json":         `[{"id":"rw","parent":"` + base + `"}]`,
			},
			want: map[string][]string{"rw": {"container c"}, base: {"container c"}},
		},
		{
			name:  "a layer alone",
			lists: map[string]string{"overlay-layers/layers.json": `[{"id":"own","parent":"` + top + `"}]`},
			want:  map[string][]string{"own": {"layer own"}, top: {"layer own"}, base: {"layer own"}},
		},
		{
			name: "an image whose own layer is on top",
			lists: map[string]string{
				"overlay-images/images.json": `[{"id":"i","layer":"own"}]`,
				"overlay-layers/layers.json": `[{"id":"own","parent":"` + base + `"}]`,
			},
			want: map[string][]string{"own": {"image i"}, base: {"image i"}},
		},
		{
			name:  "layers in a circle",
			lists: map[string]string{"overlay-layers/layers.json": `[{"id":"a","parent":"b"},{"id":"b","parent":"a"}]`},
			want:  map[string][]string{"a": {"layer a"}, "b": {"layer a"}},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRuntimeStore(t)
			for name, content := range test.lists {
				r.write(name, content)
			}
			used, err := References([]string{filepath.Join(r.root, "none"), r.root}, c)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string][]string{}
			for id, by := range used {
				for _, b := range by {
					if b.Root != r.root {
						t.Errorf("%v is not in %s", b, r.root)
					}
					got[id] = append(got[id], b.Kind+" "+b.Name)
				}
			}
			if test.want == nil {
				test.want = map[string][]string{}
			}
			if d := cmp.Diff(test.want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// A layer may be in another store than the image that needs it.
func TestReferencesAcrossRoots(t *testing.T) {
	c := chain(t, 1)
	images, layers := newRuntimeStore(t), newRuntimeStore(t)
	images.write("overlay-images/images.json", `[{"id":"i","layer":"own"}]`)
	layers.write("overlay-layers/layers.json", `[{"id":"own","parent":"`+c[0].ID+`"}]`)
	used, err := References([]string{layers.root, images.root}, c)
	want := []Referrer{{"image", "i", images.root}}
	if d := cmp.Diff(want, used[c[0].ID]); err != nil || d != "" {
		t.Errorf("error %v (-want +got):\n%s", err, d)
	}
}

func TestUnreadableReferencesAreAnError(t *testing.T) {
	for _, list := range referringLists() {
		r := newRuntimeStore(t)
		r.write(list.name, `[{"id":`)
		if used, err := References([]string{r.root}, nil); err == nil {
			t.Errorf("%s: a torn list was taken for %v", list.name, used)
		}
		r = newRuntimeStore(t)
		if err := os.MkdirAll(filepath.Join(r.root, list.name), 0o700); err != nil {
			t.Fatal(err)
		}
		if used, err := References([]string{r.root}, nil); err == nil {
			t.Errorf("%s: what cannot be read was taken for %v", list.name, used)
		}
	}
}

func TestReferencesStamp(t *testing.T) {
	for _, list := range referringLists() {
		r := newRuntimeStore(t)
		roots := []string{r.root}
		before := ReferencesStamp(roots)
		for _, content := range []string{`[{"id":"a"}]`, `[{"id":"b"}]`, `[]`} {
			r.write(list.name, content)
			after := ReferencesStamp(roots)
			if after == before || after != ReferencesStamp(roots) {
				t.Errorf("%s: %s leads from stamp %q to %q", list.name, content, before, after)
			}
			before = after
		}
	}
}
