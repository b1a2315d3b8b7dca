// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast/holdfast/internal/mount"
)

// parents are the layers below one, nearest first.
type parents []Layer

// join makes a file of one line about the layers.
func (p parents) join(of func(Layer) string) string {
	var all []string
	for _, l := range p {
		all = append(all, of(l))
	}
	return strings.Join(all, ":")
}

// viewFiles are the files beside a layer's tree.
func viewFiles(l Layer, below parents) map[string]string {
	files := map[string]string{"link": linkText(l)}
	if len(below) > 0 {
		files["lower"] = below.join(linkText)
		files["lower-layers"] = below.join(func(l Layer) string { return l.ID })
	}
	return files
}

// stage makes a layer's directory.
func (s *Store) stage(l Layer, below parents) error {
	if err := s.dropView(l.ID); err != nil {
		return err
	}
	view := s.view(l.ID)
	if err := os.MkdirAll(filepath.Join(view, treeName), 0o700); err != nil {
		return err
	}
	for name, content := range viewFiles(l, below) {
		if err := os.WriteFile(filepath.Join(view, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	if err := mount.Bind(l.MountDirectory, filepath.Join(view, treeName)); err != nil {
		return err
	}
	for _, name := range []string{s.path(stagingDir, l.ID), s.path(driverDir, l.ID), s.path(driverDir, l.name())} {
		if err := os.RemoveAll(name); err != nil { // what a crash left without its record
			return err
		}
	}
	if err := os.Symlink(l.MountDirectory, s.path(driverDir, l.name())); err != nil {
		return err
	}
	return os.Symlink(filepath.Join(view, treeName), s.path(stagingDir, l.ID))
}

// intact reports whether everything that stage and a rename make of a layer is
// there, and shows the file system that is mounted for the layer now.
func (s *Store) intact(l Layer, below parents) bool {
	view := s.view(l.ID)
	for link, want := range map[string]string{
		s.path(driverDir, l.ID): filepath.Join(view, treeName), s.path(driverDir, l.name()): l.MountDirectory,
	} {
		if got, err := os.Readlink(link); err != nil || got != want {
			return false
		}
	}
	for name, want := range viewFiles(l, below) {
		if got, err := os.ReadFile(filepath.Join(view, name)); err != nil || string(got) != want {
			return false
		}
	}
	mounted, err := mount.Mounted(filepath.Join(view, treeName))
	if err != nil || !mounted {
		return false
	}
	at, err := os.Stat(filepath.Join(view, treeName))
	if err != nil {
		return false
	}
	now, err := os.Stat(l.MountDirectory)
	return err == nil && os.SameFile(at, now)
}

// treeName is the mount in a layer's view.
const treeName = "tree"

// view is the directory that overlay/<id> leads into.
func (s *Store) view(id string) string { return filepath.Join(s.records, id[:32]) }

// dropView removes what overlay/<id> leads to. Containers keep what they have.
func (s *Store) dropView(id string) error { return s.dropViewDirectory(s.view(id)) }

func (s *Store) dropViewDirectory(view string) error {
	if err := mount.Unbind(filepath.Join(view, treeName)); err != nil {
		return err
	}
	return os.RemoveAll(view)
}

// Detach takes away what all records lead to; the records stay. Until
// [Store.Recover] the paths of their layers do not resolve.
func (s *Store) Detach() error {
	entries, err := os.ReadDir(s.records)
	if err != nil {
		return fmt.Errorf("detaching records: %w", err)
	}
	for _, e := range entries {
		if err := s.dropViewDirectory(filepath.Join(s.records, e.Name())); err != nil {
			return fmt.Errorf("detaching records: %w", err)
		}
	}
	return nil
}

// linkText leads from overlay/l/ out of the store, by more ".." than any store
// is deep, to the mount of the layer.
func linkText(l Layer) string {
	return strings.Repeat("../", 10) + strings.TrimPrefix(filepath.Join(l.MountDirectory, "l", "x"), "/")
}
