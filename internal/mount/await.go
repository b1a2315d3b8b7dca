// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

// await runs f and returns its result, or the context's error if that comes
// first. A system call that hangs in the kernel cannot be ended from outside, so
// f is then left to itself; should it succeed after all, discard gets the value.
func await[T any](ctx context.Context, f func() (T, error), discard func(T)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	if err := ctx.Err(); err != nil {
		return none, err
	}
	done := make(chan result) // unbuffered: a result has exactly one owner
	go func() {
		value, err := f()
		select {
		case done <- result{value, err}:
		case <-ctx.Done():
			if err == nil {
				discard(value)
			}
		}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, ctx.Err()
	}
}

// closeFile closes a file whose closing cannot lose anything.
func closeFile(f *os.File) { _ = f.Close() }

// openUnpolled opens a file for reading without the runtime's poller. A file of
// a FUSE server in this very process must not be added to that: the kernel may
// ask the server if it can be polled while the runtime waits for the answer.
func openUnpolled(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
