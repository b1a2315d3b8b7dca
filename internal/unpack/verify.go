// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/stream"
)

// maxDifferences bounds what is told of a tree.
const maxDifferences = 20

// Verify puts the tar of a layer, of size bytes, together again from its tree and the
// tar-split, and returns its digest, which the caller compares with the diff ID, and
// how the tree differs from what the tar describes.
// The error is that one of them cannot be read, or that they do not fit each other.
func Verify(ctx context.Context, diff string, tarSplit io.Reader, size int64, keeps Features) (diffID digest.Digest, differences []string, err error) {
	pr, pw := io.Pipe()
	var g errgroup.Group
	g.Go(func() error {
		err := Join(diff, tarSplit, pw)
		pw.CloseWithError(err)
		return err
	})
	read, err := stream.ReadTree(ctx, pr, size, nowhere{}, nil)
	pr.CloseWithError(err) // ends the other if it still writes
	if joining := g.Wait(); err == nil {
		err = joining
	}
	if err != nil {
		return "", nil, fmt.Errorf("putting the tar of %s together: %w", diff, err)
	}
	c := &comparison{idx: read.Index, keeps: keeps, root: diff}
	if err := c.directory("", 0, false); err != nil && !errors.Is(err, errEnough) {
		return "", nil, fmt.Errorf("comparing %s with its tar: %w", diff, err)
	}
	return read.DiffID, c.differences, nil
}

// nowhere is a device whose content nobody wants.
type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

var errEnough = errors.New("there are more differences")

// comparison compares a tree with an index. Contents are not its business.
type comparison struct {
	idx         *index.Index
	keeps       Features
	root        string
	differences []string
}

func (c *comparison) differs(path, format string, args ...any) error {
	if len(c.differences) == maxDifferences {
		c.differences = append(c.differences, "and more")
		return errEnough
	}
	c.differences = append(c.differences, fmt.Sprintf("/%s: ", path)+fmt.Sprintf(format, args...))
	return nil
}

// directory compares a directory. Within one that hides what is below without a mark,
// there are whiteouts that the tar does not have.
func (c *comparison) directory(path string, n int32, hiding bool) error {
	inode := &c.idx.Inodes[n]
	hiding = hiding || !c.keeps.TrustedXattrs && slices.ContainsFunc(inode.Xattrs, func(x index.Xattr) bool { return x.Name == opaqueXattr })
	if path != "" || !c.idx.RootImplied {
		if err := c.attributes(path, inode); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(filepath.Join(c.root, path))
	if err != nil {
		return c.differs(path, "cannot be read: %v", err)
	}
	have := map[string]bool{}
	for _, e := range entries {
		have[e.Name()] = true
	}
	for _, e := range inode.Entries {
		at := filepath.Join(path, e.Name)
		if !have[e.Name] {
			if err := c.differs(at, "is missing"); err != nil {
				return err
			}
			continue
		}
		delete(have, e.Name)
		child := &c.idx.Inodes[e.Inode]
		if child.Mode&unix.S_IFMT == unix.S_IFDIR {
			err = c.directory(at, e.Inode, hiding)
		} else {
			err = c.attributes(at, child)
		}
		if err != nil {
			return err
		}
	}
	for name := range have {
		at := filepath.Join(path, name)
		if hiding && c.isWhiteout(at) {
			continue
		}
		if err := c.differs(at, "does not belong to the layer"); err != nil {
			return err
		}
	}
	return nil
}

func (c *comparison) isWhiteout(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(filepath.Join(c.root, path), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// attributes compares what is not a name or content.
func (c *comparison) attributes(path string, want *index.Inode) error {
	full := filepath.Join(c.root, path)
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return c.differs(path, "cannot be read: %v", err)
	}
	kind := want.Mode & unix.S_IFMT
	switch {
	case st.Mode&unix.S_IFMT != kind:
		return c.differs(path, "is of another type")
	case kind != unix.S_IFLNK && st.Mode != want.Mode:
		return c.differs(path, "has mode %o, not %o", st.Mode, want.Mode)
	case st.Uid != want.UID || st.Gid != want.GID:
		return c.differs(path, "belongs to %d:%d, not %d:%d", st.Uid, st.Gid, want.UID, want.GID)
	case kind == unix.S_IFREG && st.Size != want.Size:
		return c.differs(path, "has %d bytes, not %d", st.Size, want.Size)
	case kind != unix.S_IFDIR && uint32(st.Nlink) != want.Nlink: //nolint:gosec // its type depends on the architecture
		return c.differs(path, "has %d names, not %d", st.Nlink, want.Nlink)
	case (kind == unix.S_IFCHR || kind == unix.S_IFBLK) && st.Rdev != unix.Mkdev(want.Major, want.Minor):
		return c.differs(path, "is another device")
	case kind == unix.S_IFREG && st.Mtim.Nano() != want.ModTime.UnixNano():
		// The index has no times of whiteouts and of directories that are not described.
		return c.differs(path, "was changed at %d ns, not %d ns", st.Mtim.Nano(), want.ModTime.UnixNano())
	}
	if kind == unix.S_IFLNK {
		if target, err := os.Readlink(full); err != nil || target != want.Target {
			return c.differs(path, "leads to %q, not %q", target, want.Target)
		}
	}
	return c.xattrs(path, want)
}

func (c *comparison) xattrs(path string, want *index.Inode) error {
	full := filepath.Join(c.root, path)
	for _, x := range want.Xattrs {
		if !c.keeps.keeps(x.Name) {
			continue
		}
		got := make([]byte, len(x.Value)+1)
		n, err := unix.Lgetxattr(full, x.Name, got)
		if err != nil || string(got[:n]) != x.Value {
			if err := c.differs(path, "has not the attribute %s that it should have", x.Name); err != nil {
				return err
			}
		}
	}
	return c.extraCapability(path, want)
}

// extraCapability tells of a file capability that the layer does not have, which would
// give rights to whoever runs the file.
func (c *comparison) extraCapability(path string, want *index.Inode) error {
	const name = "security.capability"
	if slices.ContainsFunc(want.Xattrs, func(x index.Xattr) bool { return x.Name == name }) {
		return nil
	}
	if _, err := unix.Lgetxattr(filepath.Join(c.root, path), name, make([]byte, 64)); err == nil {
		return c.differs(path, "has file capabilities that it should not have")
	}
	return nil
}

// relative is the path in the tree of a name in a tar.
func relative(name string) string {
	path := strings.TrimPrefix(filepath.Clean("/"+name), "/")
	if path == "" {
		return "."
	}
	return path
}
