// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// process is a program that runs until the test ends it, and dies with it if it cannot.
type process struct {
	cmd   *exec.Cmd
	log   string        // the file of its output
	ended chan struct{} // closed when it has ended and err is set
	err   error
}

// run starts a program. It appends what that prints to a file.
func run(t testing.TB, log, program string, args ...string) *process {
	t.Helper()
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p := &process{cmd: exec.Command(program, args...), log: log, ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	// A group of its own: an interrupt on the terminal is for the test.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// Pdeathsig is sent when the thread ends that started the process, so it must not.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.ended)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	return p
}

// running reports whether the process has not ended.
func (p *process) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// end kills the process: its data is thrown away. That it has ended before is an error.
func (p *process) end(t testing.TB) {
	t.Helper()
	if !p.running() {
		t.Errorf("%s ended by itself: %v", p.cmd.Path, p.err)
		return
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Errorf("killing %s: %v", p.cmd.Path, err)
	}
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		t.Errorf("%s, process %d, does not end", p.cmd.Path, p.cmd.Process.Pid)
	}
}

// showLog shows the end of what a process has printed.
func showLog(t testing.TB, log string) {
	const most = 32 << 10
	data, err := os.ReadFile(log)
	if err != nil {
		t.Error(err)
		return
	}
	data = data[max(0, len(data)-most):]
	t.Logf("%s:\n%s", filepath.Base(log), bytes.TrimSpace(data))
}

// reservePort returns a port on loopback at which only programs of this test listen: those that
// set SO_REUSEPORT. Nobody else is given it, since a socket has it that does not listen.
func reservePort(t testing.TB) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	addr, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return addr.(*unix.SockaddrInet4).Port
}
