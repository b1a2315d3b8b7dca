// SPDX-License-Identifier: Apache-2.0

package sharedstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/imagestore"
)

// trash begins the names of what is being deleted.
const trash = "trash-"

// recover finishes or undoes what a writer that was killed has left. The caller is the
// only writer.
func (s *Store) recover(ctx context.Context) error {
	for _, dir := range []string{"", layersDir, imagesDir} {
		if err := atomicfile.Clean(s.path(dir)); err != nil {
			return err
		}
	}
	if err := s.recoverLayers(ctx); err != nil {
		return fmt.Errorf("tidying up: %w", err)
	}
	if err := s.recoverImages(); err != nil {
		return fmt.Errorf("tidying up: %w", err)
	}
	entries, err := os.ReadDir(s.path(stagingDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		// Complete layers wait for the next that needs them; prune removes them.
		if layerID.MatchString(e.Name()) {
			continue
		}
		if err := os.RemoveAll(s.path(stagingDir, e.Name())); err != nil {
			return fmt.Errorf("tidying up: %w", err)
		}
	}
	return nil
}

// recoverLayers brings records and directories together: a record without a directory
// gets the one that is staged, a directory without a record goes.
func (s *Store) recoverLayers(ctx context.Context) error {
	unlock, err := imagestore.Lock(ctx, s.root, imagestore.Layers)
	if err != nil {
		return err
	}
	defer unlock()
	layers, err := s.layers()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, l := range layers {
		if !layerID.MatchString(l.ID) {
			return fmt.Errorf("%s has a record of layer %q: it was written by something else", s.root, l.ID)
		}
		known[l.ID] = true
		if _, err := os.Stat(s.path(driverDir, l.ID)); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if _, err := os.Stat(s.staged(l.ID)); err == nil {
			if err := s.place(l.ID); err != nil {
				return err
			}
		}
	}
	entries, err := os.ReadDir(s.path(driverDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if layerID.MatchString(e.Name()) && !known[e.Name()] {
			if err := s.discard(e.Name()); err != nil {
				return err
			}
		}
	}
	return errors.Join(s.dropStrayLinks(known), s.dropStraySplits(known))
}

func (s *Store) dropStrayLinks(known map[string]bool) error {
	needed := map[string]bool{}
	for id := range known {
		needed[linkName(id)] = true
	}
	links, err := os.ReadDir(s.path(driverDir, "l"))
	if err != nil {
		return err
	}
	for _, l := range links {
		if !needed[l.Name()] {
			if err := os.Remove(s.path(driverDir, "l", l.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) dropStraySplits(known map[string]bool) error {
	splits, err := filepath.Glob(s.splitFile("*"))
	if err != nil {
		return err
	}
	for _, name := range splits {
		id, _, _ := strings.Cut(filepath.Base(name), ".")
		if known[id] {
			continue
		}
		if _, err := os.Stat(s.staged(id)); err == nil {
			continue // it belongs to that
		}
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

// discard makes the directory of a layer without a record vanish at once, and then
// deletes it.
func (s *Store) discard(id string) error {
	to := s.path(stagingDir, trash+id)
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.Rename(s.path(driverDir, id), to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range []string{s.path(driverDir, "l", linkName(id)), s.splitFile(id)} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.RemoveAll(to)
}

// recoverImages removes data of images that are not recorded.
func (s *Store) recoverImages() error {
	images, err := s.images()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, i := range images {
		known[i.ID] = true
	}
	entries, err := os.ReadDir(s.path(imagesDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() && layerID.MatchString(e.Name()) && !known[e.Name()] {
			if err := os.RemoveAll(s.path(imagesDir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
