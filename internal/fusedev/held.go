// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// failFor is how long [Held.Fail] answers: what waits in the kernel is answered
// within milliseconds.
const failFor = time.Second

// Held is a mount that this process keeps alive and does not serve: others do,
// each with a duplicate of the descriptor. Its methods must not be called
// concurrently.
type Held struct {
	fd     int // without an os.File, whose poller would wake up at each request
	dir    string
	resend bool
}

// Hold makes a Held of a connection that is not served. The connection is closed.
func (c *Conn) Hold() (*Held, error) {
	fd, err := unix.FcntlInt(uintptr(c.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err = errors.Join(err, c.Close()); err != nil {
		return nil, fmt.Errorf("holding the FUSE descriptor of %s: %w", c.dir, err)
	}
	return &Held{fd: fd, dir: c.dir, resend: c.resend.Load()}, nil
}

// Take holds the mount on dir that another process made, and whose descriptor
// it passed on as f. Nobody may serve it meanwhile. Take takes f over, also if it
// fails.
func Take(f *os.File, dir string) (*Held, error) {
	c, err := Adopt(f, dir)
	if err != nil {
		return nil, err
	}
	if err := c.Resend(); err != nil && !errors.Is(err, ErrNoResend) {
		return nil, errors.Join(err, c.Close())
	}
	return c.Hold()
}

// CanResend reports whether a server that is killed leaves its requests to the
// next one (Linux 6.9). Otherwise those that it had taken are never answered.
func (h *Held) CanResend() bool { return h.resend }

// File returns a duplicate of the descriptor to pass to a process that will
// [Adopt] it. The caller closes it.
func (h *Held) File() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicating the FUSE descriptor of %s: %w", h.dir, err)
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// Fail answers everything that waits for an answer with an error, for the want
// of a server. Nobody may serve the mount meanwhile.
func (h *Held) Fail(ctx context.Context, log *slog.Logger) error {
	f, err := h.File()
	if err != nil {
		return err
	}
	c, err := Adopt(f, h.dir)
	if err != nil {
		return err
	}
	if err := c.Resend(); err != nil && !errors.Is(err, ErrNoResend) {
		return errors.Join(err, c.Close())
	}
	s := New(c, log)
	s.Ready() // without a device: every read fails
	ctx, cancel := context.WithTimeout(ctx, failFor)
	defer cancel()
	return errors.Join(s.Run(ctx), c.Close())
}

// Unmount detaches the mount and ends it at once: everything that waits for an
// answer fails, also where a process that is dying still has the descriptor.
func (h *Held) Unmount() error {
	if err := unix.Unmount(h.dir, unix.MNT_DETACH|unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmounting %s: %w", h.dir, err)
	}
	return nil
}

// Close gives the descriptor up: see [Conn.Close].
func (h *Held) Close() error { return unix.Close(h.fd) }

// Clear makes dir a directory without a mount of a daemon that is gone.
func Clear(dir string) error {
	for {
		err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return fmt.Errorf("unmounting %s: %w", dir, err)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("creating device directory: %w", err)
	}
	return nil
}
