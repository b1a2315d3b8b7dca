// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

const (
	blockSize = 4096
	// validSeconds is how long the kernel may keep names and attributes: a year.
	validSeconds = 365 * 24 * 3600
	// dataStart is where the data begins in a reply buffer: on a page, which
	// makes copying quicker. The header goes right before it.
	dataStart = 4096
	// maxDirRead bounds the reply to READDIR; the kernel asks again for more.
	maxDirRead = 64 << 10
)

// serve answers one request.
func (s *Server) serve(c *call) {
	if c.op == opRead {
		s.serveRead(c)
		return
	}
	var small [256]byte
	b, err := s.answer(appendHeader(small[:0], c.unique, 0), c)
	if err != nil {
		s.fail(c, err)
		return
	}
	s.reply(b)
}

// answer appends the reply to anything but a READ.
func (s *Server) answer(b []byte, c *call) ([]byte, error) {
	root := c.node == rootNode
	switch c.op {
	case opLookup:
		if !root {
			return nil, unix.ENOTDIR
		}
		n, err := s.nodes.acquireName(c.ctx, c.name)
		if err != nil {
			return nil, err
		}
		defer n.users.Done()
		return appendEntryOut(b, n.attributes()), nil
	case opGetattr:
		if root {
			return appendAttrOut(b, attributes{ino: rootNode, mode: unix.S_IFDIR | 0o500}), nil
		}
		n, err := s.nodes.acquire(c.ctx, c.node)
		if err != nil {
			return nil, err
		}
		defer n.users.Done()
		return appendAttrOut(b, n.attributes()), nil
	case opOpen:
		n, err := s.nodes.acquire(c.ctx, c.node)
		if err != nil {
			return nil, err
		}
		defer n.users.Done()
		// The mount on top has the page cache; a second one would only cost.
		return appendOpenOut(b, openDirectIO), nil
	case opOpendir:
		return appendOpenOut(b, 0), nil
	case opReaddir:
		return s.list(b, c)
	case opStatfs:
		return appendStatfsOut(b, s.nodes.len()), nil
	case opRelease, opReleasedir, opDestroy:
		return b, nil
	default:
		return nil, unix.ENOSYS // which the kernel remembers for most operations
	}
}

// list answers READDIR. "." and ".." are not listed: POSIX does not ask for
// them, and ids of nodes are offsets here.
func (s *Server) list(b []byte, c *call) ([]byte, error) {
	if err := s.nodes.waitReady(c.ctx); err != nil {
		return nil, err
	}
	room := min(int(c.size), maxDirRead)
	for _, n := range s.nodes.after(c.offset) {
		if room -= direntLen(n.name); room < 0 {
			break
		}
		b = appendDirent(b, n.id, n.name)
	}
	return b, nil
}

// serveRead answers READ. A buffer is taken only when the data is there.
func (s *Server) serveRead(c *call) {
	n, err := s.nodes.acquire(c.ctx, c.node)
	if err != nil {
		s.fail(c, err)
		return
	}
	defer n.users.Done()
	length := c.size
	switch left := n.size - int64(c.offset); {
	case c.size > maxRead || int64(c.offset) < 0:
		s.replyError(c.request, unix.EINVAL)
		return
	case left <= 0:
		length = 0
	case left < int64(length):
		length = uint32(left)
	}
	if err = s.sendRange(c, n, int64(c.offset), int(length)); err == nil {
		n.failing.Store(false)
		return
	}
	if c.ctx.Err() == nil && !n.failing.Swap(true) {
		s.log.Warn("reading a device failed", "device", n.name,
			"offset", c.offset, "bytes", length, "err", err)
	}
	s.fail(c, err)
}

// sendRange waits for the range and sends it.
func (s *Server) sendRange(c *call, n *node, off int64, length int) error {
	if length > 0 {
		release, err := n.dev.Wait(c.ctx, off, length)
		if err != nil {
			return err
		}
		defer release()
	}
	var buf []byte
	select {
	case buf = <-s.buffers:
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
	if buf == nil {
		buf = make([]byte, dataStart+maxRead)
	}
	defer func() { s.buffers <- buf }()
	data := buf[dataStart : dataStart+length]
	if length > 0 {
		got, err := n.dev.ReadAt(data, off)
		if err != nil && (got < length || !errors.Is(err, io.EOF)) {
			return err
		}
		if got < length {
			return fmt.Errorf("reading a device at %d: got %d of %d bytes", off, got, length)
		}
	}
	message := buf[dataStart-outHeaderSize : dataStart+length]
	appendHeader(message[:0], c.unique, 0)
	s.reply(message)
	return nil
}

// fail answers a request that ended with err, unless it is another server's.
func (s *Server) fail(c *call, err error) {
	if errors.Is(context.Cause(c.ctx), errAbandoned) {
		return
	}
	s.replyError(c.request, errnoOf(c, err))
}

// errnoOf is the one place where errors become error numbers.
func errnoOf(c *call, err error) unix.Errno {
	var errno unix.Errno
	switch {
	case errors.Is(context.Cause(c.ctx), errInterrupted):
		return unix.EINTR
	case c.op == opRead:
		return unix.EIO
	case errors.Is(err, errUnknown) && c.op == opLookup:
		return unix.ENOENT
	case errors.Is(err, errUnknown):
		return unix.ESTALE // makes the kernel look the name up again
	case errors.As(err, &errno):
		return errno
	default:
		return unix.EIO
	}
}

func (s *Server) replyError(r request, errno unix.Errno) {
	var small [outHeaderSize]byte
	s.reply(appendHeader(small[:0], r.unique, errno))
}

func (s *Server) reply(message []byte) {
	if err := s.conn.reply(finish(message)); err != nil {
		s.log.Error("answering a FUSE request", "err", err)
	}
}
