// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
)

// Probe finds the best method that this machine offers, by building an image in
// dir and doing with it what containers need: reading a file through the mount,
// through overlayfs on it (with a whiteout), and through overlayfs on that,
// which is what `podman run -v dir:/x:O` and image builds make.
//
// Images of layers must lie on the file system of dir: EROFS reads some (tmpfs,
// overlayfs) only through loop devices.
//
// The device, if not "", is a file served the way devices of layers will be,
// of at least one block; otherwise a file in dir stands in for it. Probe works
// in a directory of dir that it clears before and after; one Probe may run in a
// dir at a time. The error says in one line what is missing and what to do.
func Probe(ctx context.Context, dir, device string, log *slog.Logger) (*Mounter, error) {
	m, err := probe(ctx, dir, device, log)
	if err != nil {
		return nil, fmt.Errorf("probing EROFS mounts: %w", err)
	}
	return m, nil
}

func probe(ctx context.Context, dir, device string, log *slog.Logger) (_ *Mounter, err error) {
	t := trial{dir: filepath.Join(dir, "mount-probe"), device: device}
	if err := t.clear(); err != nil { // of one that was killed
		return nil, err
	}
	defer func() { err = both(err, t.clear()) }()
	if err := t.build(ctx); err != nil {
		return nil, err
	}
	var failed []string
	for _, method := range []Method{File, Loop} {
		m := &Mounter{method: method, log: log, reason: "containers and overlays of containers work with it"}
		err := t.run(ctx, m)
		if err == nil {
			if len(failed) > 0 {
				m.reason += "; not " + strings.Join(failed, "; not ")
			}
			return m, nil
		}
		if errors.Is(err, ErrNoErofs) || errors.Is(err, ErrNotPermitted) || ctx.Err() != nil {
			return nil, err
		}
		log.Debug("a way to mount EROFS does not work", "method", string(method), "error", err)
		failed = append(failed, fmt.Sprintf("%s: %v", method, err))
	}
	return nil, errors.New("no method works: " + strings.Join(failed, "; "))
}

// trial is a probe of all methods with one image.
type trial struct {
	dir    string
	device string
	want   []byte // the first block of the device
}

func (t *trial) path(name string) string { return filepath.Join(t.dir, name) }

// mounts are the mount points of a trial, the topmost first.
func (t *trial) mounts() []string {
	return []string{t.path("overlay2"), t.path("overlay1"), t.path("layer")}
}

// build makes the image, the device if there is none, and the directories.
func (t *trial) build(ctx context.Context) error {
	for _, name := range t.mounts() {
		if err := os.MkdirAll(name, 0o700); err != nil {
			return err
		}
	}
	if t.device == "" {
		t.device = t.path("device")
		if err := os.WriteFile(t.device, bytes.Repeat([]byte("probe of a mount"), index.BlockSize/16), 0o600); err != nil {
			return err
		}
	}
	var err error
	if t.want, err = readBlock(ctx, t.device); err != nil {
		return fmt.Errorf("reading the device: %w", err)
	}
	image, err := os.Create(t.path("image"))
	if err != nil {
		return err
	}
	return errors.Join(erofs.Write(image, trialIndex(), "layer"), image.Close())
}

// trialIndex describes a layer that has a file of one block and hides x.
func trialIndex() *index.Index {
	at := time.Unix(0, 0)
	return &index.Index{
		Inodes: []index.Inode{
			{
				Mode: unix.S_IFDIR | 0o755, Nlink: 2, ModTime: at,
				Entries: []index.Dirent{{Name: "file", Inode: 1}, {Name: "x", Inode: 2}},
			},
			{Mode: unix.S_IFREG | 0o644, Nlink: 1, ModTime: at, Size: index.BlockSize},
			{Mode: unix.S_IFCHR, Nlink: 1, ModTime: at},
		},
		DeviceSize: index.BlockSize,
	}
}

// run does with one method what containers need.
func (t *trial) run(ctx context.Context, m *Mounter) (err error) {
	defer func() { err = both(err, t.unmount()) }()
	layer := t.path("layer")
	if err := m.mount(ctx, t.path("image"), t.device, layer); err != nil {
		return err
	}
	if err := Check(ctx, layer); err != nil {
		return err
	}
	if err := t.compare(ctx, filepath.Join(layer, "diff")); err != nil {
		return fmt.Errorf("reading a mount: %w", err)
	}
	if err := t.overlay("overlay1", filepath.Join(layer, "l/x")); err != nil {
		return fmt.Errorf("putting overlayfs on a mount: %w", err)
	}
	if err := t.compare(ctx, t.path("overlay1")); err != nil {
		return fmt.Errorf("reading overlayfs on a mount: %w", err)
	}
	if _, err := os.Lstat(t.path("overlay1/x")); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("overlayfs does not see a whiteout in a mount (lstat: %v)", err) //nolint:errorlint // nil, or of no use to callers
	}
	if err := t.overlay("overlay2", t.path("overlay1")); err != nil {
		return fmt.Errorf("putting overlayfs on overlayfs on a mount: %w", err)
	}
	if err := t.compare(ctx, t.path("overlay2")); err != nil {
		return fmt.Errorf("reading overlayfs on overlayfs on a mount: %w", err)
	}
	return nil
}

// overlay mounts overlayfs on lower and the image's l, which holds x. There is
// no upper directory and nothing else of dir below, because what overlayfs does
// with them depends on where they lie.
func (t *trial) overlay(at, lower string) error {
	escape := strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)
	options := "lowerdir=" + escape.Replace(lower) + ":" + escape.Replace(t.path("layer/l"))
	return unix.Mount("overlay", t.path(at), "overlay", unix.MS_RDONLY, options)
}

func (t *trial) compare(ctx context.Context, dir string) error {
	got, err := readBlock(ctx, filepath.Join(dir, "file"))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, t.want) {
		return fmt.Errorf("%s does not hold what the device holds", filepath.Join(dir, "file"))
	}
	return nil
}

// readBlock reads the first block of a file that user space may serve.
func readBlock(ctx context.Context, name string) ([]byte, error) {
	return await(ctx, func() ([]byte, error) {
		f, err := openUnpolled(name)
		if err != nil {
			return nil, err
		}
		defer closeFile(f)
		block := make([]byte, index.BlockSize)
		_, err = io.ReadFull(f, block)
		return block, err
	}, func([]byte) {})
}

// unmount ends whatever is mounted in the trial.
func (t *trial) unmount() error {
	for _, name := range t.mounts() {
		err := unix.Unmount(name, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		// EINVAL: nothing is mounted; EPERM: nothing can be.
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("unmounting %s: %w", name, err)
		}
	}
	return nil
}

func (t *trial) clear() error {
	if err := t.unmount(); err != nil {
		return err
	}
	if err := os.RemoveAll(t.dir); err != nil {
		return fmt.Errorf("clearing %s: %w", t.dir, err)
	}
	return nil
}

// both is errors.Join on one line.
func both(x, y error) error {
	if x == nil || y == nil {
		return errors.Join(x, y)
	}
	return fmt.Errorf("%w; %w", x, y)
}
