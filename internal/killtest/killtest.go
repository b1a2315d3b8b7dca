// SPDX-License-Identifier: Apache-2.0

// Package killtest kills an operation with SIGKILL at each of its steps: what
// makes it sure that a crash at any moment leaves nothing wrong.
//
// A step is a system call that changes files, directories or mounts. A test runs
// the operation in a process of its own, its own binary once more. A seccomp
// filter there, on all threads, has the kernel ask the test before each step;
// the answer is to go on or, at the step whose turn it is, SIGKILL. So nothing in
// the operation knows of it, and the N-th round sees just what N-1 steps have
// done. Steps of goroutines that run at the same time are counted as they come:
// rounds may then differ in their order, and the kill may meet another step that
// has begun, as kills do.
//
// What the machine forgets when its power fails is not tested: the disk has all
// that was written before the kill.
//
// It is for tests only and imports testing; production code must not import it.
package killtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

const (
	// variable tells the process that it is the one to be killed, and what it
	// inherits.
	variable = "HOLDFAST_KILLTEST"
	// linkFD is its end of the link to the test; the files follow.
	linkFD = 3
	// patience is how long an operation may take to its next step.
	patience = time.Minute
	// maxSteps bounds a test whose operation does not end.
	maxSteps = 2000
)

// Inherited is what the process that will be killed gets from the test.
type Inherited struct {
	Args  []string
	Files []*os.File
}

// bequest is what variable says.
type bequest struct {
	Args  []string
	Files int
}

// Operation runs an operation if this is the process to be killed, and then does
// not return; otherwise it does nothing. It comes first in a test. begin makes all
// ready; what the function does that it returns is killed.
func Operation(t *testing.T, begin func(Inherited) func() error) {
	t.Helper()
	value, ok := os.LookupEnv(variable)
	if !ok {
		return
	}
	var told bequest
	if err := json.Unmarshal([]byte(value), &told); err != nil {
		t.Fatal(err)
	}
	link, err := fileConn(os.NewFile(linkFD, "link"))
	if err != nil {
		t.Fatal(err)
	}
	in := Inherited{Args: told.Args}
	for i := range told.Files {
		in.Files = append(in.Files, os.NewFile(uintptr(linkFD+1+i), "inherited")) //nolint:gosec // a few
	}
	do := begin(in)
	if err := trace(link); err != nil {
		t.Fatal(err)
	}
	outcome := "done"
	if err := do(); err != nil {
		outcome = err.Error()
	}
	if err := send(link, outcome, nil); err != nil {
		t.Fatal(err)
	}
	select {} // until the test kills it
}

// Kill runs the operation in another process and returns when it has been killed.
// It may be called once a round.
type Kill func(t *testing.T, args []string, files ...*os.File)

// EachStep calls round for each step of the operation, and once more with a kill
// after the last step. It fails if the operation has none.
func EachStep(t *testing.T, round func(t *testing.T, kill Kill)) {
	t.Helper()
	name, ended := t.Name(), false
	for n := 1; !ended; n++ {
		if n > maxSteps {
			t.Fatalf("the operation has not ended after %d steps", maxSteps)
		}
		ok := t.Run(fmt.Sprint(n), func(t *testing.T) {
			round(t, func(t *testing.T, args []string, files ...*os.File) {
				t.Helper()
				step, err := killAt(n, name, t.TempDir(), args, files)
				if err != nil {
					t.Fatal(err)
				}
				if ended = step == ""; ended {
					step = "nothing more"
				}
				t.Logf("killed before %s", step)
			})
		})
		if !ok {
			t.FailNow() // the next ones would say the same
		}
		if ended && n == 1 {
			t.Error("the operation has no steps")
		}
	}
}

// killAt kills the operation of a test before its n-th step, and says what that
// would have been: "" if there is none. Its temporary files go to scratch.
func killAt(n int, test, scratch string, args []string, files []*os.File) (step string, err error) {
	value, err := json.Marshal(bequest{args, len(files)})
	if err != nil {
		return "", fmt.Errorf("encoding arguments: %w", err)
	}
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("making a link: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "link")
	link, err := fileConn(os.NewFile(uintptr(pair[0]), "link"))
	if err != nil {
		return "", errors.Join(err, theirs.Close())
	}
	defer link.Close() //nolint:errcheck // all has been said
	var output bytes.Buffer
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+test+"$") //nolint:noctx // it is killed below
	cmd.Env = append(os.Environ(), variable+"="+string(value), "TMPDIR="+scratch)
	cmd.ExtraFiles = append([]*os.File{theirs}, files...)
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = errors.Join(cmd.Start(), theirs.Close())
	if err != nil {
		return "", fmt.Errorf("starting the operation: %w", err)
	}
	step, err = follow(link, n)
	_ = cmd.Process.Kill() // fails only if it is gone
	gone := make(chan error, 1)
	go func() { gone <- cmd.Wait() }()
	select {
	case <-gone: //nolint:errcheck // it was killed
	case <-time.After(patience):
		return "", fmt.Errorf("process %d does not die of SIGKILL", cmd.Process.Pid)
	}
	if err != nil {
		return "", fmt.Errorf("operation: %w\n%s", err, &output)
	}
	return step, nil
}

// fileConn takes a file over as a connection.
func fileConn(f *os.File) (*net.UnixConn, error) {
	conn, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("opening the link: %w", err)
	}
	return conn.(*net.UnixConn), nil
}
