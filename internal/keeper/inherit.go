// SPDX-License-Identifier: Apache-2.0

package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The descriptors that a worker gets from its keeper.
const (
	deviceFD = 3 + iota // the FUSE mount's
	linkFD              // a stream to the keeper: "ready\n" there, end of file back
	filesFD             // the first of Config.Files
)

// ErrHandOver is why a worker's context ends when the next worker is to go on
// where it stops: nothing is to be undone.
var ErrHandOver = errors.New("another worker goes on")

// Inherited is what a worker has of its keeper.
type Inherited struct {
	Device *os.File   // the descriptor of the FUSE mount, to be adopted
	Files  []*os.File // Config.Files
	link   *os.File
}

// Inherit returns what the keeper has passed on, files of Config.Files among
// them. It fails in a process that no keeper has started.
func Inherit(files int) (*Inherited, error) {
	in := &Inherited{}
	for fd := deviceFD; fd < filesFD+files; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("taking over descriptor %d: a worker is started by `holdfast serve`: %w", fd, err)
		}
	}
	if err := unix.SetNonblock(linkFD, true); err != nil {
		return nil, fmt.Errorf("taking over the link to the keeper: %w", err)
	}
	in.Device = os.NewFile(deviceFD, "/dev/fuse")
	in.link = os.NewFile(linkFD, "link")
	for i := range files {
		in.Files = append(in.Files, os.NewFile(uintptr(filesFD+i), "inherited"))
	}
	// The program was started through a descriptor, whose number it is named for.
	if err := os.WriteFile("/proc/self/comm", []byte("holdfast"), 0); err != nil {
		return nil, fmt.Errorf("naming the process: %w", err)
	}
	return in, nil
}

// UntilHandOver returns a context that ends with the cause [ErrHandOver] when the
// keeper wants the worker to make room for another, or is gone itself. The link is
// read until it ends: call it once.
func (in *Inherited) UntilHandOver(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, in.link) // the keeper writes nothing
		cancel(ErrHandOver)
	}()
	return ctx, func() { cancel(nil) }
}

// Ready tells the keeper that the worker serves.
func (in *Inherited) Ready() error {
	if _, err := in.link.WriteString(readyLine); err != nil {
		return fmt.Errorf("telling the keeper that we are ready: %w", err)
	}
	return nil
}
