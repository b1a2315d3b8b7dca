// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// maxBackground is how many asynchronous requests the kernel keeps open at
	// once. All reads that EROFS makes are asynchronous, and one that waits for
	// the network holds its place, so this must be well above the number of
	// readers that may wait, or they would block those whose data is local.
	maxBackground = 512

	handshakeTimeout = 10 * time.Second
)

// ErrNoResend means that the kernel cannot hand out again the requests that
// another process took and did not answer (Linux before 6.9).
var ErrNoResend = errors.New("the kernel cannot resend requests")

// Conn is one FUSE mount and the descriptor its requests come from. The kernel
// keeps the mount alive for as long as one process holds the descriptor; which
// one does not matter. Methods may be called concurrently, Close last.
type Conn struct {
	file *os.File
	fd   int // of file, for replies: os.File would let only one writer at a time
	dir  string

	// resend tells that the kernel is known to be able to resend. An adopted
	// connection learns it from its first Resend.
	resend atomic.Bool
}

// Mount mounts an empty file system on the directory dir and negotiates the
// protocol, so that its requests wait for the first [Server]. A mount on dir
// whose process is gone is detached first. Only root can look into the mount.
func Mount(dir string) (*Conn, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); errors.Is(err, unix.ENOTCONN) {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return nil, fmt.Errorf("detaching the dead mount on %s: %w", dir, err)
		}
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/fuse: %w", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,max_read=%d", fd, maxRead)
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY
	if err := unix.Mount("holdfast", dir, "fuse.holdfast", flags, options); err != nil {
		return nil, errors.Join(fmt.Errorf("mounting FUSE on %s: %w", dir, err), unix.Close(fd))
	}
	// Only now: a descriptor without a mount polls as an error, which the
	// runtime's poller would remember.
	c := &Conn{file: os.NewFile(uintptr(fd), "/dev/fuse"), fd: fd, dir: dir}
	err = c.handshake()
	if err == nil {
		err = c.teach()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("negotiating with the kernel for %s: %w", dir, err), c.Unmount(), c.Close())
	}
	return c, nil
}

// Adopt returns the connection of a mount on dir that another process made
// with [Mount] and passed on as f. Adopt takes f over, also if it fails.
func Adopt(f *os.File, dir string) (*Conn, error) {
	defer f.Close() //nolint:errcheck // a duplicate takes its place
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("adopting the FUSE descriptor of %s: %w", dir, err)
	}
	fd := -1
	var dupErr error
	err = raw.Control(func(old uintptr) {
		if fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); dupErr == nil {
			dupErr = unix.SetNonblock(fd, true)
		}
	})
	if err = errors.Join(err, dupErr); err != nil {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
		}
		return nil, fmt.Errorf("adopting the FUSE descriptor of %s: %w", dir, err)
	}
	return &Conn{file: os.NewFile(uintptr(fd), "/dev/fuse"), fd: fd, dir: dir}, nil
}

// File returns the descriptor, to be passed to another process. It remains the
// connection's: the caller must not close it.
func (c *Conn) File() *os.File { return c.file }

// Unmount detaches the mount at once; files that are still open or in use by
// mounts on top of them go on being served until the last of them is closed,
// which ends [Server.Run].
func (c *Conn) Unmount() error {
	if err := unix.Unmount(c.dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmounting %s: %w", c.dir, err)
	}
	return nil
}

// Close gives the descriptor up. If no other process holds it, all open files
// of the mount fail from then on.
func (c *Conn) Close() error { return c.file.Close() }

// Resend asks the kernel to hand out again all requests that were taken from
// the descriptor and not answered, or fails with [ErrNoResend]. Call it when
// the process that took them is gone, and best before [Server.Run].
func (c *Conn) Resend() error {
	err := c.notify(finish(appendNotify(nil, notifyResend)))
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("resending requests of %s: %w", c.dir, ErrNoResend)
	}
	if err != nil {
		return fmt.Errorf("resending requests of %s: %w", c.dir, err)
	}
	c.resend.Store(true)
	return nil
}

// forgetAttributes makes the kernel drop the cached attributes of a node.
func (c *Conn) forgetAttributes(node uint64) error {
	b := appendNotify(nil, notifyInvalInode)
	b = binary.NativeEndian.AppendUint64(b, node)
	b = binary.NativeEndian.AppendUint64(b, ^uint64(0)) // offset -1: attributes only
	b = binary.NativeEndian.AppendUint64(b, 0)
	err := c.notify(finish(b))
	if errors.Is(err, unix.ENOENT) {
		return nil // the kernel does not know the node
	}
	return err
}

