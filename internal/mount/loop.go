// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// loopAttempts bounds how often a free loop device may be snatched away by
// another process between finding and taking it.
const loopAttempts = 100

// newLoop puts a file behind a read-only loop device. The device is free again
// once neither the returned file nor a mount holds it: the kernel does that, so
// it holds for a process that is killed as well.
func newLoop(backing string, flags uint32) (*os.File, error) {
	file, err := openUnpolled(backing)
	if err != nil {
		return nil, err
	}
	defer closeFile(file)
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("this kernel has no loop devices: try 'modprobe loop': %w", err)
	}
	if err != nil {
		return nil, err
	}
	defer closeFile(control)
	for range loopAttempts {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("finding a free loop device: %w", err)
		}
		loop, err := os.Open(fmt.Sprintf("/dev/loop%d", n))
		if err != nil {
			return nil, fmt.Errorf("opening loop device: %w", err)
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{
			Fd:   uint32(file.Fd()), //nolint:gosec // a descriptor
			Info: unix.LoopInfo64{Flags: flags | unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR},
		})
		if err == nil {
			return loop, nil
		}
		closeFile(loop)
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("putting %s behind loop device %d: %w", backing, n, err)
		}
	}
	return nil, fmt.Errorf("taking a loop device for %s: %w", backing, unix.EBUSY)
}
