// SPDX-License-Identifier: Apache-2.0

package sharedstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"go.podman.io/storage"

	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/imagestore"
)

// Remove takes images out of the store, by name, id or digest: a name of an image with
// others goes alone. Layers stay: see [Store.Prune]. If one is not there, [ErrUnknown],
// all stay.
func (s *Store) Remove(ctx context.Context, names ...string) error {
	err := s.write(ctx, func() error {
		if err := s.removeImages(ctx, names); err != nil {
			return err
		}
		return errors.Join(s.recoverImages(), s.noteUnneeded())
	})
	if err != nil {
		return fmt.Errorf("removing from %s: %w", s.root, err)
	}
	return nil
}

func (s *Store) removeImages(ctx context.Context, names []string) error {
	unlock, err := imagestore.Lock(ctx, s.root, imagestore.Images)
	if err != nil {
		return err
	}
	defer unlock()
	images, err := s.images()
	if err != nil {
		return err
	}
	for _, name := range names {
		i := find(images, name)
		if i < 0 {
			return fmt.Errorf("%s: %w", name, ErrUnknown)
		}
		full, ok := ocidir.FullName(name)
		if ok && slices.Contains(images[i].Names, full) && len(images[i].Names) > 1 {
			images[i].Names = slices.DeleteFunc(images[i].Names, func(n string) bool { return n == full })
			continue
		}
		images = slices.Delete(images, i, i+1)
	}
	return imagestore.WriteList(s.root, imagestore.Images, images)
}

// find finds an image by name, by id or the beginning of one, or by digest.
func find(images []storage.Image, name string) int {
	if full, ok := ocidir.FullName(name); ok {
		if i := slices.IndexFunc(images, func(i storage.Image) bool { return slices.Contains(i.Names, full) }); i >= 0 {
			return i
		}
	}
	return slices.IndexFunc(images, func(i storage.Image) bool {
		return i.ID == name || i.Digest.String() == name || len(name) >= 12 && strings.HasPrefix(i.ID, name)
	})
}

// needs returns the layers that images with names need.
func needs(images []storage.Image, layers []imagestore.Layer) map[string]bool {
	parents := map[string]string{}
	for _, l := range layers {
		parents[l.ID] = l.Parent
	}
	needed := map[string]bool{}
	for _, i := range images {
		for id := i.TopLayer; len(i.Names) > 0 && id != "" && !needed[id]; id = parents[id] {
			needed[id] = true
		}
	}
	return needed
}

// noteUnneeded notes since when what has no name is not needed.
func (s *Store) noteUnneeded() error {
	images, err := s.images()
	if err != nil {
		return err
	}
	layers, err := s.layers()
	if err != nil {
		return err
	}
	needed, since := needs(images, layers), map[string]time.Time{}
	now := time.Now().UTC().Truncate(time.Second)
	note := func(id string) {
		if since[id] = now; !s.state.Unneeded[id].IsZero() {
			since[id] = s.state.Unneeded[id]
		}
	}
	for _, l := range layers {
		if !needed[l.ID] {
			note(l.ID)
		}
	}
	for _, i := range images {
		if len(i.Names) == 0 {
			note("image " + i.ID)
		}
	}
	s.state.Unneeded = since
	return s.save()
}

// Decision is what Prune does with something, and why.
type Decision struct {
	Kind   string `json:"kind"` // image, layer or staged
	ID     string `json:"id"`
	Remove bool   `json:"remove"`
	Reason string `json:"reason"`
}

// PruneOptions says what goes.
type PruneOptions struct {
	// Grace is how long something has to be unneeded. Nodes that this one knows nothing of
	// may refer to it as long as their images and containers are there.
	Grace time.Duration
	// RuntimeRoots are the storage roots of the runtimes of this machine; what they refer
	// to stays.
	RuntimeRoots []string
	DryRun       bool
}

