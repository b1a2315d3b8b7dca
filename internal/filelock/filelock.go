// SPDX-License-Identifier: Apache-2.0

// Package filelock locks files as containers/storage does (pkg/lockfile,
// internal/rawfilelock): fcntl locks of the whole file, which also work over NFS,
// between machines. Its package is not used: it keeps one lock a file and process,
// which could not also be the read-only lock of a reader, and its waits cannot be ended.
package filelock

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrHeld means that somebody else holds a lock.
var ErrHeld = errors.New("the lock is held by another process")

// often is how often a lock is tried again.
const often = 5 * time.Millisecond

// Try takes the write lock of an open file, or returns [ErrHeld]. Closing the file ends
// the lock, and so does the end of the process.
func Try(f *os.File) error {
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EINTR) {
		return ErrHeld
	}
	return err
}

// Wait takes the write lock of an open file when nobody else holds one.
func Wait(ctx context.Context, f *os.File) error {
	for {
		if err := Try(f); !errors.Is(err, ErrHeld) {
			return err
		}
		select {
		case <-time.After(often):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
