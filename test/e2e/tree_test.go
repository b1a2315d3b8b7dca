// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// file is all that a process can see of a file. The count of a directory's links
// depends on the file system and is 0.
type file struct {
	mode, uid, gid uint32
	nlink          uint64
	rdev           uint64
	size           int64
	modTime        time.Time
	target         string
	xattrs         string // sorted
	content        string // sha256
	sameAs         string // the first name of a file that has several
}

// tree is a file tree by path; its root is "".
type tree map[string]file

// readTree reads all of a tree, file contents included.
func readTree(t *testing.T, dir string) tree {
	t.Helper()
	all := tree{}
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f, inode, err := readFile(p)
		if err != nil {
			return fmt.Errorf("reading %s: %w", p, err)
		}
		name := strings.TrimPrefix(strings.TrimPrefix(p, dir), "/")
		if f.nlink > 1 {
			if _, ok := first[inode]; !ok {
				first[inode] = name
			}
			f.sameAs = first[inode]
		}
		all[name] = f
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func readFile(p string) (f file, inode uint64, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return f, 0, err
	}
	f = file{mode: st.Mode, uid: st.Uid, gid: st.Gid, nlink: st.Nlink, modTime: time.Unix(st.Mtim.Unix()).UTC()}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		f.nlink = 0
	case unix.S_IFREG:
		f.size = st.Size
		f.content, err = hash(p)
	case unix.S_IFLNK:
		f.size = st.Size
		f.target, err = os.Readlink(p)
	default:
		f.rdev = st.Rdev
	}
	if err == nil {
		f.xattrs, err = readXattrs(p)
	}
	return f, st.Ino, err
}

func hash(p string) (string, error) {
	f, err := os.Open(p)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // read only
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func readXattrs(p string) (string, error) {
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		return "", fmt.Errorf("listing attributes: %w", err)
	}
	var all []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name == "" || name == "security.selinux" { // the host's policy gives that one
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			return "", fmt.Errorf("attribute %s: %w", name, err)
		}
		all = append(all, fmt.Sprintf("%s=%q", name, value[:n]))
	}
	slices.Sort(all)
	return strings.Join(all, " "), nil
}

// adjust changes what two trees are compared by.
type adjust func(name string, f *file)

// undescribed takes the times of directories and whiteouts that no layer
// describes out of the comparison: a normal pull gives them the time of the pull.
func undescribed(described map[string]bool) adjust {
	return func(name string, f *file) {
		kind := f.mode & unix.S_IFMT
		whiteout := kind == unix.S_IFCHR && f.rdev == 0
		if (whiteout || kind == unix.S_IFDIR) && !described[name] {
			f.modTime = time.Time{}
		}
	}
}

// wholeSeconds compares times as the tables of contents have them that
// stargz-snapshotter writes: its layers hold finer ones, which only a reader of
// the whole layer sees.
func wholeSeconds(_ string, f *file) { f.modTime = f.modTime.Round(time.Second) }

// describedBy returns the names that a tar describes.
func describedBy(t *testing.T, r io.Reader) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		if err != nil {
			t.Fatalf("reading tar: %v", err)
		}
		names[strings.TrimPrefix(path.Clean("/"+h.Name), "/")] = true
	}
}

// compareTrees reports how a tree differs from the one of a normal pull.
func compareTrees(t *testing.T, want, got tree, adjusts ...adjust) {
	t.Helper()
	names := map[string]bool{}
	for name := range want {
		names[name] = true
	}
	for name := range got {
		names[name] = true
	}
	var differ []string
	for name := range names {
		w, inWant := want[name]
		g, inGot := got[name]
		for _, a := range adjusts {
			a(name, &w)
			a(name, &g)
		}
		if inWant != inGot || w != g {
			differ = append(differ, fmt.Sprintf("%q\n  normal %v %+v\n  lazy   %v %+v", name, inWant, w, inGot, g))
		}
	}
	if len(differ) == 0 {
		return
	}
	slices.Sort(differ)
	const most = 20
	t.Errorf("%d of %d files differ from a normal pull's:\n%s", len(differ), len(want), strings.Join(differ[:min(most, len(differ))], "\n"))
}
