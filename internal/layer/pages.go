// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Unread reports whether all reads of the layer have come to its device so far,
// and none has: the layer was added by this process, its data goes through the
// device, and the kernel has nothing of it in memory.
func (l *Layer) Unread() bool {
	return l.added && l.throughDevice && l.dev.Stats().Touched == 0
}

// ThroughDevice reports whether readers of the layer's mount come to its device,
// for what the kernel does not have in memory.
func (l *Layer) ThroughDevice() bool { return l.throughDevice }

// DropPages asks the kernel to forget what it has in memory of the layer's files,
// so that readers come to the device again. It keeps what programs have mapped.
func (l *Layer) DropPages(ctx context.Context) error {
	err := filepath.WalkDir(filepath.Join(l.target, "diff"), func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// Not through package os: its poller has no business with files of images.
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd) //nolint:errcheck // read only
		return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	})
	if err != nil {
		return fmt.Errorf("dropping pages of layer %s: %w", l.Digest, err)
	}
	return nil
}
