// SPDX-License-Identifier: Apache-2.0

package lazyblob

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/holdfast/holdfast/internal/mount"
)

// Mount mounts the blobs that are not mounted, and ends mounts of blobs that the set
// does not have. One that cannot be mounted is logged.
func (s *Set) Mount(ctx context.Context, m *mount.Mounter) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mounter = m
	known := map[string]bool{}
	for _, b := range s.All() {
		known[filepath.Base(b.target)] = true
		if err := s.mount(ctx, b); err != nil {
			s.Logger.Error("mounting blob", "blob", b.desc.Digest.String(), "err", err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	entries, err := os.ReadDir(s.Mounts)
	if err != nil {
		return fmt.Errorf("looking for stray mounts: %w", err)
	}
	for _, e := range entries {
		if !known[e.Name()] {
			if err := unmount(filepath.Join(s.Mounts, e.Name())); err != nil {
				return fmt.Errorf("ending a stray mount: %w", err)
			}
		}
	}
	return nil
}

// mount mounts a blob, unless it is. The caller holds s.changing.
func (s *Set) mount(ctx context.Context, b *Blob) error {
	mounted, err := mount.Mounted(b.target)
	if err == nil && mounted {
		err = mount.Check(ctx, b.target)
	}
	if err != nil || mounted {
		return err
	}
	if err := os.MkdirAll(b.target, 0o700); err != nil {
		return err
	}
	dev := ""
	if b.desc.Size > 0 {
		dev = s.Exporter.Path(exported(b.desc.Digest))
	}
	if err := s.mounter.Mount(ctx, filepath.Join(b.dir, imageName), dev, b.target); err != nil {
		return err
	}
	return mount.Check(ctx, b.target)
}

func unmount(target string) error {
	if err := mount.Unmount(target, true); err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Unmount ends all mounts. What containers hold of them stays with them.
func (s *Set) Unmount() error {
	s.changing.Lock()
	defer s.changing.Unlock()
	var err error
	for _, b := range s.All() {
		err = errors.Join(err, unmount(b.target))
	}
	return err
}
