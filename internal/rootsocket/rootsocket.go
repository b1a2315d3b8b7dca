// SPDX-License-Identifier: Apache-2.0

// Package rootsocket opens Unix sockets that only root can use: by their mode,
// and by asking the kernel who is at the other end.
package rootsocket

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Listen opens a stream socket at path, in place of one that a dead process left:
// the caller makes sure that no other process uses the path. Connections of
// other users than root are dropped.
func Listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("opening socket: %w", err)
	}
	old := unix.Umask(0o177) // never open to others, not for an instant
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("opening socket %s: %w", path, err)
	}
	return listener{l}, nil
}

type listener struct{ net.Listener }

// Accept returns the next connection of root.
func (l listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil || peerIsRoot(c) {
			return c, err
		}
		_ = c.Close()
	}
}

func peerIsRoot(c net.Conn) bool {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	root := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		root = err == nil && cred.Uid == 0
	})
	return root && err == nil
}
