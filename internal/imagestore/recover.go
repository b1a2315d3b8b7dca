// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// Recover puts right what a reboot or a crash left: directories without a record
// go, and every record leads to its layer again if mountDirectory knows where
// the layers of its chain, by their blobs, are mounted. It returns the ids of
// the other records; their paths do not resolve. What is right stays as it is,
// at every moment: a runtime may be using it.
func (s *Store) Recover(ctx context.Context, mountDirectory func(blob digest.Digest) (string, bool)) ([]string, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	layers, err := s.Layers()
	if err != nil {
		return nil, err
	}
	byID := map[string]Layer{}
	for _, l := range layers {
		var ok bool
		if l.MountDirectory, ok = mountDirectory(l.BlobDigest); ok && layerID.MatchString(l.ID) {
			byID[l.ID] = l
		}
	}
	for _, dir := range []string{layersDir, imagesDir} {
		if err := atomicfile.Clean(s.path(dir)); err != nil {
			return nil, err
		}
	}
	if err := s.dropStrays(layers); err != nil {
		return nil, err
	}
	if err := s.dropStrayViews(layers); err != nil {
		return nil, err
	}
	var broken []string
	for _, l := range layers {
		below, ok := ancestors(byID, l)
		if !ok {
			broken = append(broken, l.ID)
			if layerID.MatchString(l.ID) {
				err = s.dropView(l.ID)
			}
			if err != nil {
				return nil, fmt.Errorf("recovering layer %s: %w", l.ID, err)
			}
			continue
		}
		if s.intact(byID[l.ID], below) {
			continue
		}
		if err := s.stage(byID[l.ID], below); err != nil {
			return nil, fmt.Errorf("recovering layer %s: %w", l.ID, err)
		}
		if err := os.Rename(s.path(stagingDir, l.ID), s.path(driverDir, l.ID)); err != nil {
			return nil, fmt.Errorf("recovering layer %s: %w", l.ID, err)
		}
	}
	return broken, nil
}

// dropStrayViews removes views that no record needs.
func (s *Store) dropStrayViews(layers []Layer) error {
	known := map[string]bool{}
	for _, l := range layers {
		if layerID.MatchString(l.ID) {
			known[filepath.Base(s.view(l.ID))] = true
		}
	}
	entries, err := os.ReadDir(s.records)
	if err != nil {
		return fmt.Errorf("tidying %s: %w", s.records, err)
	}
	for _, e := range entries {
		if known[e.Name()] {
			continue
		}
		if err := s.dropViewDirectory(filepath.Join(s.records, e.Name())); err != nil {
			return fmt.Errorf("tidying %s: %w", s.records, err)
		}
	}
	return nil
}

// ancestors are the layers below one; not ok if one of them, or the layer
// itself, is not known.
func ancestors(known map[string]Layer, l Layer) (below parents, ok bool) {
	for l, ok = known[l.ID]; ok && l.Parent != ""; {
		if l, ok = known[l.Parent]; ok {
			below = append(below, l)
		}
		if len(below) > len(known) {
			return nil, false // a circle
		}
	}
	return below, ok
}

// dropStrays removes what no record needs. The caller holds the lock.
func (s *Store) dropStrays(layers []Layer) error {
	known := map[string]bool{"l": true}
	for _, l := range layers {
		known[l.ID] = true
		if l.BlobDigest.Validate() == nil {
			known[l.name()] = true
		}
	}
	for _, dir := range []string{driverDir, stagingDir} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			return fmt.Errorf("tidying %s: %w", s.root, err)
		}
		for _, e := range entries {
			if dir == driverDir && known[e.Name()] {
				continue
			}
			if err := os.RemoveAll(s.path(dir, e.Name())); err != nil {
				return fmt.Errorf("tidying %s: %w", s.root, err)
			}
		}
	}
	return nil
}
