// SPDX-License-Identifier: Apache-2.0

// Package keeper keeps the FUSE mount of the devices alive while the process
// that serves it comes and goes.
//
// The keeper is a process that does nothing but hold the mount's descriptor and
// run the worker, its child, which does all the work. A worker that dies is
// started again; what readers had asked it for, the kernel asks the next one. A
// new version of the program takes over the same way ([Replace]).
//
// It knows nothing of layers. What it promises:
//
//   - There is one worker at a time. It dies with its keeper.
//   - A reader never waits for ever: if no worker is ready for as long as Patience,
//     or one after the other dies, everything that waits fails.
//   - On a kernel that cannot ask again (before 6.9) the death of a worker ends
//     the mount, so that its readers fail instead of waiting for ever; a
//     replacement, which lets requests end first, does not.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"time"

	"github.com/holdfast/holdfast/internal/fusedev"
	"github.com/holdfast/holdfast/internal/rootsocket"
)

const (
	// handOverTimeout is how long a worker may take to end. On kernels that
	// cannot resend, fusedev gives requests half a minute to end.
	handOverTimeout = 45 * time.Second
	// stopTimeout is how long a worker may take to undo its mounts.
	stopTimeout = 50 * time.Second
	// A worker that lives for so long was no failure ...
	settled = 10 * time.Second
	// ... and after so many that did not, one after the other, what waits fails:
	// it may be what they die of. One that was killed does not count.
	maxDeaths = 8
	// The pause before the next worker: none after the first death, then doubled.
	firstPause, maxPause = 50 * time.Millisecond, 5 * time.Second
)

// Config is what a keeper works with.
type Config struct {
	Devices string // where the FUSE mount is, or will be; made if need be
	Socket  string // where [Replace] finds the keeper
	// Executable is the program of the worker; it stays the one that is there now,
	// whatever happens to the name, until it is replaced. Args are its arguments.
	Executable string
	Args       []string
	// Check are arguments with which a new program must succeed before it is taken.
	Check []string
	// Patience is how long readers wait for a worker.
	Patience time.Duration
	// Dead is called when the mount is a new one: whatever used an earlier one
	// is dead, and may have to be cleared away.
	Dead func() error
	// Files are passed to every worker: see [Inherit].
	Files  []*os.File
	Logger *slog.Logger

	noResend bool // in tests: behave as on an old kernel
}

// keeper is the state of one Run. All of it belongs to Run's goroutine.
type keeper struct {
	Config
	held     *fusedev.Held
	stored   bool // systemd keeps the descriptor, too
	program  *program
	requests chan request
	ready    func()
	deaths   int       // workers that died early of themselves, one after the other
	since    time.Time // when a worker was ready last; zero while one is
}

// Run keeps a worker running until ctx ends, then has it stop and unmounts.
// ready is called when the first worker is. Run needs its thread to itself.
//
// Under systemd the descriptor outlives even the keeper, in the file descriptor
// store of the unit: after a restart of the unit the mount is the same.
func Run(ctx context.Context, c Config, ready func()) (err error) {
	// The kernel ends the worker when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	k := &keeper{Config: c, ready: ready, requests: make(chan request), since: time.Now()}
	if k.program, err = openProgram(c.Executable); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.program.close()) }()
	if err := k.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	l, err := rootsocket.Listen(c.Socket)
	if err != nil {
		return err
	}
	serving := make(chan struct{})
	serveCtx, stop := context.WithCancel(ctx)
	go func() {
		defer close(serving)
		k.answer(serveCtx, l)
	}()
	defer func() {
		stop()
		<-serving
	}()
	return k.loop(ctx)
}

// open gets the mount: the one that systemd has kept, or a new one.
func (k *keeper) open() error {
	if f := storedDescriptor(); f != nil {
		held, err := fusedev.Take(f, k.Devices)
		if err == nil {
			k.Logger.Info("the FUSE mount is still there", "devices", k.Devices)
			k.held, k.stored = held, true
			return nil
		}
		k.Logger.Warn("the FUSE descriptor that systemd kept is of no use", "err", err)
	}
	return k.mount()
}

// mount makes a new mount, in place of one that is dead.
func (k *keeper) mount() error {
	if err := fusedev.Clear(k.Devices); err != nil {
		return err
	}
	if err := k.Dead(); err != nil {
		return err
	}
	conn, err := fusedev.Mount(k.Devices)
	if err != nil {
		return err
	}
	if k.held, err = conn.Hold(); err != nil {
		return err
	}
	if k.stored, err = storeDescriptor(k.held); err != nil {
		k.Logger.Warn("systemd does not keep the FUSE descriptor", "err", err)
	}
	return nil
}

// close ends the mount, unless systemd keeps it for the next keeper.
func (k *keeper) close() error {
	if k.stored {
		return k.held.Close()
	}
	return errors.Join(k.held.Unmount(), k.held.Close())
}

