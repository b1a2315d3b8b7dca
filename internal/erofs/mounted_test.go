// SPDX-License-Identifier: Apache-2.0

package erofs_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/mount"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// writeImage writes the image of idx to a file.
func writeImage(t *testing.T, idx *index.Index) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // checked by reading it back
	if err := erofs.Write(f, idx, "layer"); err != nil {
		t.Fatal(err)
	}
	return name
}

// maxContent is the size of a file from which on its content is left a hole,
// and is not looked at.
const maxContent = 2 << 20

// content is what the file of that inode holds.
func content(inode int, size int64) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(inode), byte(inode >> 8), byte(inode >> 16)})
	_, _ = r.Read(b) // it does not fail
	return b
}

// writeDevice writes the file data of idx to a file; "" if there is none.
func writeDevice(t *testing.T, idx *index.Index) string {
	t.Helper()
	if idx.DeviceSize == 0 {
		return ""
	}
	name := filepath.Join(t.TempDir(), "device")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // checked by reading it back
	if err := f.Truncate(idx.DeviceSize); err != nil {
		t.Fatal(err)
	}
	for i, in := range idx.Inodes {
		if in.Mode&unix.S_IFMT == unix.S_IFREG && in.Size > 0 && in.Size <= maxContent {
			if _, err := f.WriteAt(content(i, in.Size), in.Offset); err != nil {
				t.Fatal(err)
			}
		}
	}
	return name
}

// mountAt mounts an image until the test ends.
func mountAt(t *testing.T, method mount.Method, image, device string) string {
	t.Helper()
	target := t.TempDir()
	m := mount.New(method, slog.New(slog.DiscardHandler))
	if err := m.Mount(context.Background(), image, device, target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.Unmount(target, false); err != nil {
			t.Error(err)
		}
	})
	return target
}

// forEachMethod mounts the image of idx by each method and hands out the place.
func forEachMethod(t *testing.T, idx *index.Index, f func(t *testing.T, target string)) {
	t.Helper()
	image, device := writeImage(t, idx), writeDevice(t, idx)
	for _, method := range []mount.Method{mount.File, mount.Loop} {
		t.Run(string(method), func(t *testing.T) { f(t, mountAt(t, method, image, device)) })
	}
}

// compareMount compares every observable of a mounted tree with the index.
func compareMount(t *testing.T, idx *index.Index, target string) {
	t.Helper()
	for name, want := range map[string]string{
		"l/x": "../layer/diff", "layer": ".", "link": "../link", "lower": "../lower", "lower-layers": "../lower-layers",
	} {
		if got, err := os.Readlink(filepath.Join(target, name)); err != nil || got != want {
			t.Errorf("%s points to %q (%v)", name, got, err)
		}
	}
	c := comparer{t: t, idx: idx, numbers: map[int32]uint64{}}
	c.compare(0, filepath.Join(target, "diff"))
	seen := map[uint64]bool{}
	for _, n := range c.numbers {
		if seen[n] {
			t.Errorf("inode number %d is used twice", n)
		}
		seen[n] = true
	}
}

type comparer struct {
	t       *testing.T
	idx     *index.Index
	numbers map[int32]uint64
}

// facts are what stat, readlink and the like tell about a file.
type facts struct {
	Mode, UID, GID, Nlink uint32
	Size                  int64
	Seconds, Nanoseconds  int64
	Rdev                  uint64
	Target                string
	Xattrs                map[string]string
}

func (c *comparer) compare(inode int32, name string) {
	c.t.Helper()
	in := c.idx.Inodes[inode]
	got, number := observe(c.t, name)
	want := facts{
		Mode: in.Mode, UID: in.UID, GID: in.GID, Nlink: in.Nlink, Size: in.Size,
		Seconds: in.ModTime.Unix(), Nanoseconds: int64(in.ModTime.Nanosecond()),
		Target: in.Target, Xattrs: map[string]string{},
	}
	for _, x := range in.Xattrs {
		want.Xattrs[x.Name] = x.Value
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		want.Rdev = unix.Mkdev(in.Major, in.Minor)
	case unix.S_IFLNK:
		want.Size = int64(len(in.Target))
	case unix.S_IFDIR:
		got.Size = 0
	}
	if diff := cmp.Diff(want, got); diff != "" {
		c.t.Errorf("%.100s (-want +got):\n%.2000s", name, diff)
	}
	if old, ok := c.numbers[inode]; ok && old != number {
		c.t.Errorf("%.100s: hard link with inode number %d, want %d", name, number, old)
	}
	c.numbers[inode] = number
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		c.compareContent(inode, name)
	case unix.S_IFDIR:
		c.compareDirectory(in, name)
	}
}

