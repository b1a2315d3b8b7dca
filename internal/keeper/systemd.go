// SPDX-License-Identifier: Apache-2.0

package keeper

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/fusedev"
)

// The file descriptor store of systemd: sd_notify(3), sd_listen_fds(3).
const (
	storedName    = "holdfast-devices"
	listenFDStart = 3
)

// storedDescriptor returns the descriptor that systemd has kept for us; nil if
// there is none.
func storedDescriptor() *os.File {
	pid, _ := strconv.Atoi(os.Getenv("LISTEN_PID"))
	n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	names := os.Getenv("LISTEN_FDNAMES")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name) // not for the worker
	}
	if pid != os.Getpid() || n < 1 || names != storedName {
		return nil
	}
	unix.CloseOnExec(listenFDStart)
	return os.NewFile(listenFDStart, "/dev/fuse")
}

// storeDescriptor has systemd keep the descriptor. It reports false if systemd
// has not started us.
func storeDescriptor(h *fusedev.Held) (bool, error) {
	f, err := h.File()
	if err != nil {
		return false, err
	}
	defer f.Close() //nolint:errcheck // a duplicate
	sent, err := notify("FDSTORE=1\nFDNAME="+storedName, unix.UnixRights(int(f.Fd())))
	if err != nil {
		return false, fmt.Errorf("storing the FUSE descriptor: %w", err)
	}
	return sent, nil
}

// Notify tells systemd something, if it has started us: sd_notify(3).
func Notify(state string) error {
	_, err := notify(state, nil)
	return err
}

func notify(state string, rights []byte) (sent bool, err error) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return false, nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("telling systemd %q: %w", state, err)
	}
	defer unix.Close(fd) //nolint:errcheck // a datagram has been sent or not
	if err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: name}, 0); err != nil {
		return false, fmt.Errorf("telling systemd %q: %w", state, err)
	}
	return true, nil
}