// loop runs one worker after the other.
func (k *keeper) loop(ctx context.Context) error {
	for {
		w, err := k.start(k.program)
		switch {
		case err == nil:
			if w = k.attend(ctx, w); w != nil { // ctx has ended
				return k.stop(w)
			}
		case ctx.Err() != nil:
			return err
		default: // the machine is out of something
			k.deaths++
			k.Logger.Error("no worker", "err", err)
		}
		// If ctx has ended meanwhile, one more undoes what the dead one has left.
		if err := k.recover(ctx); err != nil {
			return err
		}
	}
}

// stop has the worker stop. One that is starting gets ready first: it can undo
// only what it knows, and an earlier one may have left mounts and records.
func (k *keeper) stop(w *worker) error {
	deadline := time.Now().Add(stopTimeout)
	if w.ready != nil {
		if err := w.await(context.Background(), min(k.Patience, stopTimeout/2)); err != nil {
			k.Logger.Warn("the worker is stopped before it is ready", "err", err)
		}
	}
	return w.end(w.terminate, time.Until(deadline))
}

// attend returns the worker if it outlives ctx, and nil when it has died.
func (k *keeper) attend(ctx context.Context, w *worker) *worker {
	started := time.Now()
	overdue := time.NewTimer(k.Patience)
	defer overdue.Stop()
	for {
		select {
		case <-ctx.Done():
			return w
		case <-w.ready:
			overdue.Stop()
			k.workerReady(w)
		case <-overdue.C:
			k.Logger.Error("the worker does not get ready, and is ended", "worker", w.pid(), "patience", k.Patience)
			w.kill()
		case <-w.exited:
			switch {
			case w.killed:
			case time.Since(started) > settled:
				k.deaths = 1
			default:
				k.deaths++
			}
			if k.since.IsZero() {
				k.since = time.Now()
			}
			k.Logger.Error("the worker died", "worker", w.pid(), "status", w.status(), "deaths", k.deaths)
			return nil
		case r := <-k.requests:
			next, err := k.replace(ctx, w, r.executable)
			r.done <- err
			if next == nil {
				return nil
			}
			w, started = next, time.Now()
			if w.ready == nil {
				overdue.Stop()
			} else {
				overdue.Reset(k.Patience)
			}
		}
	}
}

func (k *keeper) workerReady(w *worker) {
	k.since = time.Time{}
	w.ready = nil
	k.Logger.Info("the worker is ready", "worker", w.pid())
	if k.ready != nil {
		k.ready()
		k.ready = nil
	}
}

// recover makes sure, after a death, that readers do not wait for ever, and
// that the next worker is not started too soon.
func (k *keeper) recover(ctx context.Context) error {
	if !k.held.CanResend() || k.noResend {
		k.Logger.Error("this kernel cannot repeat what the worker was asked: the mount is made anew, and containers that read through it must be restarted")
		if err := errors.Join(k.held.Unmount(), k.held.Close()); err != nil {
			return err
		}
		return k.mount()
	}
	if k.deaths >= maxDeaths || !k.since.IsZero() && time.Since(k.since) > k.Patience {
		k.Logger.Error("no worker stays alive: reads that wait for one fail", "deaths", k.deaths)
		if err := k.held.Fail(ctx, k.Logger); err != nil {
			return err
		}
		k.since, k.deaths = time.Now(), 1
	}
	pause := time.Duration(0)
	if k.deaths > 1 {
		pause = min(firstPause<<min(k.deaths-2, 16), maxPause)
	}
	select {
	case <-time.After(pause):
	case <-ctx.Done():
	}
	return nil
}

// replace swaps the worker for one of another program, and goes back to the old
// program if the new one does not get ready. It returns the worker that runs
// then; nil if there is none.
func (k *keeper) replace(ctx context.Context, w *worker, executable string) (*worker, error) {
	next, err := openProgram(executable)
	if err != nil {
		return w, err
	}
	if err := next.check(ctx, k.Check); err != nil {
		return w, errors.Join(err, next.close())
	}
	k.Logger.Info("replacing the worker", "worker", w.pid(), "program", executable)
	began := time.Now()
	if err := w.end(w.handOver, handOverTimeout); err != nil {
		k.Logger.Warn("the worker was ended before it could hand over", "err", err)
	}
	fresh, err := k.start(next)
	if err == nil {
		if err = fresh.await(ctx, k.Patience); err == nil {
			k.Logger.Info("replaced the worker", "worker", fresh.pid(), "took", time.Since(began).String())
			old := k.program
			k.program, k.deaths = next, 0
			k.workerReady(fresh)
			return fresh, old.close()
		}
		fresh.kill()
		<-fresh.exited
	}
	err = fmt.Errorf("the worker of %s did not get ready, the old one runs again: %w", executable, err)
	k.Logger.Error("replacing the worker", "err", err)
	old, startErr := k.start(k.program)
	if startErr != nil {
		return nil, errors.Join(err, startErr, next.close())
	}
	return old, errors.Join(err, next.close())
}
