// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/render"
)

// users returns who in the runtime's own storage refers to layers in a store, up to a few
// of them. An error means that it is not known: then the store counts as in use. The store
// is read here, so it must be one that answers.
func (h host) users(s Store, files map[string]*content) ([]string, error) {
	roots, err := h.graphRoots(files)
	if err != nil {
		return nil, err
	}
	var found []string
	switch s.Kind {
	case ImageStore:
		found, err = h.imageUsers(s, roots)
	case LayerStore:
		found, err = h.layerUsers(s, roots)
	case ArtifactStore:
		// What is mounted into a container stays there without the store.
	}
	if err != nil {
		return nil, fmt.Errorf("finding out who uses the %s: %w", s, err)
	}
	const enough = 5
	slices.Sort(found)
	found = slices.Compact(found)
	return found[:min(len(found), enough)], nil
}

// graphRoots are the runtimes' own storage, from here: storage.conf names it, and for CRI-O its
// own configuration may name another.
func (h host) graphRoots(files map[string]*content) ([]string, error) {
	c := files[render.StorageConf]
	if c == nil {
		var err error
		if c, err = h.content(render.VendorStorage); err != nil {
			return nil, err
		}
	}
	tree := map[string]any{}
	if err := h.overlayAll(tree, crioConf, render.CRIODropIns, "", nil, h.content); err != nil {
		return nil, err
	}
	storage, _ := settings(c)["storage"].(map[string]any)
	crio, _ := tree["crio"].(map[string]any)
	graphRoot, _ := storage["graphroot"].(string)
	roots := []string{cmp.Or(graphRoot, "/var/lib/containers/storage")}
	for _, v := range []any{storage["imagestore"], crio["root"], crio["imagestore"]} {
		if root, _ := v.(string); root != "" && !slices.Contains(roots, root) {
			roots = append(roots, root)
		}
	}
	for i, root := range roots {
		var err error
		if roots[i], err = h.path(root); err != nil {
			return nil, err
		}
	}
	return roots, nil
}

func (h host) imageUsers(s Store, roots []string) ([]string, error) {
	path, err := h.path(s.Path)
	if err != nil {
		return nil, err
	}
	layers, err := imagestore.Records(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // nothing can have come from it
	}
	if err != nil {
		return nil, err
	}
	used, err := imagestore.References(roots, layers)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, l := range layers {
		for _, by := range used[l.ID] {
			if by.Kind != "layer" {
				found = append(found, by.Kind+" "+by.Name)
			}
		}
	}
	return found, nil
}

// layerUsers looks for layers that lie in a layer store: containers/storage marks
// them and links to them (drivers/overlay/overlay.go, CreateFromAdditionalLayer).
func (h host) layerUsers(s Store, roots []string) ([]string, error) {
	var found []string
	for _, root := range roots {
		marks, err := filepath.Glob(filepath.Join(root, "overlay", "*", "additionallayer"))
		if err != nil {
			return nil, err
		}
		for _, mark := range marks {
			dir := filepath.Dir(mark)
			target, err := os.Readlink(filepath.Join(dir, "diff"))
			if err == nil && strings.HasPrefix(target, s.Path+"/") {
				found = append(found, "layer "+filepath.Base(dir))
			}
		}
	}
	return found, nil
}
