// SPDX-License-Identifier: Apache-2.0

package killtest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The structures of seccomp_unotify(2).
type (
	notification struct {
		id         uint64
		pid, flags uint32
		nr         int32
		arch       uint32
		ip         uint64
		args       [6]uint64
	}
	response struct {
		id    uint64
		val   int64
		errno int32
		flags uint32
	}
)

// Offsets in the structure that a filter sees, seccomp(2), little endian.
const (
	numberAt = 0
	flagsAt  = 16 + 2*8 // the third argument
)

// call is a kind of step. path is the argument that tells what is changed, the
// other one of two if it has two; file is one that is an open file.
type call struct {
	name       string
	path, file int
}

const none = -1

// calls are the steps, by their numbers. What Go uses on all architectures is
// enough: os has no calls without a directory.
func calls() map[uint32]call {
	return map[uint32]call{
		unix.SYS_OPENAT:          {"openat", 1, none}, // with O_CREAT
		unix.SYS_MKDIRAT:         {"mkdirat", 1, none},
		unix.SYS_UNLINKAT:        {"unlinkat", 1, none},
		unix.SYS_RENAMEAT:        {"renameat", 3, none},
		unix.SYS_RENAMEAT2:       {"renameat2", 3, none},
		unix.SYS_LINKAT:          {"linkat", 3, none},
		unix.SYS_SYMLINKAT:       {"symlinkat", 2, none},
		unix.SYS_FCHMODAT:        {"fchmodat", 1, none},
		unix.SYS_FCHMOD:          {"fchmod", none, 0},
		unix.SYS_TRUNCATE:        {"truncate", 0, none},
		unix.SYS_FTRUNCATE:       {"ftruncate", none, 0},
		unix.SYS_FALLOCATE:       {"fallocate", none, 0},
		unix.SYS_WRITE:           {"write", none, 0},
		unix.SYS_PWRITE64:        {"pwrite64", none, 0},
		unix.SYS_COPY_FILE_RANGE: {"copy_file_range", none, 2},
		unix.SYS_FSYNC:           {"fsync", none, 0},
		unix.SYS_FDATASYNC:       {"fdatasync", none, 0},
		unix.SYS_MOUNT:           {"mount", 1, none},
		unix.SYS_UMOUNT2:         {"umount2", 0, none},
		unix.SYS_FSMOUNT:         {"fsmount", none, none},
		unix.SYS_MOVE_MOUNT:      {"move_mount", 3, none},
	}
}

// filter is the program that has the kernel ask before each step.
func filter() []unix.SockFilter {
	const load, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_RET | unix.BPF_K
	program := []unix.SockFilter{{Code: load, K: numberAt}}
	for nr := range calls() {
		if nr == unix.SYS_OPENAT {
			continue
		}
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jf: 1},
			unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	return append(program,
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPENAT, Jf: 3},
		unix.SockFilter{Code: load, K: flagsAt},
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.O_CREAT, Jf: 1},
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF},
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
}

// trace installs the filter on all threads, those to come included, and sends the
// descriptor on which the kernel asks over the link.
func trace(link *net.UnixConn) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("giving up new privileges: %w", err)
	}
	program := filter()
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]} //nolint:gosec // it is short
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH |
		unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV // or the signals of Go's scheduler would have calls asked for twice
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("installing a seccomp filter: %w", errno)
	}
	return send(link, "traced", unix.UnixRights(int(fd)))
}

// send sends a message by a call that is no step.
func send(link *net.UnixConn, text string, rights []byte) error {
	if _, _, err := link.WriteMsgUnix([]byte(text), rights, nil); err != nil {
		return fmt.Errorf("telling the test: %w", err)
	}
	return nil
}

// receive receives a message, and a descriptor if one comes with it.
func receive(link *net.UnixConn) (text string, fd int, err error) {
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := link.ReadMsgUnix(buf, oob)
	if err != nil {
		return "", none, fmt.Errorf("listening to the operation: %w", err)
	}
	if n == 0 {
		return "", none, errors.New("it ended")
	}
	if oobn == 0 {
		return string(buf[:n]), none, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return "", none, fmt.Errorf("listening to the operation: %w", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return "", none, fmt.Errorf("listening to the operation: %w", err)
	}
	return string(buf[:n]), fds[0], nil
}

// follow lets n-1 steps of the operation pass, and returns what the n-th would be.
// It returns "" if the operation succeeds before.
func follow(link *net.UnixConn, n int) (step string, err error) {
	if err := link.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return "", fmt.Errorf("listening to the operation: %w", err)
	}
	_, asked, err := receive(link)
	if err != nil {
		return "", err
	}
	defer unix.Close(asked) //nolint:errcheck // it was only read from
	raw, err := link.SyscallConn()
	if err != nil {
		return "", fmt.Errorf("listening to the operation: %w", err)
	}
	var said int
	if err := raw.Control(func(fd uintptr) { said = int(fd) }); err != nil { // it stays open
		return "", fmt.Errorf("listening to the operation: %w", err)
	}
	for {
		fds := []unix.PollFd{{Fd: int32(asked), Events: unix.POLLIN}, {Fd: int32(said), Events: unix.POLLIN}} //nolint:gosec // descriptors are small
		ready, err := unix.Poll(fds, int(patience.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return "", fmt.Errorf("waiting for a step: %w", err)
		case ready == 0:
			return "", fmt.Errorf("no step for %s, after %d to come", patience, n)
		case fds[0].Revents&unix.POLLIN != 0:
			step, err := answer(asked, n == 1)
			if err != nil || step != "" && n == 1 {
				return step, err
			}
			if step != "" {
				n--
			}
		default:
			text, _, err := receive(link)
			if err == nil && text != "done" {
				err = errors.New(text)
			}
			return "", err
		}
	}
}

// answer takes a question of the kernel and lets the call pass, or leaves it there
// if it is a step and the last one. It returns the step, "" if it is none.
func answer(fd int, last bool) (step string, err error) {
	var q notification
	err = control(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&q))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
		return "", nil // who asked is gone
	}
	if err != nil {
		return "", fmt.Errorf("receiving a step: %w", err)
	}
	step = q.step()
	if step != "" && last {
		return step, nil
	}
	r := response{id: q.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	err = control(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
	if errors.Is(err, unix.ENOENT) {
		return "", nil // it will ask again, or is gone
	}
	if err != nil {
		return "", fmt.Errorf("letting a step pass: %w", err)
	}
	return step, nil
}

func control(fd int, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// step describes the call that waits, or returns "" if it is none: a write to
// what is not a file on disk.
func (q *notification) step() string {
	c := calls()[uint32(q.nr)] //nolint:gosec // the filter knows the numbers
	if c.file != none {
		name, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", q.pid, q.args[c.file]))
		if err != nil || !strings.HasPrefix(name, "/") || strings.HasPrefix(name, "/dev/") || strings.HasPrefix(name, "/sys/") {
			return ""
		}
		return c.name + " " + name
	}
	if c.path == none {
		return c.name
	}
	return c.name + " " + q.text(q.args[c.path])
}

// text reads a path out of the memory of who asks.
func (q *notification) text(address uint64) string {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", q.pid))
	if err != nil {
		return "?"
	}
	defer memory.Close() //nolint:errcheck // read only
	buf := make([]byte, unix.PathMax)
	n, _ := memory.ReadAt(buf, int64(address)) //nolint:gosec // less is there at the end of a mapping
	text, _, _ := strings.Cut(string(buf[:n]), "\x00")
	return text
}
