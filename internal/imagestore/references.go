// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// Referrer is something in a runtime's main store that refers to a layer.
type Referrer struct {
	Kind string `json:"kind"` // image, container or layer
	Name string `json:"name"` // its first name, or its id if it has none
	Root string `json:"root"` // of the runtime's store
}

func (r Referrer) String() string { return fmt.Sprintf("%s %s in %s", r.Kind, r.Name, r.Root) }

// referringLists are the lists of a store that refer to layers. What is written
// last comes first: whoever finds an image in its list finds the image's layers
// in theirs, which are read after it.
func referringLists() []struct{ kind, name string } {
	return []struct{ kind, name string }{
		{"container", "overlay-containers/containers.json"},
		{"container", "overlay-containers/volatile-containers.json"},
		{"image", filepath.Join(imagesDir, imagesJSON)},
		{"layer", filepath.Join(layersDir, "volatile-layers.json")},
		{"layer", filepath.Join(layersDir, layersJSON)},
	}
}

// listed is an image, a container or a layer in its list.
type listed struct {
	ID     string   `json:"id"`
	Names  []string `json:"names"`
	Layer  string   `json:"layer"`         // of an image or a container
	Mapped []string `json:"mapped-layers"` // of an image
	Parent string   `json:"parent"`        // of a layer
}

func (l listed) name() string {
	if len(l.Names) > 0 {
		return l.Names[0]
	}
	return l.ID
}

// References returns who refers to which layers, by their ids: the images,
// containers and layers of the runtimes' main stores at roots, with all that
// their layers are built on, in those stores or among the layers in shared. Of
// layers it names those that no image and no container accounts for.
//
// An error means that what is referred to is not known, and nothing may be
// removed. A store that does not exist refers to nothing.
func References(roots []string, shared []Layer) (map[string][]Referrer, error) {
	parents := map[string]string{}
	for _, l := range shared {
		parents[l.ID] = l.Parent
	}
	type reference struct {
		by     Referrer
		layers []string
	}
	var all []reference
	for _, list := range referringLists() {
		for _, root := range roots {
			items, err := readList(filepath.Join(root, list.name))
			if err != nil {
				return nil, err
			}
			for _, i := range items {
				r := reference{Referrer{list.kind, i.name(), root}, append(i.Mapped, i.Layer)}
				if list.kind == "layer" {
					parents[i.ID] = i.Parent
					r.layers = []string{i.ID}
				}
				all = append(all, r)
			}
		}
	}
	used := map[string][]Referrer{}
	for _, r := range all {
		for _, id := range r.layers {
			for ; id != ""; id = parents[id] {
				by := used[id]
				// What it stands on was seen with it; a circle ends here, too.
				if n := len(by); n > 0 && (by[n-1] == r.by || r.by.Kind == "layer") {
					break
				}
				used[id] = append(by, r.by)
			}
		}
	}
	return used, nil
}

// readList reads one of a store's lists; a list that does not exist is empty.
func readList(name string) ([]listed, error) {
	var items []listed
	err := atomicfile.ReadJSON(name, maxJSON, &items)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return items, nil
	}
	return nil, fmt.Errorf("reading what a runtime refers to: %w", err)
}

// ReferencesStamp differs from an earlier one if what [References] returns may
// differ: the runtimes replace a list to change it. It costs a stat a list.
func ReferencesStamp(roots []string) string {
	var b strings.Builder
	for _, list := range referringLists() {
		for _, root := range roots {
			var st unix.Stat_t
			err := unix.Stat(filepath.Join(root, list.name), &st)
			fmt.Fprintln(&b, st.Ino, st.Size, st.Mtim, err)
		}
	}
	return b.String()
}
