// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Features is what a file system keeps of a layer's tree, besides what every one has
// to keep.
type Features struct {
	// TrustedXattrs are how overlayfs marks directories that hide those below.
	TrustedXattrs bool `json:"trustedXattrs"`
	// SecurityXattrs are file capabilities, above all.
	SecurityXattrs bool `json:"securityXattrs"`
	UserXattrs     bool `json:"userXattrs"`
}

func (f Features) keeps(xattr string) bool {
	switch {
	case strings.HasPrefix(xattr, trustedPrefix):
		return f.TrustedXattrs
	case strings.HasPrefix(xattr, "security."):
		return f.SecurityXattrs
	case strings.HasPrefix(xattr, "user."):
		return f.UserXattrs
	}
	return true // whoever sets it will see
}

// String names what is lost.
func (f Features) String() string {
	var lost []string
	for _, x := range []struct {
		kept bool
		what string
	}{
		{f.TrustedXattrs, "trusted extended attributes (directories that replace others are written as lists of what they hide)"},
		{f.SecurityXattrs, "file capabilities (images that have them are refused)"},
		{f.UserXattrs, "user extended attributes (images that have them are refused)"},
	} {
		if !x.kept {
			lost = append(lost, x.what)
		}
	}
	if lost == nil {
		return "everything"
	}
	return "all but " + strings.Join(lost, ", ")
}

// probe is a try of something that every file system must keep.
type probe struct {
	what string // that it cannot do
	try  func(dir string) error
}

// Probe finds out by trying what the file system of a directory keeps. The error names
// everything that a layer's tree needs and that it does not have.
func Probe(ctx context.Context, dir string) (_ Features, err error) {
	tmp, err := os.MkdirTemp(dir, ".probe-")
	if err != nil {
		return Features{}, fmt.Errorf("writing to %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	var lacking []string
	for i, p := range probes() {
		if ctx.Err() != nil {
			return Features{}, context.Cause(ctx)
		}
		d := filepath.Join(tmp, fmt.Sprint(i))
		if err := os.Mkdir(d, 0o700); err != nil {
			return Features{}, err
		}
		if err := p.try(d); err != nil {
			lacking = append(lacking, fmt.Sprintf("%s (%v)", p.what, err))
		}
	}
	if lacking != nil {
		return Features{}, fmt.Errorf("the file system of %s cannot hold an image store: it has no %s. Use ext4, XFS or NFS (exported with no_root_squash), or keep images there as a bundle", dir, strings.Join(lacking, "; no "))
	}
	f := Features{SecurityXattrs: keepsXattr(tmp, "security.capability", capability), UserXattrs: keepsXattr(tmp, "user.holdfast", "x")}
	f.TrustedXattrs, err = probeOverlay(tmp)
	return f, err
}

// capability is cap_net_raw=ep, as vfs_cap_data of revision 2 has it: linux/capability.h.
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

var errNotKept = errors.New("it is not kept")

// file makes an empty file.
func file(name string) error { return os.WriteFile(name, nil, 0o600) }

func probes() []probe {
	in := filepath.Join
	return []probe{
		{"owners that can be chosen; are you root?", func(d string) error {
			err := errors.Join(file(in(d, "f")), os.Lchown(in(d, "f"), 12345, 54321))
			var st unix.Stat_t
			if err = errors.Join(err, unix.Lstat(in(d, "f"), &st)); err == nil && (st.Uid != 12345 || st.Gid != 54321) {
				err = errNotKept
			}
			return err
		}},
		{"permissions", func(d string) error {
			err := errors.Join(file(in(d, "f")), unix.Chmod(in(d, "f"), 0o4751))
			var st unix.Stat_t
			if err = errors.Join(err, unix.Lstat(in(d, "f"), &st)); err == nil && st.Mode&0o7777 != 0o4751 {
				err = errNotKept
			}
			return err
		}},
		{"symbolic links", func(d string) error { return os.Symlink("target", in(d, "l")) }},
		{"hard links", func(d string) error { return errors.Join(file(in(d, "f")), os.Link(in(d, "f"), in(d, "l"))) }},
		{"names that differ by case", func(d string) error {
			err := file(in(d, "name"))
			if _, there := os.Lstat(in(d, "NAME")); err == nil && there == nil {
				err = errNotKept
			}
			return err
		}},
		{"names of 255 bytes", func(d string) error { return file(in(d, strings.Repeat("n", 255))) }},
		{"devices, which whiteouts are", func(d string) error { return unix.Mknod(in(d, "w"), unix.S_IFCHR, 0) }},
		{"pipes", func(d string) error { return unix.Mknod(in(d, "p"), unix.S_IFIFO|0o600, 0) }},
		{"exact times", func(d string) error {
			want := time.Unix(1_000_000_001, 123_456_000)
			err := errors.Join(file(in(d, "f")), os.Chtimes(in(d, "f"), want, want))
			info, serr := os.Stat(in(d, "f"))
			if err = errors.Join(err, serr); err == nil && !info.ModTime().Equal(want) {
				err = errNotKept
			}
			return err
		}},
		{"renaming over another file", func(d string) error {
			return errors.Join(file(in(d, "a")), file(in(d, "b")), os.Rename(in(d, "a"), in(d, "b")))
		}},
		{"locks (fcntl); on NFS 3 the server needs lockd", func(d string) error {
			f, err := os.Create(in(d, "f"))
			if err != nil {
				return err
			}
			lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
			return errors.Join(unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock), f.Sync(), f.Close())
		}},
	}
}

// keepsXattr reports whether an extended attribute of a file can be set, and read.
func keepsXattr(dir, name, value string) bool {
	f, err := os.CreateTemp(dir, "xattr-")
	if err != nil {
		return false
	}
	got := make([]byte, len(value)+1)
	n, err := 0, unix.Fsetxattr(int(f.Fd()), name, []byte(value), 0)
	if err == nil {
		n, err = unix.Fgetxattr(int(f.Fd()), name, got)
	}
	return errors.Join(err, f.Close()) == nil && string(got[:n]) == value
}

// probeOverlay mounts two directories on each other, and reports whether marks of
// opaque directories work. That whiteouts do not is an error.
func probeOverlay(dir string) (opaque bool, err error) {
	upper, lower, at := filepath.Join(dir, "upper"), filepath.Join(dir, "lower"), filepath.Join(dir, "merged")
	for _, d := range []string{upper, lower, at, filepath.Join(upper, "d"), filepath.Join(lower, "d")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return false, err
		}
	}
	err = errors.Join(file(filepath.Join(lower, "d", "f")), file(filepath.Join(lower, "f")), unix.Mknod(filepath.Join(upper, "f"), unix.S_IFCHR, 0))
	if err != nil {
		return false, err
	}
	marked := unix.Setxattr(filepath.Join(upper, "d"), opaqueXattr, []byte("y"), 0) == nil
	options := "lowerdir=" + strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`).Replace(upper) + ":" + strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`).Replace(lower)
	if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, options); err != nil {
		return false, fmt.Errorf("overlayfs does not take the file system of %s for its layers (%w): use ext4, XFS or NFS", dir, err)
	}
	_, hidden := os.Lstat(filepath.Join(at, "f"))
	_, replaced := os.Lstat(filepath.Join(at, "d", "f"))
	if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
		return false, err
	}
	if !errors.Is(hidden, os.ErrNotExist) {
		return false, fmt.Errorf("overlayfs does not understand whiteouts on the file system of %s: use ext4, XFS or NFS", dir)
	}
	return marked && errors.Is(replaced, os.ErrNotExist), nil
}
