// SPDX-License-Identifier: Apache-2.0

package keeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/fusedev"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		if err := runWorker(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "check" {
		return
	}
	goleak.VerifyTestMain(m)
}

// The workers of the tests serve one file. They are told how to behave by a file,
// read at their start:
//
//	serve   answer
//	hang    get ready, and let every read wait
//	fail    end before getting ready
//	panic   get ready, and die of the first read
//	late    never get ready
//	slow    take a moment to get ready, and fail if it is disturbed
const (
	content  = "what the worker serves"
	fileSize = int64(len(content))
)

type behaviour string

func (behaviour) Size() int64 { return fileSize }

func (b behaviour) Wait(ctx context.Context, _ int64, _ int) (func(), error) {
	switch b {
	case "hang":
		<-ctx.Done()
		return nil, context.Cause(ctx)
	case "panic":
		os.Exit(2)
	}
	return func() {}, nil
}

func (behaviour) ReadAt(p []byte, off int64) (int, error) { return copy(p, content[off:]), nil }

func runWorker(devices, told string) error {
	in, err := Inherit(1)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := in.UntilHandOver(ctx)
	defer cancel()
	how, err := os.ReadFile(told)
	if err != nil {
		return err
	}
	switch string(how) {
	case "fail":
		return errors.New("told to fail")
	case "late":
		<-ctx.Done()
		return nil
	case "slow":
		select {
		case <-time.After(300 * time.Millisecond):
		case <-ctx.Done():
			return errors.New("disturbed")
		}
	}
	conn, err := fusedev.Adopt(in.Device, devices)
	if err != nil {
		return err
	}
	s := fusedev.New(conn, slog.New(slog.DiscardHandler))
	if err := s.Add(digest.FromString("file"), behaviour(how)); err != nil {
		return err
	}
	s.Ready()
	if err := s.Resend(); err != nil {
		return err
	}
	if _, err := in.Files[0].WriteString("."); err != nil { // how many workers got here
		return err
	}
	if err := in.Ready(); err != nil {
		return err
	}
	return s.Run(ctx)
}

// rig is a keeper that runs.
type rig struct {
	t       *testing.T
	dir     string
	config  Config
	readies chan struct{}
	stop    func() error
	starts  *os.File // a byte for each worker that got ready
	dead    int      // how often a mount was new
	log     logBuffer
}

type logBuffer struct {
	mu  sync.Mutex // protects buf
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func newRig(t *testing.T, how string, change func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), readies: make(chan struct{}, 1)}
	r.tell(how)
	var err error
	if r.starts, err = os.Create(filepath.Join(r.dir, "starts")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.starts.Close() })
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	devices := filepath.Join(r.dir, "devices")
	r.config = Config{
		Devices: devices, Socket: filepath.Join(r.dir, "keeper.sock"), Executable: exe,
		Args: []string{"worker", devices, r.told()}, Check: []string{"check"},
		Patience: 20 * time.Second, Files: []*os.File{r.starts},
		Dead:   func() error { r.dead++; return nil },
		Logger: slog.New(slog.NewTextHandler(&r.log, nil)),
	}
	if change != nil {
		change(&r.config)
	}
	r.start()
	return r
}

func (r *rig) told() string { return filepath.Join(r.dir, "told") }

func (r *rig) tell(how string) {
	r.t.Helper()
	if err := os.WriteFile(r.told(), []byte(how), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, r.config, func() { r.readies <- struct{}{} }) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(time.Minute):
			return errors.New("Run does not end")
		}
	})
	r.t.Cleanup(func() {
		if err := r.stop(); err != nil {
			r.t.Error(err)
		}
		if r.t.Failed() {
			r.t.Log(r.log.String())
		}
	})
}

func (r *rig) awaitReady() {
	r.t.Helper()
	select {
	case <-r.readies:
	case <-time.After(20 * time.Second):
		r.t.Fatalf("no worker is ready: %s", r.log.String())
	}
}

