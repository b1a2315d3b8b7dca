// SPDX-License-Identifier: Apache-2.0

// Package mount mounts the EROFS images of layers, with the layers' devices as
// the place their file data is read from.
//
// It knows two methods: the kernel opens image and device as files (Linux 6.12
// and newer, if so configured), or both are put behind loop devices. Which of
// them serves containers is found out by [Probe], by doing it, never guessed
// from a version. The package does not make images (package erofs) nor serve
// devices (package fusedev), and keeps no list of mounts: the kernel has it.
//
// A mount appears at its target complete or not at all. What fails leaves
// neither mount nor loop device behind. A device is served by user space, so
// any call that may touch one runs in a goroutine of its own, is left when its
// context ends, and undoes itself should the kernel ever return from it.
package mount

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
)

// Method is a way to give the kernel an image and its device.
type Method string

// The methods, best first.
const (
	File Method = "file" // the kernel opens them as files
	Loop Method = "loop" // they are put behind loop devices
)

// Errors that hold for every method.
var (
	// ErrNoErofs means that the kernel does not know EROFS.
	ErrNoErofs = errors.New("this kernel has no EROFS: try 'modprobe erofs', or install the package with its module")
	// ErrNotPermitted means that the process must not mount.
	ErrNotPermitted = errors.New("mounting is not permitted: run as root of the host, with CAP_SYS_ADMIN")
)

// Mounter mounts images by one method. It is safe for concurrent use once its
// fields are set.
type Mounter struct {
	// ReadAheadKB is how far the kernel reads ahead in the files of a mount, in
	// KiB; 0 leaves the kernel's default.
	ReadAheadKB int
	// Label is the SELinux label of all files in a mount; "" leaves that to the policy.
	Label string

	method Method
	reason string
	log    *slog.Logger
}

// New returns a Mounter that uses a method without asking if it works.
func New(method Method, log *slog.Logger) *Mounter {
	return &Mounter{method: method, reason: "as configured", log: log}
}

// Method is how the Mounter mounts.
func (m *Mounter) Method() Method { return m.method }

// String says which method is used and why, for people.
func (m *Mounter) String() string { return fmt.Sprintf("%s (%s)", m.method, m.reason) }

// Mount mounts an image at target, a directory that exists. The device holds
// the image's file data; it is "" if the image needs none. Neither name may be longer
// than 255 bytes. The mount is read-only; setuid and device files work in it,
// so who may not have them must not reach it.
//
// The kernel opens the device before Mount returns. If that takes longer than
// ctx allows, Mount returns the context's error and nothing will be mounted.
// The error is unix.EBUSY if an image is mounted at target already.
func (m *Mounter) Mount(ctx context.Context, image, device, target string) error {
	if err := m.mount(ctx, image, device, target); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", image, target, err)
	}
	return nil
}

