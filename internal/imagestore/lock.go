// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// The lock protocol of containers/storage (pkg/lockfile, rawfilelock_unix.go): an
// fcntl lock on the whole file, and after a change 64 bytes at its start that
// differ from those before. Its package is not used: it keeps one lock a file
// and process, which could not also be the read-only lock of a reader, and its
// waits cannot be ended.
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
	unlock = func() { _ = f.Close() } // closing the description ends its lock
	for {
		l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
		if err == nil {
			return unlock, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EINTR) {
			unlock()
			return nil, fmt.Errorf("locking image store %s: %w", root, err)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			unlock()
			return nil, fmt.Errorf("locking image store %s: %w", root, context.Cause(ctx))
		}
	}
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