// read reads the file with a descriptor that no poller knows.
func (r *rig) read() (string, error) {
	fd, err := unix.Open(filepath.Join(r.config.Devices, digest.FromString("file").Encoded()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd) //nolint:errcheck // read only
	buf := make([]byte, 100)
	n, err := unix.Pread(fd, buf, 0)
	return string(buf[:max(n, 0)]), err
}

func (r *rig) wantRead() {
	r.t.Helper()
	if got, err := r.read(); got != content || err != nil {
		r.t.Errorf("read %q, %v", got, err)
	}
}

// reading reads in the background.
func (r *rig) reading() <-chan error {
	done := make(chan error, 1)
	go func() {
		got, err := r.read()
		if err == nil && got != content {
			err = fmt.Errorf("read %q", got)
		}
		done <- err
	}()
	return done
}

func (r *rig) wait(done <-chan error) error {
	r.t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(30 * time.Second):
		r.t.Fatalf("the read does not end: %s", r.log.String())
		return nil
	}
}

// worker is the process id of the worker.
func (r *rig) worker() int {
	r.t.Helper()
	for range 1000 {
		// The test's process has one child that is a worker.
		out, err := exec.CommandContext(r.t.Context(), "pgrep", "-P", fmt.Sprint(os.Getpid()), "-f", "worker "+r.config.Devices).Output()
		if pid := 0; err == nil {
			if _, err := fmt.Sscan(string(out), &pid); err == nil {
				return pid
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	r.t.Fatal("there is no worker")
	return 0
}

func (r *rig) kill() {
	r.t.Helper()
	if err := unix.Kill(r.worker(), unix.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) mounted() bool {
	r.t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.Contains(string(data), " "+r.config.Devices+" ")
}

func TestWorkerIsKilled(t *testing.T) {
	r := newRig(t, "serve", nil)
	r.awaitReady()
	r.wantRead()
	for range 3 {
		r.kill()
		r.wantRead()
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if r.mounted() {
		t.Error("the mount is left")
	}
	if r.dead != 1 {
		t.Errorf("%d mounts were made", r.dead)
	}
}

// TestReadsWait kills a worker while a read waits in it.
func TestReadsWait(t *testing.T) {
	r := newRig(t, "hang", nil)
	r.awaitReady()
	done := r.reading()
	time.Sleep(50 * time.Millisecond) // most likely it is in the worker now; the outcome is the same
	r.tell("serve")
	r.kill()
	if err := r.wait(done); err != nil {
		t.Error(err)
	}
}

// TestReadIsDeadly has a read that every worker dies of: it fails, and the next
// one that is not deadly succeeds.
func TestReadIsDeadly(t *testing.T) {
	r := newRig(t, "panic", nil)
	r.awaitReady()
	if err := r.wait(r.reading()); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOENT) {
		t.Errorf("got %v", err)
	}
	r.tell("serve")
	for range 100 {
		if _, err := r.read(); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	r.wantRead()
}

// TestNoWorkerGetsReady has no worker that serves: reads fail instead of waiting.
func TestNoWorkerGetsReady(t *testing.T) {
	for _, how := range []string{"fail", "late"} {
		t.Run(how, func(t *testing.T) {
			r := newRig(t, how, func(c *Config) { c.Patience = time.Second })
			for !r.mounted() {
				time.Sleep(5 * time.Millisecond)
			}
			if err := r.wait(r.reading()); err == nil {
				t.Error("a read succeeded")
			}
			r.tell("serve")
			r.awaitReady()
			r.wantRead()
		})
	}
}

// TestStopWhileStarting stops a keeper whose worker is not ready, and one that has
// none: a worker gets ready, and ends as it should.
func TestStopWhileStarting(t *testing.T) {
	for name, dies := range map[string]bool{"starting": false, "dead": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, "slow", nil)
			if dies {
				r.awaitReady()
				r.kill()
				for !strings.Contains(r.log.String(), "the worker died") {
					time.Sleep(time.Millisecond)
				}
			} else {
				r.worker()
			}
			if err := r.stop(); err != nil {
				t.Error(err)
			}
			want := int64(1)
			if dies {
				want = 2
			}
			if info, err := r.starts.Stat(); err != nil || info.Size() != want {
				t.Errorf("%d workers got ready, want %d (%v)", info.Size(), want, err)
			}
		})
	}
}

func TestReplace(t *testing.T) {
	r := newRig(t, "hang", nil)
	r.awaitReady()
	done := r.reading()
	old := r.worker()
	r.tell("serve")
	if err := Replace(t.Context(), r.config.Socket, r.config.Executable); err != nil {
		t.Fatal(err)
	}
	if err := r.wait(done); err != nil {
		t.Error(err)
	}
	if r.worker() == old {
		t.Error("the worker is the same")
	}
	r.kill() // the new program is the one to start again
	r.wantRead()
}

func TestReplaceFails(t *testing.T) {
	r := newRig(t, "serve", nil)
	r.awaitReady()
	script := func(name, text string) string {
		path := filepath.Join(r.dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700); err != nil { //nolint:gosec // a program
			t.Fatal(err)
		}
		return path
	}
	for _, tt := range []struct{ program, want string }{
		{filepath.Join(r.dir, "missing"), "no such file"},
		{"relative", "absolute"},
		{r.told(), "not executable"},
		{script("refuses", "echo bad setting; exit 1\n"), "bad setting"},
		{script("dies", "test \"$1\" = check\n"), "the old one runs again"},
	} {
		err := Replace(t.Context(), r.config.Socket, tt.program)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", filepath.Base(tt.program), err, tt.want)
		}
		r.wantRead()
	}
}

func TestReplaceWithoutKeeper(t *testing.T) {
	if err := Replace(t.Context(), filepath.Join(t.TempDir(), "none"), "/bin/true"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("got %v", err)
	}
}

// TestOldKernel: where the kernel cannot repeat requests, those of a dead worker
// fail, and the mount is a new one.
func TestOldKernel(t *testing.T) {
	r := newRig(t, "hang", func(c *Config) { c.noResend = true })
	r.awaitReady()
	done := r.reading()
	time.Sleep(50 * time.Millisecond)
	r.tell("serve")
	r.kill()
	if err := r.wait(done); err == nil {
		t.Log("the read had not reached the worker")
	}
	for range 100 {
		if _, err := r.read(); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	r.wantRead()
	if err := r.stop(); err != nil || r.dead != 2 {
		t.Errorf("%d mounts were made, want 2 (%v)", r.dead, err)
	}
}

// TestStore restarts the keeper the way systemd does, which holds the descriptor
// meanwhile.
func TestStore(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "notify")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close() //nolint:errcheck // the test is over
	t.Setenv("NOTIFY_SOCKET", socket)
	r := newRig(t, "serve", nil)
	r.awaitReady()
	msg, oob := make([]byte, 1000), make([]byte, 1000)
	n, oobn, _, _, err := systemd.ReadMsgUnix(msg, oob)
	if err != nil || string(msg[:n]) != "FDSTORE=1\nFDNAME="+storedName {
		t.Fatalf("systemd was told %q, %v", msg[:n], err)
	}
	control, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := syscall.ParseUnixRights(&control[0])
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0]) //nolint:errcheck // what systemd does last
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if !r.mounted() {
		t.Fatal("the mount is gone")
	}
	done := r.reading() // waits for the next keeper
	held, err := fusedev.Take(os.NewFile(uintptr(fds[0]), "stored"), r.config.Devices)
	if err != nil {
		t.Fatal(err)
	}
	k := &keeper{Config: r.config, held: held, requests: make(chan request), since: time.Now()}
	if k.program, err = openProgram(r.config.Executable); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.loop(ctx) }()
	if err := r.wait(done); err != nil {
		t.Error(err)
	}
	cancel()
	if err := errors.Join(<-ended, k.close(), k.program.close()); err != nil {
		t.Error(err)
	}
}