func (m *Mounter) mount(ctx context.Context, image, device, target string) error {
	mounted, err := Mounted(target)
	if err != nil {
		return err
	}
	if mounted {
		return fmt.Errorf("there is a mount already: %w", unix.EBUSY)
	}
	detached, err := await(ctx, func() (*os.File, error) { return m.create(image, device) }, closeFile)
	if err != nil {
		return err
	}
	defer closeFile(detached) // ends a mount that was not moved to its place
	err = unix.MoveMount(int(detached.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("moving the mount to its place: %w", err)
	}
	return nil
}

// create makes a mount that is nowhere in the tree yet. It lasts as long as the
// file it returns, unless it is moved into the tree.
func (m *Mounter) create(image, device string) (*os.File, error) {
	if err := checkDevice(image, device); err != nil {
		return nil, err
	}
	if m.method == Loop {
		behind, err := newLoop(image, 0)
		if err != nil {
			return nil, err
		}
		defer closeFile(behind) // from then on only the mount holds it
		image = behind.Name()
		if device != "" {
			// Without direct I/O each page of data would be cached twice.
			behind, err := newLoop(device, unix.LO_FLAGS_DIRECT_IO)
			if err != nil {
				return nil, err
			}
			defer closeFile(behind)
			device = behind.Name()
		}
	}
	before := erofsBDIs()
	detached, err := createMount(image, device, m.Label)
	if err != nil {
		return nil, err
	}
	if err := m.setReadAhead(detached, before); err != nil {
		m.log.Warn("cannot set read-ahead of a mount", "image", image, "error", err)
	}
	return detached, nil
}

// checkDevice refuses what the kernel would take, only to read wrong bytes or
// none later: see [erofs.Device].
func checkDevice(image, device string) error {
	f, err := os.Open(image)
	if err != nil {
		return err
	}
	defer closeFile(f)
	_, want, err := erofs.Device(f)
	if err != nil {
		return err
	}
	if device == "" {
		if want > 0 {
			return fmt.Errorf("the image needs a device of %d bytes: %w", want, unix.EINVAL)
		}
		return nil
	}
	info, err := os.Stat(device)
	if err != nil {
		return fmt.Errorf("finding device: %w", err)
	}
	if info.Size() < want {
		return fmt.Errorf("device %s has %d bytes, the image needs %d: %w", device, info.Size(), want, unix.EINVAL)
	}
	return nil
}

func createMount(image, device, label string) (*os.File, error) {
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENODEV):
		return nil, ErrNoErofs
	case errors.Is(err, unix.EPERM):
		return nil, ErrNotPermitted
	case err != nil:
		return nil, fmt.Errorf("fsopen: %w", err)
	}
	fs := os.NewFile(uintptr(fd), "fsopen")
	defer closeFile(fs)
	if err := unix.FsconfigSetString(fd, "source", image); err != nil {
		return nil, fmt.Errorf("setting source %s: %w", image, err)
	}
	if device != "" {
		if err := unix.FsconfigSetString(fd, "device", device); err != nil {
			return nil, fmt.Errorf("setting device %s: %w", device, err)
		}
	}
	if label != "" {
		if err := unix.FsconfigSetString(fd, "context", label); err != nil {
			return nil, fmt.Errorf("setting label %s: %w", label, err)
		}
	}
	if err := unix.FsconfigSetFlag(fd, "ro"); err != nil {
		return nil, fmt.Errorf("setting ro: %w", err)
	}
	switch err := unix.FsconfigCreate(fd); {
	case errors.Is(err, unix.ENOTBLK):
		return nil, fmt.Errorf("this kernel does not mount EROFS from files, or not of this file system: %w", err)
	case err != nil:
		return nil, fmt.Errorf("opening image with device %q: %w%s", device, err, kernelMessage(fd))
	}
	root, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOATIME)
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	return os.NewFile(uintptr(root), image), nil
}

// kernelMessage returns what the kernel has to say about a failed mount.
func kernelMessage(fd int) string {
	buf := make([]byte, 256)
	n, err := unix.Read(fd, buf)
	if err != nil || n <= 0 {
		return ""
	}
	return " (" + string(buf[:n]) + ")"
}

// Bind shows the directory of one mount at another place, too. [Unbind] ends it.
func Bind(source, target string) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s to %s: %w", source, target, err)
	}
	return nil
}

// Unbind ends whatever is mounted at target, at once for all who come later; if
// nothing is, or there is no target, it does nothing.
func Unbind(target string) error {
	for {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmounting %s: %w", target, err)
		}
	}
}

// Mounted reports whether an EROFS image is mounted at target. It does not
// touch the image's device.
func Mounted(target string) (bool, error) {
	fd, err := unix.Open(target, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("opening %s: %w", target, err)
	}
	defer unix.Close(fd) //nolint:errcheck // it was never read from
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return false, fmt.Errorf("statfs of %s: %w", target, err)
	}
	if fs.Type != unix.EROFS_SUPER_MAGIC_V1 {
		return false, nil
	}
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, 0, &st); err != nil {
		return false, fmt.Errorf("statx of %s: %w", target, err)
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// Check finds out whether a mount answers: it is there and has its layer's
// root. The error is the context's if it did not answer in time.
func Check(ctx context.Context, target string) error {
	_, err := await(ctx, func() (struct{}, error) {
		mounted, err := Mounted(target)
		if err != nil {
			return struct{}{}, err
		}
		if !mounted {
			return struct{}{}, fmt.Errorf("no image is mounted: %w", unix.ENOENT)
		}
		_, err = os.ReadDir(filepath.Join(target, "diff"))
		return struct{}{}, err
	}, func(struct{}) {})
	if err != nil {
		return fmt.Errorf("checking mount %s: %w", target, err)
	}
	return nil
}

// Unmount ends all mounts of images at target; if there is none, or no target,
// it does nothing. A mount in use is unix.EBUSY, unless lazy: then the name is
// gone at once and the mount as soon as its last user leaves.
func Unmount(target string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	for {
		mounted, err := Mounted(target)
		if err != nil {
			return fmt.Errorf("unmounting: %w", err)
		}
		if !mounted {
			return nil
		}
		// EINVAL means that someone else was quicker.
		if err := unix.Unmount(target, flags); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmounting %s: %w", target, err)
		}
	}
}
