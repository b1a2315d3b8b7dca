// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
)

// ErrNotKept means that a file system would not keep something that a layer has.
var ErrNotKept = errors.New("this file system would lose it; put the store on another one, such as ext4 or XFS")

const (
	opaqueXattr   = "trusted.overlay.opaque"
	trustedPrefix = "trusted."
)

// tree is a layer's tree that is being made.
type tree struct {
	idx        *index.Index
	files      *files
	keeps      Features
	made       map[int32]string // first names of what may have several
	uids, gids map[uint32]bool
	opaque     []string
}

// make makes the tree in an empty directory.
func (t *tree) make(root string) error { return t.directory(root, "", 0) }

// directory fills a directory. Its own attributes come last: filling it changes its
// times.
func (t *tree) directory(root, path string, n int32) error {
	d := &t.idx.Inodes[n]
	for _, e := range d.Entries {
		if err := t.entry(root, filepath.Join(path, e.Name), e.Inode); err != nil {
			return fmt.Errorf("making %q: %w", filepath.Join(path, e.Name), err)
		}
	}
	return t.attributes(root, path, d)
}

func (t *tree) entry(root, path string, n int32) error {
	inode := &t.idx.Inodes[n]
	full := filepath.Join(root, path)
	if inode.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := os.Mkdir(full, 0o700); err != nil {
			return err
		}
		return t.directory(root, path, n)
	}
	if first, ok := t.made[n]; ok {
		return os.Link(first, full)
	}
	if err := t.node(full, inode); err != nil {
		return err
	}
	if inode.Nlink > 1 {
		t.made[n] = full
	}
	return t.attributes(root, path, inode)
}

// node makes what is not a directory.
func (t *tree) node(full string, inode *index.Inode) error {
	switch kind := inode.Mode & unix.S_IFMT; {
	case kind == unix.S_IFREG && inode.Size > 0:
		return t.files.take(inode.Offset, full)
	case kind == unix.S_IFREG:
		f, err := os.OpenFile(full, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		return f.Close()
	case kind == unix.S_IFLNK:
		return os.Symlink(inode.Target, full)
	default:
		return unix.Mknod(full, kind|0o600, int(unix.Mkdev(inode.Major, inode.Minor))) //nolint:gosec // devices have 32 bits
	}
}

// attributes sets owner, extended attributes, mode and time, in an order in which none
// undoes another.
func (t *tree) attributes(root, path string, inode *index.Inode) error {
	full := filepath.Join(root, path)
	t.uids[inode.UID], t.gids[inode.GID] = true, true
	if err := os.Lchown(full, int(inode.UID), int(inode.GID)); err != nil {
		return err
	}
	for _, x := range inode.Xattrs {
		switch {
		case x.Name == opaqueXattr && !t.keeps.TrustedXattrs:
			t.opaque = append(t.opaque, path)
			continue
		case !t.keeps.keeps(x.Name):
			return fmt.Errorf("it has the attribute %s: %w", x.Name, ErrNotKept)
		}
		if err := unix.Lsetxattr(full, x.Name, []byte(x.Value), 0); err != nil {
			return fmt.Errorf("setting attribute %s: %w", x.Name, err)
		}
	}
	isLink := inode.Mode&unix.S_IFMT == unix.S_IFLNK
	if !isLink {
		if err := unix.Chmod(full, inode.Mode&0o7777); err != nil {
			return err
		}
	}
	when, err := unix.TimeToTimespec(inode.ModTime)
	if err != nil {
		return fmt.Errorf("setting its time: %w", err)
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, full, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW)
}

// InheritRoot gives a layer's tree that does not describe its root directory the mode
// and the owner of the one below, as extraction does.
func InheritRoot(diff, below string) error {
	var st unix.Stat_t
	if err := unix.Stat(below, &st); err != nil {
		return fmt.Errorf("reading attributes of %s: %w", below, err)
	}
	if err := os.Lchown(diff, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return unix.Chmod(diff, st.Mode&0o7777)
}

// HideBelow makes opaque directories hide what is in the layers below, nearest first,
// where the file system cannot mark them: every name that is there and not in the
// directory itself becomes a whiteout, and so on in the directories that both have. A
// layer that is found by its chain has always the same ones below it.
func HideBelow(diff string, opaque, below []string) error {
	for _, path := range opaque {
		if err := hide(diff, path, below); err != nil {
			return fmt.Errorf("hiding what is below %q: %w", path, err)
		}
	}
	return nil
}

func hide(diff, path string, below []string) error {
	names, err := namesBelow(path, below)
	if err != nil || len(names) == 0 {
		return err
	}
	dir := filepath.Join(diff, path)
	var before unix.Stat_t
	if err := unix.Stat(dir, &before); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		var st unix.Stat_t
		switch err := unix.Lstat(filepath.Join(dir, name), &st); {
		case errors.Is(err, unix.ENOENT):
			if err := unix.Mknod(filepath.Join(dir, name), unix.S_IFCHR, 0); err != nil {
				return err
			}
		case err != nil:
			return err
		case st.Mode&unix.S_IFMT == unix.S_IFDIR && names[name]:
			if err := hide(diff, filepath.Join(path, name), below); err != nil {
				return err
			}
		}
	}
	when := []unix.Timespec{before.Mtim, before.Mtim}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dir, when, 0)
}

// namesBelow are the names that the layers below have in a directory, without
// following links, and whether one of them is a directory. It does not matter if a
// layer hides some of those below it.
func namesBelow(path string, below []string) (map[string]bool, error) {
	names := map[string]bool{}
	for _, b := range below {
		root, err := os.OpenRoot(b)
		if err != nil {
			return nil, err
		}
		err = addNames(root, path, names)
		if err := errors.Join(err, root.Close()); err != nil {
			return nil, err
		}
	}
	return names, nil
}

func addNames(root *os.Root, path string, names map[string]bool) error {
	// A link in the way means that there is no such directory in this layer.
	at := "."
	for part := range strings.SplitSeq(filepath.Clean("/" + path)[1:], "/") {
		if part == "" {
			break
		}
		at = filepath.Join(at, part)
		info, err := root.Lstat(at)
		if errors.Is(err, os.ErrNotExist) || err == nil && !info.IsDir() {
			return nil
		}
		if err != nil {
			return err
		}
	}
	d, err := root.Open(at)
	if err != nil {
		return err
	}
	entries, err := d.ReadDir(-1)
	for _, e := range entries {
		names[e.Name()] = names[e.Name()] || e.IsDir()
	}
	return errors.Join(err, d.Close())
}

func sorted(set map[uint32]bool) []uint32 { return slices.Sorted(maps.Keys(set)) }
