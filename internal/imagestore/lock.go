// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The lock protocol of containers/storage (pkg/lockfile, rawfilelock_unix.go): an
// fcntl lock on the whole file, and after a change 64 bytes at its start that
// differ from those before. Its package is not used: it keeps one lock a file
// and process, which could not also be the read-only lock of a reader, and its
// waits cannot be ended.
const lastWriteSize = 64

// lock takes the store's write lock, which excludes all readers of records.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(s.path(layersDir, layersLock), os.O_RDWR, 0)
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
			return nil, fmt.Errorf("locking image store %s: %w", s.root, err)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			unlock()
			return nil, fmt.Errorf("locking image store %s: %w", s.root, context.Cause(ctx))
		}
	}
}

// recordWrite tells readers that the records have changed. The caller holds the lock.
func (s *Store) recordWrite() error {
	f, err := os.OpenFile(s.path(layersDir, layersLock), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	token := make([]byte, lastWriteSize)
	_, _ = rand.Read(token) // never fails
	_, err = f.WriteAt(token, 0)
	return errors.Join(err, f.Close())
}
