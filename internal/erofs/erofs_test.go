// SPDX-License-Identifier: Apache-2.0

package erofs_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/mount"
)

// Values the kernel parses before it hands them out.
const (
	capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_raw+ep
	acl        = "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + // user::rwx
		"\x02\x00\x04\x00\xe8\x03\x00\x00" + // user:1000:r--
		"\x04\x00\x05\x00\xff\xff\xff\xff" + // group::r-x
		"\x10\x00\x05\x00\xff\xff\xff\xff" + // mask::r-x
		"\x20\x00\x00\x00\xff\xff\xff\xff" // other::---
)

// TestEverything has one of each kind of file and attribute.
func TestEverything(t *testing.T) {
	tr := newTree()
	for i, size := range []int64{0, 1, 4095, 4096, 4097, 8192, 8193, 1 << 20, 1<<20 + 1} {
		tr.add(0, fmt.Sprintf("file%d", i), index.Inode{Mode: unix.S_IFREG | 0o644, Size: size, UID: uint32(i)})
	}
	for i, mode := range []uint32{0, 0o777, unix.S_ISUID | 0o755, unix.S_ISGID | 0o755, unix.S_ISVTX | 0o777, 0o7777} {
		tr.add(0, fmt.Sprintf("mode%d", i), index.Inode{Mode: unix.S_IFREG | mode, Size: 5})
		tr.add(0, fmt.Sprintf("dir%d", i), index.Inode{Mode: unix.S_IFDIR | mode, GID: uint32(i)})
	}
	for i, at := range []time.Time{time.Unix(0, 0), time.Unix(0, 1), time.Unix(-1, 999_999_999), time.Unix(math.MaxInt32+1, 5), time.Unix(1<<34, 0), time.Unix(math.MaxUint32+1, 0)} {
		tr.add(0, fmt.Sprintf("time%d", i), index.Inode{Mode: unix.S_IFREG | 0o600, ModTime: at})
	}
	tr.add(0, "owner", index.Inode{Mode: unix.S_IFREG, UID: math.MaxUint32 - 1, GID: 1 << 20})
	for i, dev := range [][2]uint32{{0, 0}, {1, 3}, {8, 255}, {8, 256}, {0, 1<<20 - 1}, {1<<12 - 1, 0}, {1<<12 - 1, 1<<20 - 1}} {
		tr.add(0, fmt.Sprintf("chr%d", i), index.Inode{Mode: unix.S_IFCHR | 0o666, Major: dev[0], Minor: dev[1]})
		tr.add(0, fmt.Sprintf("blk%d", i), index.Inode{Mode: unix.S_IFBLK | 0o660, Major: dev[0], Minor: dev[1]})
	}
	tr.add(0, "fifo", index.Inode{Mode: unix.S_IFIFO | 0o600})
	deep := int32(0)
	for range 100 {
		deep = tr.add(deep, "d", index.Inode{Mode: unix.S_IFDIR | 0o755})
	}
	shared := tr.add(deep, "shared", index.Inode{Mode: unix.S_IFREG | 0o644, Size: 10_000})
	symlink := tr.add(0, "symlink", index.Inode{Mode: unix.S_IFLNK | 0o777, Target: "/a//b/../c\xff"})
	for i := range 5 {
		tr.link(0, fmt.Sprintf("shared%d", i), shared)
		tr.link(deep, fmt.Sprintf("symlink%d", i), symlink)
	}
	for _, name := range []string{"!", "-", "...", ".a", ".-", ".\x01", "..\xff", strings.Repeat("n", 255), "\xff\xfe", " ", "new\nline"} {
		tr.add(0, name, index.Inode{Mode: unix.S_IFREG | 0o644, Size: int64(len(name))})
	}
	idx := tr.index()
	forEachMethod(t, idx, func(t *testing.T, target string) { compareMount(t, idx, target) })
}