func (c *comparer) compareContent(inode int32, name string) {
	c.t.Helper()
	size := c.idx.Inodes[inode].Size
	if size > maxContent {
		return
	}
	got, err := os.ReadFile(name)
	if err != nil {
		c.t.Error(err)
	}
	if !bytes.Equal(got, content(int(inode), size)) {
		c.t.Errorf("%.100s: content differs", name)
	}
}

func (c *comparer) compareDirectory(in index.Inode, name string) {
	c.t.Helper()
	entries, err := os.ReadDir(name)
	if err != nil {
		c.t.Error(err)
		return
	}
	got, want := []string{}, []string{}
	for _, e := range entries {
		got = append(got, fmt.Sprint(e.Name(), e.Type()))
	}
	for _, e := range in.Entries {
		want = append(want, fmt.Sprint(e.Name, fileMode(c.idx.Inodes[e.Inode].Mode).Type()))
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		c.t.Errorf("%.100s: entries (-want +got):\n%.2000s", name, diff)
		return
	}
	names := map[string]bool{".": true, "..": true}
	for _, e := range in.Entries {
		names[e.Name] = true
	}
	for _, e := range in.Entries {
		c.compare(e.Inode, filepath.Join(name, e.Name))
		for _, missing := range []string{e.Name[:len(e.Name)-1], e.Name[:len(e.Name)-1] + "\x01", e.Name + "\xff"} {
			if missing == "" || len(missing) > unix.NAME_MAX || names[missing] {
				continue
			}
			if _, err := os.Lstat(name + "/" + missing); !os.IsNotExist(err) {
				c.t.Errorf("%.100s/%q, which does not exist: %v", name, missing, err)
			}
		}
	}
}

func fileMode(mode uint32) os.FileMode {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return os.ModeDir
	case unix.S_IFLNK:
		return os.ModeSymlink
	case unix.S_IFCHR:
		return os.ModeDevice | os.ModeCharDevice
	case unix.S_IFBLK:
		return os.ModeDevice
	case unix.S_IFIFO:
		return os.ModeNamedPipe
	}
	return 0
}

func observe(t *testing.T, name string) (facts, uint64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		t.Error(&os.PathError{Op: "lstat", Path: name, Err: err})
		return facts{}, 0
	}
	f := facts{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint32(st.Nlink), Size: st.Size,
		Seconds: st.Mtim.Sec, Nanoseconds: st.Mtim.Nsec, Rdev: st.Rdev, Xattrs: map[string]string{},
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		f.Target, _ = os.Readlink(name)
	}
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(name, buf)
	if err != nil {
		t.Errorf("listing attributes of %s: %v", name, err)
		return f, st.Ino
	}
	for x := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if x == "" {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(name, x, value)
		if err != nil {
			t.Errorf("attribute %s of %s: %v", x, name, err)
			continue
		}
		f.Xattrs[x] = string(value[:n])
	}
	return f, st.Ino
}

// tree is a hand-made index.
type tree struct{ idx index.Index }

var someTime = time.Unix(1_700_000_000, 123_456_789)

func newTree() *tree {
	t := &tree{}
	t.idx.Inodes = []index.Inode{{Mode: unix.S_IFDIR | 0o751, UID: 7, GID: 8, Nlink: 2, ModTime: someTime}}
	return t
}

// add adds a file to a directory and returns its inode.
func (t *tree) add(dir int32, name string, in index.Inode) int32 {
	id := int32(len(t.idx.Inodes)) //nolint:gosec // small
	in.Nlink = 1
	if in.ModTime.IsZero() {
		in.ModTime = someTime
	}
	if in.Mode&unix.S_IFMT == unix.S_IFDIR {
		in.Nlink = 2
		t.idx.Inodes[dir].Nlink++
	}
	in.Offset = t.idx.DeviceSize
	t.idx.DeviceSize += (in.Size + index.BlockSize - 1) / index.BlockSize * index.BlockSize
	t.idx.Inodes = append(t.idx.Inodes, in)
	t.name(dir, name, id)
	return id
}

func (t *tree) link(dir int32, name string, inode int32) {
	t.idx.Inodes[inode].Nlink++
	t.name(dir, name, inode)
}

func (t *tree) name(dir int32, name string, inode int32) {
	d := &t.idx.Inodes[dir]
	d.Entries = append(d.Entries, index.Dirent{Name: name, Inode: inode})
}

func (t *tree) index() *index.Index {
	for i := range t.idx.Inodes {
		in := &t.idx.Inodes[i]
		slices.SortFunc(in.Entries, func(x, y index.Dirent) int { return strings.Compare(x.Name, y.Name) })
	}
	return &t.idx
}

func xattrs(m map[string]string) []index.Xattr {
	var all []index.Xattr
	for _, name := range slices.Sorted(maps.Keys(m)) {
		all = append(all, index.Xattr{Name: name, Value: m[name]})
	}
	return all
}
