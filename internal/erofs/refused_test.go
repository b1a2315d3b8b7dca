// SPDX-License-Identifier: Apache-2.0

package erofs_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
)

func TestRefused(t *testing.T) {
	entry := func(name string, inode int32) func(*tree) {
		return func(tr *tree) { tr.idx.Inodes[0].Entries = []index.Dirent{{Name: name, Inode: inode}} }
	}
	file := func(in index.Inode) func(*tree) { return func(tr *tree) { tr.add(0, "f", in) } }
	attribute := func(name string, size, n int) func(*tree) {
		var all []index.Xattr
		for i := range n {
			all = append(all, index.Xattr{Name: strings.ReplaceAll(name, "%", fmt.Sprint(i)), Value: strings.Repeat("v", size)})
		}
		return file(index.Inode{Mode: unix.S_IFREG, Xattrs: all})
	}
	for name, c := range map[string]struct {
		make func(*tree)
		want error
	}{
		"no inodes":            {func(tr *tree) { tr.idx.Inodes = nil }, index.ErrInvalid},
		"root is a file":       {func(tr *tree) { tr.idx.Inodes[0].Mode = unix.S_IFREG }, index.ErrInvalid},
		"entry of no inode":    {entry("a", 1), index.ErrInvalid},
		"negative inode":       {entry("a", -1), index.ErrInvalid},
		"image's own inode":    {entry("a", -3), index.ErrInvalid},
		"largest inode":        {entry("a", math.MaxInt32), index.ErrInvalid},
		"root in itself":       {entry("a", 0), index.ErrInvalid},
		"empty name":           {entry("", 0), index.ErrInvalid},
		"dot":                  {entry(".", 0), index.ErrInvalid},
		"dot dot":              {entry("..", 0), index.ErrInvalid},
		"slash":                {entry("a/b", 0), index.ErrInvalid},
		"NUL":                  {entry("a\x00", 0), index.ErrInvalid},
		"long name":            {entry(strings.Repeat("n", 256), 0), index.ErrInvalid},
		"empty target":         {file(index.Inode{Mode: unix.S_IFLNK}), index.ErrInvalid},
		"long target":          {file(index.Inode{Mode: unix.S_IFLNK, Target: strings.Repeat("t", 4096)}), index.ErrInvalid},
		"no type":              {file(index.Inode{Mode: 0o644}), erofs.ErrUnsupported},
		"unknown attribute":    {attribute("system.nfs4_acl", 1, 1), erofs.ErrUnsupported},
		"attribute of ACL":     {attribute("system.posix_acl_accessx", 1, 1), erofs.ErrUnsupported},
		"attribute of nothing": {attribute("user.", 1, 1), erofs.ErrUnsupported},
		"large attribute":      {attribute("user.a", 1<<16, 1), erofs.ErrUnsupported},
		"many attributes":      {attribute("user.%", 1<<16-1, 5), erofs.ErrUnsupported},
		"odd device":           {func(tr *tree) { tr.idx.DeviceSize = 1 }, erofs.ErrUnsupported},
		"huge device":          {func(tr *tree) { tr.idx.DeviceSize = 1 << 44 }, erofs.ErrUnsupported},
		"huge file": {func(tr *tree) {
			tr.add(0, "f", index.Inode{Mode: unix.S_IFREG, Size: 1<<44 - 4096}) // no addresses are left for it
		}, erofs.ErrUnsupported},
		"file past the device": {func(tr *tree) {
			tr.add(0, "f", index.Inode{Mode: unix.S_IFREG, Size: 1})
			tr.idx.Inodes[1].Size = 4097
		}, index.ErrInvalid},
		"unaligned file": {func(tr *tree) {
			tr.add(0, "f", index.Inode{Mode: unix.S_IFREG, Size: 4096})
			tr.idx.Inodes[1].Offset, tr.idx.Inodes[1].Size = 1, 1
		}, index.ErrInvalid},
		"out of order": {func(tr *tree) {
			tr.add(0, "b", index.Inode{Mode: unix.S_IFREG})
			tr.add(0, "a", index.Inode{Mode: unix.S_IFREG})
		}, index.ErrInvalid},
		"twice": {func(tr *tree) {
			tr.link(0, "a", tr.add(0, "a", index.Inode{Mode: unix.S_IFREG}))
		}, index.ErrInvalid},
		"two names of a directory": {func(tr *tree) {
			tr.link(0, "b", tr.add(0, "a", index.Inode{Mode: unix.S_IFDIR}))
		}, index.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			tr := newTree()
			c.make(tr)
			if err := erofs.Write(&memory{}, &tr.idx, "layer"); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestDevice(t *testing.T) {
	for _, size := range []int64{0, 1, 4096, 4097, 4 << 40} {
		tr := newTree()
		tr.add(0, "f", index.Inode{Mode: unix.S_IFREG | 0o644, Size: size})
		var m memory
		if err := erofs.Write(&m, tr.index(), "layer"); err != nil {
			t.Fatal(err)
		}
		if start, got, err := erofs.Device(bytes.NewReader(m.data)); err != nil || got != tr.idx.DeviceSize || got > 0 && start != int64(len(m.data)) {
			t.Errorf("file of %d bytes: got %d+%d, %v; want %d+%d", size, start, got, err, len(m.data), tr.idx.DeviceSize)
		}
		for _, at := range []int{1024, 1024 + 5, 1024 + 86, 1024 + 128 + 64, 4095} {
			damaged := bytes.Clone(m.data)
			damaged[at] ^= 1
			if _, _, err := erofs.Device(bytes.NewReader(damaged)); !errors.Is(err, index.ErrInvalid) {
				t.Errorf("damage at %d: %v", at, err)
			}
		}
	}
	for _, n := range []int{0, 1, 1024, 4095, 1 << 16} {
		if _, _, err := erofs.Device(bytes.NewReader(make([]byte, n))); !errors.Is(err, index.ErrInvalid) {
			t.Errorf("%d zeros: %v", n, err)
		}
	}
}