func TestXattrs(t *testing.T) {
	tr := newTree()
	tr.idx.Inodes[0].Xattrs = xattrs(map[string]string{"user.root": "yes", "trusted.overlay.opaque": "y"})
	file := func(name string, size int64, x map[string]string) {
		tr.add(0, name, index.Inode{Mode: unix.S_IFREG | 0o755, Size: size, Xattrs: xattrs(x)})
	}
	file("capability", 100, map[string]string{"security.capability": capability})
	file("acl", 0, map[string]string{"system.posix_acl_access": acl})
	file("all", 5000, map[string]string{
		"security.capability": capability, "system.posix_acl_access": acl, "security.selinux": "system_u:object_r:bin_t:s0\x00",
		"user.empty": "", "trusted.binary": "\x00\xff\x00", "user." + strings.Repeat("n", 250): strings.Repeat("v", 1000),
	})
	many := map[string]string{}
	for i := range 300 {
		many[fmt.Sprintf("user.n%d", i)] = strings.Repeat("v", i)
	}
	file("many", 1, many)
	for _, n := range []int{1, 2, 3, 4, 3990, 4000, 4032, 4096, 4097, 65535} {
		x := xattrs(map[string]string{"user.a": strings.Repeat("v", n), "user.b": "after"})
		suffix := fmt.Sprint(n)
		tr.add(0, "file"+suffix, index.Inode{Mode: unix.S_IFREG | 0o644, Size: int64(n), Xattrs: x})
		tr.add(0, "link"+suffix, index.Inode{Mode: unix.S_IFLNK | 0o777, Target: "target", Xattrs: xattrs(map[string]string{"trusted.a": strings.Repeat("v", n)})})
		dir := tr.add(0, "dir"+suffix, index.Inode{Mode: unix.S_IFDIR | 0o755, Xattrs: append(x, index.Xattr{Name: "user.c"})})
		tr.add(dir, "child", index.Inode{Mode: unix.S_IFREG | 0o644, Size: 3})
	}
	dir := tr.add(0, "default", index.Inode{Mode: unix.S_IFDIR | 0o755, Xattrs: xattrs(map[string]string{"system.posix_acl_default": acl})})
	tr.add(dir, "child", index.Inode{Mode: unix.S_IFIFO | 0o644, Xattrs: xattrs(map[string]string{"trusted.fifo": "1"})})
	idx := tr.index()
	forEachMethod(t, idx, func(t *testing.T, target string) { compareMount(t, idx, target) })
}

