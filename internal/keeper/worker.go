// SPDX-License-Identifier: Apache-2.0

package keeper

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// readyLine is what a worker writes to its link when it serves.
const readyLine = "ready\n"

// worker is a worker process.
type worker struct {
	cmd    *exec.Cmd
	link   *os.File      // closed to have the worker hand over
	ready  chan struct{} // closed when the worker is ready; nil once that has been seen
	exited chan struct{} // closed when it will do nothing any more; then
	err    error         // says how it ended
	killed bool          // and whether somebody else ended it: a user, or the kernel for want of memory
}

// start starts a worker: see [Inherit] for what it gets.
func (k *keeper) start(p *program) (*worker, error) {
	w, err := k.startWorker(p)
	if err != nil {
		return nil, fmt.Errorf("starting the worker: %w", err)
	}
	return w, nil
}

func (k *keeper) startWorker(p *program) (_ *worker, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "link"), os.NewFile(uintptr(pair[1]), "link")
	defer theirs.Close() //nolint:errcheck // the worker has its own
	defer func() {
		if err != nil {
			_ = ours.Close()
		}
	}()
	device, err := k.held.File()
	if err != nil {
		return nil, err
	}
	defer device.Close() //nolint:errcheck // the worker has its own
	cmd := p.command(k.Args...)
	cmd.ExtraFiles = append([]*os.File{device, theirs}, k.Files...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL, // two workers at once would be worse than none
		Setpgid:   true,            // an interrupt on the terminal is the keeper's
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	w := &worker{cmd: cmd, link: ours, ready: make(chan struct{}), exited: make(chan struct{})}
	k.Logger.Info("started a worker", "worker", w.pid())
	go w.watch(w.ready)
	return w, nil
}

// watch waits for the worker to get ready, and to end.
//
// A worker opens files of its own mount, to mount layers on them. Should it be
// killed just then, one of its threads waits in the kernel for an answer that only
// the next worker gives, and the process stays until then: so a
// worker that is bound to die counts as dead. Nothing of it runs any more.
func (w *worker) watch(ready chan struct{}) {
	said := make(chan struct{})
	go func() {
		defer close(said)
		if line, err := bufio.NewReader(w.link).ReadString('\n'); err == nil && line == readyLine {
			close(ready)
		}
	}()
	reaped := make(chan error, 1)
	go func() { reaped <- w.cmd.Wait() }()
	look := time.NewTicker(dyingInterval)
	defer look.Stop()
	for seen := 0; w.err == nil && seen < 2; { // twice: most are reaped a moment later
		select {
		case err := <-reaped:
			s, ok := w.cmd.ProcessState.Sys().(syscall.WaitStatus)
			w.killed = ok && s.Signaled() && s.Signal() == syscall.SIGKILL
			w.err, seen = err, 2
		case <-look.C:
			if dying(w.pid()) {
				seen++
			}
			if seen == 2 {
				w.err, w.killed = errDying, true
			}
		}
	}
	_ = w.link.Close() // ends the read
	<-said
	close(w.exited)
}

func (w *worker) pid() int { return w.cmd.Process.Pid }

// status tells how the worker ended.
func (w *worker) status() string {
	if w.err == nil {
		return "exit status 0"
	}
	return w.err.Error()
}

// await returns when the worker is ready.
func (w *worker) await(ctx context.Context, timeout time.Duration) error {
	select {
	case <-w.ready:
		return nil
	case <-w.exited:
		return fmt.Errorf("it ended: %s", w.status())
	case <-time.After(timeout):
		return fmt.Errorf("not within %s", timeout)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// handOver has the worker end and leave everything to the next one.
func (w *worker) handOver() error { return w.link.Close() }

// terminate has the worker end and undo what it has done.
func (w *worker) terminate() error { return w.cmd.Process.Signal(syscall.SIGTERM) }

func (w *worker) kill() { _ = w.cmd.Process.Kill() } // fails only if it is gone

// end has the worker end the given way, and kills it if it does not.
func (w *worker) end(how func() error, timeout time.Duration) error {
	err := how()
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, os.ErrClosed) {
		err = nil // it died just now
	}
	if err == nil {
		select {
		case <-w.exited:
			return w.err
		case <-time.After(timeout):
			err = fmt.Errorf("the worker did not end within %s", timeout)
		}
	}
	w.kill()
	<-w.exited
	return err
}
