// SPDX-License-Identifier: Apache-2.0

package indextest

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.podman.io/storage/pkg/archive"
	"golang.org/x/sys/unix"
)

// extract returns the tree that a runtime's normal pull makes of a tar: by the code
// that it uses (go.podman.io/storage, drivers/overlay, applyDiff).
func extract(t testing.TB, plain []byte) Tree {
	t.Helper()
	defer unix.Umask(unix.Umask(0o022))
	dir := filepath.Join(t.TempDir(), "diff")
	if err := os.Mkdir(dir, 0o555); err != nil { //nolint:gosec // as drivers/overlay does
		t.Fatal(err)
	}
	err := archive.Unpack(bytes.NewReader(plain), dir, &archive.TarOptions{WhiteoutFormat: archive.OverlayWhiteoutFormat})
	if err != nil {
		t.Fatalf("extracting as a normal pull does: %v", err)
	}
	return walk(t, dir)
}

// walk returns the tree in a directory.
func walk(t testing.TB, dir string) Tree {
	t.Helper()
	tree := Tree{}
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(p, dir), "/")
		f, inode := stat(t, p)
		if f.Nlink > 1 {
			if _, ok := first[inode]; !ok {
				first[inode] = name
			}
			f.SameAs = first[inode]
		}
		tree[name] = f
		return nil
	})
	if err != nil {
		t.Fatalf("walking %s: %v", dir, err)
	}
	return tree
}

func stat(t testing.TB, p string) (File, uint64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		t.Fatalf("stat %s: %v", p, err)
	}
	f := File{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint32(st.Nlink), //nolint:gosec // a small number
		ModTime: time.Unix(st.Mtim.Unix()), Xattrs: xattrs(t, p),
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		f.Nlink = 0
	case unix.S_IFREG:
		var content []byte
		if content, err = os.ReadFile(p); err == nil {
			f.Size, f.Content = st.Size, sum(content)
		}
	case unix.S_IFLNK:
		f.Target, err = os.Readlink(p)
	case unix.S_IFCHR, unix.S_IFBLK:
		f.Major, f.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	if err != nil {
		t.Fatalf("reading %s: %v", p, err)
	}
	return f, st.Ino
}

func xattrs(t testing.TB, p string) map[string]string {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		t.Fatalf("listing attributes of %s: %v", p, err)
	}
	var out map[string]string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name == "" || name == "security.selinux" { // the host's policy gives that one
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			t.Fatalf("attribute %s of %s: %v", name, p, err)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = string(value[:n])
	}
	return out
}