// Prune removes images without names and layers that nothing in this store has needed
// for the grace period, and what interrupted writers have left. It returns a decision
// about everything that is not needed.
func (s *Store) Prune(ctx context.Context, o PruneOptions) (decisions []Decision, err error) {
	err = s.write(ctx, func() error {
		if err := s.noteUnneeded(); err != nil {
			return err
		}
		decisions, err = s.prune(ctx, o)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("pruning %s: %w", s.root, err)
	}
	return decisions, nil
}

func (s *Store) prune(ctx context.Context, o PruneOptions) ([]Decision, error) {
	images, err := s.images()
	if err != nil {
		return nil, err
	}
	layers, err := s.layers()
	if err != nil {
		return nil, err
	}
	used, err := imagestore.References(o.RuntimeRoots, layers)
	if err != nil {
		return nil, fmt.Errorf("keeping all: %w", err)
	}
	decisions := []Decision{}
	var staying []storage.Image
	decide := func(kind, id, key, why string) bool {
		age := time.Since(s.state.Unneeded[key])
		d := Decision{Kind: kind, ID: id, Reason: fmt.Sprintf("not needed for %s, grace period %s", max(0, age).Round(time.Second), o.Grace), Remove: age >= o.Grace}
		if why != "" {
			d.Remove, d.Reason = false, why
		}
		decisions = append(decisions, d)
		return d.Remove
	}
	for _, i := range images {
		if len(i.Names) > 0 || !decide("image", i.ID, "image "+i.ID, "") {
			staying = append(staying, i)
		}
	}
	named := slices.Clone(staying)
	for n := range named {
		named[n].Names = []string{"keep"} // what stays needs its layers, named or not
	}
	needed, gone := needs(named, layers), map[string]bool{}
	for _, l := range slices.Backward(layers) { // children come after their parents
		if needed[l.ID] {
			continue
		}
		why := ""
		if by := used[l.ID]; len(by) > 0 {
			why = "in use: " + by[0].String()
		} else if slices.ContainsFunc(layers, func(c imagestore.Layer) bool { return c.Parent == l.ID && !gone[c.ID] }) {
			why = "a layer that is built on it stays"
		}
		gone[l.ID] = decide("layer", l.ID, l.ID, why)
	}
	staged, err := s.prunable()
	if err != nil || o.DryRun {
		return append(decisions, staged...), err
	}
	if len(staying) < len(images) {
		if err := s.replaceImages(ctx, staying); err != nil {
			return nil, err
		}
	}
	for _, d := range staged {
		if err := os.RemoveAll(s.staged(d.ID)); err != nil {
			return nil, err
		}
	}
	return append(decisions, staged...), s.dropLayers(ctx, gone)
}

// prunable are complete layers that nobody has taken up.
func (s *Store) prunable() ([]Decision, error) {
	entries, err := os.ReadDir(s.path(stagingDir))
	if err != nil {
		return nil, err
	}
	var all []Decision
	for _, e := range entries {
		if layerID.MatchString(e.Name()) {
			all = append(all, Decision{Kind: "staged", ID: e.Name(), Remove: true, Reason: "left by an add that did not end"})
		}
	}
	return all, nil
}

func (s *Store) replaceImages(ctx context.Context, images []storage.Image) error {
	unlock, err := imagestore.Lock(ctx, s.root, imagestore.Images)
	if err != nil {
		return err
	}
	defer unlock()
	if err := imagestore.WriteList(s.root, imagestore.Images, images); err != nil {
		return err
	}
	return s.recoverImages()
}

// dropLayers removes records, and then directories.
func (s *Store) dropLayers(ctx context.Context, gone map[string]bool) error {
	unlock, err := imagestore.Lock(ctx, s.root, imagestore.Layers)
	if err != nil {
		return err
	}
	defer unlock()
	layers, err := s.layers()
	if err != nil {
		return err
	}
	var ids []string
	keep := slices.DeleteFunc(slices.Clone(layers), func(l imagestore.Layer) bool {
		if gone[l.ID] {
			ids = append(ids, l.ID)
		}
		return gone[l.ID]
	})
	if len(ids) == 0 {
		return nil
	}
	if err := imagestore.WriteList(s.root, imagestore.Layers, keep); err != nil {
		return err
	}
	for _, id := range ids {
		// Only out of sight: deleting takes long, and readers wait for the lock.
		if err := os.Rename(s.path(driverDir, id), s.path(stagingDir, trash+id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	unlock()
	for _, id := range ids {
		if err := s.discard(id); err != nil {
			return err
		}
		delete(s.state.Unneeded, id)
	}
	return s.save()
}