// TestSymlinkLengths crosses the lengths at which a target no longer fits into
// the block of its inode.
func TestSymlinkLengths(t *testing.T) {
	tr := newTree()
	for _, n := range []int{1, 31, 32, 33, 63, 64, 65, 255, 256, 2000, 2048, 4031, 4032, 4033, 4094, 4095} {
		for i := range 3 {
			tr.add(0, fmt.Sprintf("%d.%d", n, i), index.Inode{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", n)})
		}
	}
	idx := tr.index()
	forEachMethod(t, idx, func(t *testing.T, target string) { compareMount(t, idx, target) })
}

// TestDirectorySizes crosses the lengths at which a directory's last block
// fits with its inode, does not, or is full.
func TestDirectorySizes(t *testing.T) {
	tr := newTree()
	file := tr.add(0, "file", index.Inode{Mode: unix.S_IFREG | 0o644, Size: 1})
	fill := func(dir int32, n, length int) {
		for i := range n {
			tr.link(dir, fmt.Sprintf("%0*d", length, i), file)
		}
	}
	for _, n := range []int{0, 1, 2, 100, 10_000} {
		fill(tr.add(0, fmt.Sprintf("n%d", n), index.Inode{Mode: unix.S_IFDIR | 0o755}), n, 5)
	}
	fill(tr.add(0, "long", index.Inode{Mode: unix.S_IFDIR | 0o755}), 200, 255)
	// "." and ".." take 27 bytes, 20 names 200 each; one more name fills up.
	for blocks := range 3 {
		for _, used := range []int{4031, 4032, 4033, 4095, 4096} {
			dir := tr.add(0, fmt.Sprintf("b%d.%d", blocks, used), index.Inode{Mode: unix.S_IFDIR | 0o755})
			for b := range blocks {
				// Names sort after "." and fill whole blocks.
				rest := 4096
				if b == 0 {
					rest -= 27
				}
				for i := 0; rest > 0; i++ {
					n := min(rest, 200)
					if rest-n > 0 && rest-n < 20 {
						n -= 20
					}
					tr.link(dir, fmt.Sprintf("x%d-%02d", b, i)+strings.Repeat("x", n-12-5), file)
					rest -= n
				}
			}
			rest := used
			if blocks == 0 {
				rest -= 27
			}
			for i := 0; rest > 0; i++ {
				n := min(rest, 200)
				if rest-n > 0 && rest-n < 20 {
					n -= 20
				}
				tr.link(dir, fmt.Sprintf("z-%02d", i)+strings.Repeat("z", n-12-4), file)
				rest -= n
			}
		}
	}
	idx := tr.index()
	forEachMethod(t, idx, func(t *testing.T, target string) {
		compareMount(t, idx, target)
		for blocks := range 3 {
			for _, used := range []int{4031, 4032, 4033, 4095, 4096} {
				info, err := os.Stat(filepath.Join(target, "diff", fmt.Sprintf("b%d.%d", blocks, used)))
				if want := int64(blocks*4096 + used); err != nil || info.Size() != want {
					t.Errorf("directory of %d bytes, want %d (%v)", info.Size(), want, err)
				}
			}
		}
	})
}

// TestLargeFile reads where 32-bit arithmetic would go wrong.
func TestLargeFile(t *testing.T) {
	const size = 4<<40 - 5
	tr := newTree()
	tr.add(0, "small", index.Inode{Mode: unix.S_IFREG | 0o644, Size: 1})
	id := tr.add(0, "large", index.Inode{Mode: unix.S_IFREG | 0o644, Size: size})
	after := tr.add(0, "after", index.Inode{Mode: unix.S_IFREG | 0o644, Size: 5000})
	idx := tr.index()
	image, device := writeImage(t, idx), writeDevice(t, idx)
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // checked by reading it back
	places := []int64{0, 1<<31 - 3, 1<<32 - 3, 1<<32 + 2, 1<<40 - 3, size - 5}
	for i, at := range places {
		if _, err := f.WriteAt([]byte{'h', 'e', 'r', 'e', byte('0' + i)}, idx.Inodes[id].Offset+at); err != nil {
			t.Fatal(err)
		}
	}
	for _, method := range []mount.Method{mount.File, mount.Loop} {
		t.Run(string(method), func(t *testing.T) {
			target := mountAt(t, method, image, device)
			large, err := os.Open(filepath.Join(target, "diff/large"))
			if err != nil {
				t.Fatal(err)
			}
			defer large.Close() //nolint:errcheck // read only
			for i, at := range places {
				got := make([]byte, 5)
				if _, err := large.ReadAt(got, at); err != nil || string(got) != fmt.Sprintf("here%d", i) {
					t.Errorf("at %d: %q, %v", at, got, err)
				}
			}
			got, err := os.ReadFile(filepath.Join(target, "diff/after"))
			if err != nil || !bytes.Equal(got, content(int(after), 5000)) {
				t.Errorf("file after the large one differs (%v)", err)
			}
		})
	}
}

// TestOverlay hides and replaces names of a lower layer.
func TestOverlay(t *testing.T) {
	lower := newTree()
	for _, name := range []string{"keep", "hidden"} {
		lower.add(0, name, index.Inode{Mode: unix.S_IFREG | 0o644, Size: 6})
	}
	dir := lower.add(0, "opaque", index.Inode{Mode: unix.S_IFDIR | 0o755})
	lower.add(dir, "gone", index.Inode{Mode: unix.S_IFREG | 0o644})
	dir = lower.add(0, "merged", index.Inode{Mode: unix.S_IFDIR | 0o755})
	lower.add(dir, "below", index.Inode{Mode: unix.S_IFREG | 0o644})

	b := index.NewBuilder(0, index.DefaultLimits())
	for _, e := range []index.Entry{
		{Name: ".wh.hidden", Mode: unix.S_IFREG},
		{Name: "opaque/.wh..wh..opq", Mode: unix.S_IFREG},
		{Name: "opaque/new", Mode: unix.S_IFREG | 0o644},
		{Name: "merged/above", Mode: unix.S_IFREG | 0o644},
		{Name: "setuid", Mode: unix.S_IFREG | unix.S_ISUID | 0o755, Xattrs: map[string]string{"security.capability": capability}},
	} {
		if err := b.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	upper, err := b.Finish(index.Stream, index.Gzip)
	if err != nil {
		t.Fatal(err)
	}
	for _, method := range []mount.Method{mount.File, mount.Loop} {
		t.Run(string(method), func(t *testing.T) {
			low := mountAt(t, method, writeImage(t, lower.index()), writeDevice(t, lower.index()))
			up := mountAt(t, method, writeImage(t, upper), "")
			dir, target := t.TempDir(), t.TempDir()
			for _, name := range []string{"upper", "work"} {
				if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			options := fmt.Sprintf("lowerdir=%s/l/x:%s/l/x,upperdir=%s/upper,workdir=%s/work", up, low, dir, dir)
			if err := unix.Mount("overlay", target, "overlay", 0, options); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(target, 0); err != nil {
					t.Error(err)
				}
			})
			var got []string
			err := filepath.WalkDir(target, func(name string, _ os.DirEntry, err error) error {
				got = append(got, strings.TrimPrefix(name, target))
				return err
			})
			if err != nil {
				t.Error(err)
			}
			if want := " /keep /merged /merged/above /merged/below /opaque /opaque/new /setuid"; strings.Join(got, " ") != want {
				t.Errorf("got %q, want %q", strings.Join(got, " "), want)
			}
			f, _ := observe(t, filepath.Join(target, "setuid"))
			if f.Mode != unix.S_IFREG|unix.S_ISUID|0o755 || f.Xattrs["security.capability"] != capability {
				t.Errorf("setuid file has %+v", f)
			}
			if err := os.WriteFile(filepath.Join(target, "keep"), []byte("copied up"), 0o600); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDeterministic(t *testing.T) {
	build := func(digest byte) []byte {
		tr := newTree()
		for i := range 1000 {
			tr.add(0, fmt.Sprint(i), index.Inode{Mode: unix.S_IFREG | 0o644, Size: 1})
		}
		tr.idx.Chunks = []index.Chunk{{Size: 1, Digest: [32]byte{digest}}}
		var m memory
		if err := erofs.Write(&m, tr.index(), "layer"); err != nil {
			t.Fatal(err)
		}
		return m.data
	}
	first := build(1)
	if !bytes.Equal(first, build(1)) {
		t.Error("two images of one index differ")
	}
	const uuid = 1024 + 48
	if bytes.Equal(first[uuid:uuid+16], build(2)[uuid:uuid+16]) {
		t.Error("layers that differ in file data only have one UUID")
	}
}

// TestFsck asks the reference implementation, as far as it knows the format.
func TestFsck(t *testing.T) {
	tr := newTree()
	for i := range 500 {
		dir := tr.add(0, fmt.Sprintf("dir%d", i), index.Inode{Mode: unix.S_IFDIR | 0o755})
		tr.add(dir, "link", index.Inode{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", i*8+1)})
		tr.add(dir, "empty", index.Inode{Mode: unix.S_IFREG | 0o644, Xattrs: xattrs(map[string]string{"user.a": fmt.Sprint(i)})})
	}
	out, err := exec.CommandContext(t.Context(), "fsck.erofs", writeImage(t, tr.index())).CombinedOutput()
	if err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

// TestDiskFull hands on what the disk says.
func TestDiskFull(t *testing.T) {
	tr := newTree()
	for i := range 5000 {
		tr.add(0, fmt.Sprint(i), index.Inode{Mode: unix.S_IFREG | 0o644})
	}
	for _, room := range []int{0, 1, 4096, 100_000} {
		if err := erofs.Write(&memory{room: room, limited: true}, tr.index(), "layer"); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("room for %d bytes: %v, want ENOSPC", room, err)
		}
	}
}

// TestSameTree: other data makes another image, but not another tree.
func TestSameTree(t *testing.T) {
	image := func(change func(*index.Index)) *bytes.Reader {
		t.Helper()
		b := index.NewBuilder(1<<20, index.DefaultLimits())
		err := b.Add(index.Entry{Name: "f", Mode: unix.S_IFREG | 0o644, Size: 10, Chunks: []index.Chunk{{Size: 10, BlobSize: 10}}})
		if err != nil {
			t.Fatal(err)
		}
		idx, err := b.Finish(index.Stream, index.None)
		if err != nil {
			t.Fatal(err)
		}
		change(idx)
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close() //nolint:errcheck // it is read by name
		if err := erofs.Write(f, idx, "layer"); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return bytes.NewReader(data)
	}
	base := image(func(*index.Index) {})
	for _, tt := range []struct {
		name   string
		change func(*index.Index)
		want   bool
	}{
		{"data", func(i *index.Index) { i.Chunks[0].Digest[0] = 1 }, true},
		{"mode", func(i *index.Index) { i.Inodes[1].Mode |= unix.S_ISUID }, false},
		{"size", func(i *index.Index) { i.Inodes[1].Size++ }, false},
		{"place", func(i *index.Index) { i.Inodes[1].Offset += index.BlockSize; i.DeviceSize += index.BlockSize }, false},
	} {
		if same, err := erofs.SameTree(base, image(tt.change)); err != nil || same != tt.want {
			t.Errorf("%s: %v, %v", tt.name, same, err)
		}
	}
	if same, err := erofs.SameTree(base, bytes.NewReader(nil)); err != nil || same {
		t.Errorf("nothing: %v, %v", same, err)
	}
}
