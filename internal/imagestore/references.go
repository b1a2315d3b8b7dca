// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// References returns the ids of all layers that the images, containers and
// layers of a runtime's main store refer to, those of its additional stores
// included; parents of the layers in shared are followed too.
//
// An error means that what is referred to is not known, and nothing may be
// removed. A store that does not exist refers to nothing.
func References(root string, shared []Layer) (map[string]bool, error) {
	parents := map[string]string{}
	for _, l := range shared {
		parents[l.ID] = l.Parent
	}
	used := map[string]bool{}
	for _, name := range []string{layersJSON, "volatile-layers.json"} {
		var layers []Layer
		if err := readList(filepath.Join(root, layersDir, name), &layers); err != nil {
			return nil, err
		}
		for _, l := range layers {
			parents[l.ID] = l.Parent
			used[l.ID] = true
		}
	}
	var images []struct {
		Top    string   `json:"layer"`
		Mapped []string `json:"mapped-layers"`
	}
	if err := readList(filepath.Join(root, imagesDir, imagesJSON), &images); err != nil {
		return nil, err
	}
	for _, i := range images {
		used[i.Top] = true
		for _, id := range i.Mapped {
			used[id] = true
		}
	}
	for _, name := range []string{"containers.json", "volatile-containers.json"} {
		var containers []struct {
			Layer string `json:"layer"`
		}
		if err := readList(filepath.Join(root, "overlay-containers", name), &containers); err != nil {
			return nil, err
		}
		for _, c := range containers {
			used[c.Layer] = true
		}
	}
	for id := range used {
		for p := parents[id]; p != "" && !used[p]; p = parents[p] {
			used[p] = true
		}
	}
	delete(used, "")
	return used, nil
}

// readList reads one of a store's lists; a list that does not exist is empty.
func readList(name string, v any) error {
	err := atomicfile.ReadJSON(name, maxJSON, v)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("reading what a runtime refers to: %w", err)
}
