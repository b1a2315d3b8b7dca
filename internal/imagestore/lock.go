// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/filelock"
)

// The lock protocol of containers/storage (pkg/lockfile): the lock of package filelock,
// and after a change 64 bytes at the file's start that differ from those before.
const lastWriteSize = 64

// lock takes the store's write lock, which excludes all readers of records.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	return Lock(ctx, s.root, Layers)
}

// List is one of the lists of a store.
type List struct{ dir, json, lock string }

// The lists of a store.
var (
	Layers = List{layersDir, layersJSON, layersLock} //nolint:gochecknoglobals // constant
	Images = List{imagesDir, imagesJSON, imagesLock} //nolint:gochecknoglobals // constant
)

// Lock takes the write lock of a list of the store at root, which excludes all who read
// it.
func Lock(ctx context.Context, root string, list List) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(root, list.dir, list.lock), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("locking image store: %w", err)
	}
	if err := filelock.Wait(ctx, f); err != nil {
		return nil, fmt.Errorf("locking image store %s: %w", root, errors.Join(err, f.Close()))
	}
	return func() { _ = f.Close() }, nil // that ends the lock
}

// ReadList reads a list of the store at root into records, a pointer to a slice.
func ReadList(root string, list List, records any) error {
	if err := atomicfile.ReadJSON(filepath.Join(root, list.dir, list.json), maxJSON, records); err != nil {
		return fmt.Errorf("reading records of %s: %w", root, err)
	}
	return nil
}

// WriteList replaces a list of the store at root, and tells readers that it has
// changed. The caller holds its lock.
func WriteList(root string, list List, records any) error {
	err := atomicfile.WriteJSON(filepath.Join(root, list.dir, list.json), records, 0o600)
	if err == nil {
		err = recordWrite(filepath.Join(root, list.dir, list.lock))
	}
	if err != nil {
		return fmt.Errorf("writing records of %s: %w", root, err)
	}
	return nil
}

// recordWrite tells readers that the records have changed. The caller holds the lock.
func recordWrite(lock string) error {
	f, err := os.OpenFile(lock, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	token := make([]byte, lastWriteSize)
	_, _ = rand.Read(token) // never fails
	_, err = f.WriteAt(token, 0)
	return errors.Join(err, f.Close())
}

// CreateLists makes what is missing of the lists and the locks of a store, and the
// directories that they are in: a runtime does not start without them.
func CreateLists(root string) error {
	for _, list := range []List{Layers, Images} {
		if err := os.MkdirAll(filepath.Join(root, list.dir), 0o700); err != nil {
			return err
		}
		for _, name := range []string{list.json, list.lock} {
			if err := createFile(filepath.Join(root, list.dir, name)); err != nil {
				return err
			}
		}
	}
	return os.MkdirAll(filepath.Join(root, driverDir, "l"), 0o700)
}
