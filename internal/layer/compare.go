// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
)

// CompareTree compares the layer's tree with that of an index which was made of
// the layer's very tar, as [erofs.CompareTree] does.
func (l *Layer) CompareTree(idx *index.Index) error {
	if err := l.compareTree(idx); err != nil {
		return fmt.Errorf("comparing tree of layer %s: %w", l.Digest, err)
	}
	return nil
}

func (l *Layer) compareTree(idx *index.Index) (err error) {
	if idx.RootImplied != l.Root.Implied {
		return fmt.Errorf("%w: only one of them describes the root", erofs.ErrTreeDiffers)
	}
	if idx.RootImplied { // it is the one of the layer below then
		root := &idx.Inodes[0]
		root.Mode, root.UID, root.GID = l.Root.Mode, l.Root.UID, l.Root.GID
	}
	f, err := os.OpenFile(l.dir, os.O_RDWR|unix.O_TMPFILE, 0o600) // without a name: nothing to clean up
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	have, err := os.Open(filepath.Join(l.dir, imageName))
	if err != nil {
		return err
	}
	defer have.Close() //nolint:errcheck // read only
	return erofs.CompareTree(have, erofs.Name(l.Digest), l.table.DeviceSize(), idx, f)
}