// notify writes through the os.File, which, unlike replies, does not need the
// caller to know that the connection is still open.
func (c *Conn) notify(p []byte) error {
	_, err := c.file.Write(p)
	return err
}

// read reads one request. It fails with ENODEV when the mount is gone and with
// os.ErrDeadlineExceeded when the read deadline has passed.
func (c *Conn) read(p []byte) (int, error) {
	for {
		n, err := c.file.Read(p)
		var errno unix.Errno
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, os.ErrClosed) {
			return n, err
		}
		if !errors.As(err, &errno) {
			// A connection that is gone polls as an error, which the runtime
			// reports as "not pollable"; reading tells what it is.
			if n, err = unix.Read(c.fd, p); err == nil {
				return n, nil
			}
		}
		// ENOENT: the request was withdrawn while it was being read.
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
}

// reply sends one answer. That the request is no longer wanted is no error.
func (c *Conn) reply(p []byte) error {
	for {
		_, err := unix.Write(c.fd, p)
		switch {
		case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
			return nil
		case errors.Is(err, unix.EINTR):
		default:
			return err
		}
	}
}

// handshake answers the INIT that mounting has queued. The mount is unusable
// before, so no other request can come first.
func (c *Conn) handshake() error {
	if err := c.file.SetReadDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return fmt.Errorf("polling /dev/fuse: %w", err)
	}
	buf := make([]byte, requestSize)
	n, err := c.read(buf)
	if err != nil {
		return fmt.Errorf("reading the first request: %w", err)
	}
	r, err := decodeRequest(buf[:n])
	if err != nil {
		return err
	}
	if r.op != opInit {
		return fmt.Errorf("the first request is operation %d, not INIT", r.op)
	}
	in := decodeInit(buf[inHeaderSize:n])
	if in.major != protoMajor || in.minor < protoMinMinor {
		return fmt.Errorf("the kernel speaks FUSE %d.%d, 7.%d or newer is needed", in.major, in.minor, protoMinMinor)
	}
	const want = flagAsyncRead | flagAsyncDIO | flagParallelDirop | flagMaxPages | flagInitExt | flagHasResend
	flags := in.flags & want
	c.resend.Store(flags&flagHasResend != 0)
	return c.reply(finish(appendInit(appendHeader(nil, r.unique, 0), in, flags)))
}

// teach has the kernel ask once for POLL and FLUSH, and thereby learn that they
// do not exist, which it remembers for as long as the mount lives. A process
// that serves the mount could otherwise not use its files: os.Open adds them to
// the runtime's epoll set, which asks for POLL while it blocks the poller, and
// the child of a fork closes them, which asks for FLUSH while the runtime may
// have stopped the goroutines that would answer.
func (c *Conn) teach() error {
	probe := digest.FromString("")
	s := New(c, slog.New(slog.DiscardHandler))
	if err := s.Add(probe, empty{}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	var probeErr error
	done := make(chan struct{})
	go func() {
		defer cancel() // after done, which then tells a success from a timeout
		defer close(done)
		probeErr = pollOnce(s.Path(probe))
	}()
	if err := s.Run(ctx); err != nil {
		return err
	}
	select {
	case <-done:
		s.Remove(probe)
		return probeErr
	default: // it ends when the caller closes the connection
		return fmt.Errorf("opening a file: %w", context.DeadlineExceeded)
	}
}

// pollOnce opens, polls and closes a file without the runtime's poller. Signals, with
// which Go's scheduler preempts goroutines, may interrupt each.
func pollOnce(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for errors.Is(err, unix.EINTR) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return fmt.Errorf("opening %s: %w", path, err)
	}
	poll := func() error {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err
	}
	for err = poll(); errors.Is(err, unix.EINTR); err = poll() {
	}
	if err != nil {
		err = fmt.Errorf("polling %s: %w", path, err)
	}
	if closed := unix.Close(fd); closed != nil && !errors.Is(closed, unix.EINTR) { // it is closed then, too
		err = errors.Join(err, fmt.Errorf("closing %s: %w", path, closed))
	}
	return err
}

// empty is a device without data.
type empty struct{}

func (empty) Size() int64                                      { return 0 }
func (empty) Wait(context.Context, int64, int) (func(), error) { return func() {}, nil }
func (empty) ReadAt([]byte, int64) (int, error)                { return 0, nil }
