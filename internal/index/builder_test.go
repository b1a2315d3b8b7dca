// SPDX-License-Identifier: Apache-2.0

package index_test

import (
	"archive/tar"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
)

const blobSize = 1000

func file(name string, size int64, chunks ...index.Chunk) index.Entry {
	return index.Entry{Name: name, Mode: unix.S_IFREG | 0o644, Size: size, Chunks: chunks}
}

func dir(name string) index.Entry { return index.Entry{Name: name, Mode: unix.S_IFDIR | 0o755} }

func symlink(name, target string) index.Entry {
	return index.Entry{Name: name, Mode: unix.S_IFLNK | 0o777, Target: target}
}

func link(name, target string) index.Entry {
	return index.Entry{Name: name, Mode: 0o644, Target: target}
}

func chunk(offset, size, blobOffset, size2 int64) index.Chunk {
	return index.Chunk{Offset: offset, Size: size, BlobOffset: blobOffset, BlobSize: size2}
}

func xattr(e index.Entry, name, value string) index.Entry {
	e.Xattrs = map[string]string{name: value}
	return e
}

func build(limits index.Limits, entries ...index.Entry) (*index.Index, error) {
	b := index.NewBuilder(blobSize, limits)
	for _, e := range entries {
		if err := b.Add(e); err != nil {
			return nil, err
		}
	}
	return b.Finish(index.EStargz, index.Gzip)
}

func TestBuilderRefuses(t *testing.T) {
	long := strings.Repeat("n", 256)
	for name, entries := range map[string][]index.Entry{
		"dot-dot":                     {dir("..")},
		"dot-dot inside":              {dir("a/../b")},
		"dot-dot at the end":          {dir("a/..")},
		"dot-dot after root":          {dir("/../etc")},
		"NUL":                         {dir("a\x00b")},
		"long part":                   {dir(long)},
		"long path":                   {dir(strings.Repeat("p/", 2049))},
		"root is a file":              {file("/", 0)},
		"root is a link":              {dir("a"), symlink(".", "a")},
		"root is a hard link":         {file("a", 0), link("/", "a")},
		"same file twice":             {file("a", 0), file("./a", 0)},
		"file over directory":         {dir("a"), file("/a/", 0)},
		"directory over file":         {file("a", 0), dir("a/")},
		"symlink over directory":      {dir("a"), symlink("a", "b")},
		"hard link over file":         {file("a", 0), file("b", 0), link("b", "a")},
		"parent is a file":            {file("a", 0), file("a/b", 0)},
		"parent is a symlink":         {dir("d"), symlink("a", "d"), file("a/b", 0)},
		"grandparent is a symlink":    {dir("d/e"), symlink("a", "d"), file("a/e/b", 0)},
		"parent is a whiteout":        {file(".wh.a", 0), file("a/b", 0)},
		"opaque marker in a file":     {file("a", 0), file("a/.wh..wh..opq", 0)},
		"hard link to nothing":        {link("a", "b")},
		"hard link to itself":         {link("a", "a")},
		"hard link cycle":             {link("a", "b"), link("b", "a")},
		"hard link ahead":             {link("a", "b"), file("b", 0)},
		"hard link to directory":      {dir("d"), link("a", "d")},
		"hard link to root":           {link("a", "/")},
		"hard link through a symlink": {file("d/f", 0), symlink("s", "d"), link("a", "s/f")},
		"hard link leaves":            {file("f", 0), link("a", "../f")},
		"hard link under a symlink":   {file("f", 0), dir("d"), symlink("s", "d"), link("s/a", "f")},
		"whiteout of nothing":         {file(".wh.", 0)},
		"whiteout of dot":             {file("a/.wh..", 0)},
		"whiteout of dot-dot":         {file(".wh...", 0)},
		"whiteout after file":         {file("a", 0), file(".wh.a", 0)},
		"whiteout twice":              {file(".wh.a", 0), file(".wh.a", 0)},
		"empty symlink":               {symlink("a", "")},
		"long symlink":                {symlink("a", strings.Repeat("x", unix.PathMax))},
		"NUL in symlink":              {symlink("a", "b\x00")},
		"socket":                      {{Name: "a", Mode: unix.S_IFSOCK}},
		"unknown type":                {{Name: "a", Mode: 0o030000}},
		"major":                       {{Name: "a", Mode: unix.S_IFCHR, Major: 1 << 12}},
		"minor":                       {{Name: "a", Mode: unix.S_IFBLK, Minor: 1 << 20}},
		"attribute of overlayfs":      {xattr(dir("a"), "trusted.overlay.redirect", "/")},
		"attribute of user overlayfs": {xattr(dir("a"), "user.overlay.opaque", "y")},
		"attribute without prefix":    {xattr(dir("a"), "note", "")},
		"attribute without name":      {xattr(dir("a"), "user.", "")},
		"attribute with NUL":          {xattr(dir("a"), "user.a\x00b", "")},
		"ACL":                         {xattr(dir("a"), "system.posix_acl_access", "")},
		"long attribute":              {xattr(dir("a"), "user.a", strings.Repeat("x", 1<<16))},
		"attribute of a hard link":    {file("a", 0), xattr(link("b", "a"), "trusted.overlay.opaque", "y")},
		"no chunks":                   {file("a", 1)},
		"no chunks, then another":     {file("a", 1), file("b", 0)},
		"chunk of an empty file":      {file("a", 0, chunk(0, 1, 0, 1))},
		"gap":                         {file("a", 4, chunk(0, 1, 0, 1), chunk(2, 2, 0, 1))},
		"overlap":                     {file("a", 4, chunk(0, 2, 0, 1), chunk(1, 3, 0, 1))},
		"order":                       {file("a", 4, chunk(2, 2, 0, 1), chunk(0, 2, 0, 1))},
		"too short":                   {file("a", 4, chunk(0, 3, 0, 1))},
		"too long":                    {file("a", 4, chunk(0, 5, 0, 1))},
		"empty chunk":                 {file("a", 4, chunk(0, 0, 0, 1), chunk(0, 4, 0, 1))},
		"negative chunk":              {file("a", 4, chunk(0, -1, 0, 1))},
		"size overflows":              {file("a", 4, chunk(0, math.MaxInt64, 0, 1))},
		"offset before the blob":      {file("a", 4, chunk(0, 4, -1, 1))},
		"offset after the blob":       {file("a", 4, chunk(0, 4, blobSize+1, 1))},
		"end after the blob":          {file("a", 4, chunk(0, 4, 1, blobSize))},
		"end overflows":               {file("a", 4, chunk(0, 4, 1, math.MaxInt64))},
		"negative in the blob":        {file("a", 4, chunk(0, 4, 1, -2))},
		"to next at the end":          {file("a", 4, chunk(0, 4, blobSize, index.ToNext))},
		"inner offset":                {file("a", 4, index.Chunk{Size: 4, BlobSize: 1, InnerOffset: -1})},
		"inner offset overflows":      {file("a", 4, index.Chunk{Size: 4, BlobSize: 1, InnerOffset: math.MaxInt64 - 3})},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := build(index.DefaultLimits(), entries...); !errors.Is(err, index.ErrInvalid) {
				t.Errorf("error is %v, want ErrInvalid", err)
			}
		})
	}
}

func TestBuilderLimits(t *testing.T) {
	limits := index.Limits{Entries: 10, Chunks: 3, ChunkBytes: 100, Text: 200, Depth: 4, FileBytes: 1000}
	many := func(n int) (out []index.Entry) {
		for i := range n {
			out = append(out, dir(fmt.Sprint(i)))
		}
		return out
	}
	chunks := func(n int64) index.Entry {
		e := file("f", n)
		for i := range n {
			e.Chunks = append(e.Chunks, chunk(i, 1, i, 1))
		}
		return e
	}
	for name, c := range map[string]struct {
		entries []index.Entry
		fits    bool
	}{
		"entries":              {many(10), true},
		"more entries":         {many(11), false},
		"implied entries":      {append(many(8), dir("a/b")), true},
		"more implied entries": {append(many(8), dir("a/b/c")), false},
		"chunks":               {[]index.Entry{chunks(3)}, true},
		"more chunks":          {[]index.Entry{chunks(4)}, false},
		"chunk size":           {[]index.Entry{file("f", 100, chunk(0, 100, 0, 1))}, true},
		"larger chunk":         {[]index.Entry{file("f", 101, chunk(0, 101, 0, 1))}, false},
		"larger hole":          {[]index.Entry{file("f", 101, chunk(0, 101, 0, 0))}, true},
		"text":                 {[]index.Entry{symlink("a", strings.Repeat("t", 199))}, true},
		"more text":            {[]index.Entry{symlink("a", strings.Repeat("t", 200))}, false},
		"attributes":           {[]index.Entry{xattr(dir("a"), "user.a", strings.Repeat("t", 194))}, false},
		"depth":                {[]index.Entry{file("a/b/c/d", 0)}, true},
		"deeper":               {[]index.Entry{file("a/b/c/d/e", 0)}, false},
		"deeper step by step":  {[]index.Entry{dir("a"), dir("a/b"), dir("a/b/c"), dir("a/b/c/d"), dir("a/b/c/d/e")}, false},
		"bytes":                {[]index.Entry{file("a", 400, chunk(0, 400, 0, 0)), file("b", 600, chunk(0, 600, 0, 0))}, true},
		"more bytes":           {[]index.Entry{file("a", 400, chunk(0, 400, 0, 0)), file("b", 601, chunk(0, 601, 0, 0))}, false},
		"overflowing bytes":    {[]index.Entry{file("a", 400, chunk(0, 400, 0, 0)), file("b", math.MaxInt64, chunk(0, 1, 0, 0))}, false},
		"negative size":        {[]index.Entry{file("a", -1)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := build(limits, c.entries...)
			if c.fits && err != nil || !c.fits && !errors.Is(err, index.ErrTooLarge) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// A million entries end in an error long before a million are held.
func TestBuilderMillion(t *testing.T) {
	b := index.NewBuilder(blobSize, index.DefaultLimits())
	var err error
	n := 0
	for ; n < 1_000_000 && err == nil; n++ {
		err = b.Add(dir(fmt.Sprint(n)))
	}
	if !errors.Is(err, index.ErrTooLarge) || n != index.DefaultLimits().Entries+1 {
		t.Errorf("after %d entries: %v", n, err)
	}
}

// describe renders an index one line an entry, for comparison.
func describe(idx *index.Index) string {
	var out strings.Builder
	var walk func(name string, id int32)
	walk = func(name string, id int32) {
		n := idx.Inodes[id]
		fmt.Fprintf(&out, "%s %o %d:%d n%d", name, n.Mode, n.UID, n.GID, n.Nlink)
		if n.Size > 0 {
			fmt.Fprintf(&out, " [%d+%d]", n.Offset, n.Size)
		}
		if n.Target != "" {
			fmt.Fprintf(&out, " -> %s", n.Target)
		}
		for _, x := range n.Xattrs {
			fmt.Fprintf(&out, " %s=%s", x.Name, x.Value)
		}
		out.WriteString("\n")
		for _, e := range n.Entries {
			walk(name+"/"+e.Name, e.Inode)
		}
	}
	walk("", 0)
	for _, c := range idx.Chunks {
		fmt.Fprintf(&out, "chunk %d+%d @%d+%d/%d\n", c.Offset, c.Size, c.BlobOffset, c.BlobSize, c.InnerOffset)
	}
	return out.String()
}

func TestBuilder(t *testing.T) {
	owned := func(e index.Entry, mode, uid uint32) index.Entry {
		e.Mode, e.UID, e.GID = mode, uid, uid
		return e
	}
	for _, c := range []struct {
		name    string
		entries []index.Entry
		want    string
	}{
		{"nothing", nil, " 40555 0:0 n2\n"},
		{"root", []index.Entry{owned(dir("./"), unix.S_IFDIR|0o1777, 5)}, " 41777 5:5 n2\n"},
		{
			"implied directories",
			[]index.Entry{file("a/b/c", 0), owned(dir("a/b"), unix.S_IFDIR|0o700, 1)},
			" 40555 0:0 n3\n/a 40755 0:0 n3\n/a/b 40700 1:1 n2\n/a/b/c 100644 0:0 n1\n",
		},
		{
			"hard links take the attributes of the last",
			[]index.Entry{xattr(owned(file("a", 0), unix.S_IFREG|0o4755, 1), "security.capability", "c"), owned(link("d/b", "./a"), 0o600, 2), xattr(owned(link("c", "/d/b"), 0o640, 2), "user.x", "1")},
			" 40555 0:0 n3\n/a 100640 2:2 n3 user.x=1\n/c 100640 2:2 n3 user.x=1\n/d 40755 0:0 n2\n/d/b 100640 2:2 n3 user.x=1\n",
		},
		{
			"symlinks",
			[]index.Entry{owned(symlink("s", "../../x"), unix.S_IFLNK|0o600, 1), owned(link("t", "s"), 0o600, 2)},
			" 40555 0:0 n2\n/s 120777 2:2 n2 -> ../../x\n/t 120777 2:2 n2 -> ../../x\n",
		},
		{
			"whiteouts",
			[]index.Entry{owned(file(".wh.gone", 3), unix.S_IFREG|0o644, 7), file(".wh.back", 0), file("back", 0), file("gone/.wh.inside", 0), file("d/.wh..wh..opq", 0), xattr(dir("d"), "user.x", "1")},
			" 40555 0:0 n3\n/back 100644 0:0 n1\n/d 40755 0:0 n2 trusted.overlay.opaque=y user.x=1\n/gone 20000 7:7 n1\n",
		},
		{
			"opaque root",
			[]index.Entry{file(".wh..wh..opq", 0)},
			" 40555 0:0 n2 trusted.overlay.opaque=y\n",
		},
		{
			"layout follows the order of entries",
			[]index.Entry{
				file("b", 4097, chunk(0, 4096, 10, index.ToNext), chunk(4096, 1, 50, index.ToNext)), file("empty", 0),
				file("hole", 5000, chunk(0, 4000, 0, 0), chunk(4000, 1000, 500, index.ToNext)),
				file("a", 1, chunk(0, 1, 10, 7)), file("shared", 2, index.Chunk{Size: 2, BlobOffset: 50, BlobSize: index.ToNext, InnerOffset: 1}),
			},
			" 40555 0:0 n2\n/a 100644 0:0 n1 [16384+1]\n/b 100644 0:0 n1 [0+4097]\n/empty 100644 0:0 n1\n/hole 100644 0:0 n1 [8192+5000]\n/shared 100644 0:0 n1 [20480+2]\n" +
				"chunk 0+4096 @10+40/0\nchunk 4096+1 @50+450/0\nchunk 12192+1000 @500+500/0\nchunk 16384+1 @10+7/0\nchunk 20480+2 @50+450/1\n",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			idx, err := build(index.DefaultLimits(), c.entries...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, describe(idx)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			if idx.RootImplied != (c.name != "root") {
				t.Errorf("RootImplied = %t", idx.RootImplied)
			}
			if idx.DeviceSize%index.BlockSize != 0 {
				t.Errorf("device of %d bytes", idx.DeviceSize)
			}
		})
	}
}

// Chunks may be added one by one; Content tells where they go.
func TestAddChunk(t *testing.T) {
	b := index.NewBuilder(blobSize, index.DefaultLimits())
	if err := b.AddChunk(chunk(0, 1, 0, 1)); !errors.Is(err, index.ErrInvalid) {
		t.Errorf("chunk without a file: %v", err)
	}
	for i, e := range []index.Entry{file("a", 4096), file("b", 1)} {
		if err := b.Add(e); err != nil {
			t.Fatal(err)
		}
		if off, size := b.Content(); off != int64(i)*4096 || size != e.Size {
			t.Errorf("content of %s at %d+%d", e.Name, off, size)
		}
		if err := b.AddChunk(chunk(0, e.Size, 0, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Add(file(".wh.x", 100)); err != nil {
		t.Fatal(err)
	}
	if _, size := b.Content(); size != 0 {
		t.Errorf("a whiteout has %d bytes of content", size)
	}
	if idx, err := b.Finish(index.Stream, index.None); err != nil || idx.DeviceSize != 8192 {
		t.Errorf("%+v, %v", idx, err)
	}
}

func TestModTime(t *testing.T) {
	epoch := time.Unix(0, 0)
	early, far := time.Unix(-1, 0), time.Unix(1<<40, 0)
	for _, c := range []struct {
		mode       uint32
		time, want time.Time
	}{
		{unix.S_IFREG, time.Unix(1, 2), time.Unix(1, 2)},
		{unix.S_IFREG, early, epoch},
		{unix.S_IFREG, far, epoch},
		{unix.S_IFDIR, time.Time{}, epoch},
		{unix.S_IFLNK, early, early},
		{unix.S_IFLNK, time.Time{}, epoch},
	} {
		idx, err := build(index.DefaultLimits(), index.Entry{Name: "a", Mode: c.mode, ModTime: c.time, Target: "t"})
		if err != nil {
			t.Fatal(err)
		}
		if got := idx.Inodes[1].ModTime; !got.Equal(c.want) {
			t.Errorf("%o at %v has %v, want %v", c.mode, c.time, got, c.want)
		}
	}
}

func TestFromTarRefuses(t *testing.T) {
	for name, h := range map[string]tar.Header{
		"sparse":         {Typeflag: tar.TypeGNUSparse},
		"continuation":   {Typeflag: tar.TypeCont},
		"unknown":        {Typeflag: 'Z'},
		"negative owner": {Typeflag: tar.TypeReg, Uid: -1},
		"negative group": {Typeflag: tar.TypeReg, Gid: -1},
		"large owner":    {Typeflag: tar.TypeReg, Uid: math.MaxUint32 + 1},
		"major":          {Typeflag: tar.TypeChar, Devmajor: -1},
		"minor":          {Typeflag: tar.TypeBlock, Devminor: 1 << 40},
	} {
		if _, err := index.FromTar(&h); !errors.Is(err, index.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzBuilder adds entries made of arbitrary bytes. What comes out is sound.
func FuzzBuilder(f *testing.F) {
	f.Add([]byte("a/b\x00\x01\x02c\x00\x03\x04"))
	f.Add([]byte(".wh.a\x00\x01\x01a\x00\x02\x01a/b\x00\x00\x01"))
	f.Add([]byte("a\x00\x02\x05b\x00\x05\x05../x\x00\x01\x09"))
	f.Add([]byte("s\x00\x03\x01s/x\x00\x01\x01l\x00\x04\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		b := index.NewBuilder(blobSize, index.Limits{Entries: 50, Chunks: 50, ChunkBytes: 1 << 20, Text: 1000, Depth: 5, FileBytes: 1 << 30})
		for _, e := range fuzzEntries(p) {
			if b.Add(e) != nil {
				return
			}
		}
		idx, err := b.Finish(index.EStargz, index.Gzip)
		if err == nil {
			checkSound(t, idx)
		}
	})
}

// fuzzEntries reads names that end in NUL, each followed by a type and a size.
func fuzzEntries(p []byte) (out []index.Entry) {
	last := ""
	for len(p) > 0 {
		name, rest, _ := strings.Cut(string(p), "\x00")
		if len(rest) < 2 {
			return out
		}
		kind, n := rest[0], int64(int8(rest[1])) //nolint:gosec // wraps on purpose
		e := index.Entry{Name: name, Target: last}
		switch kind % 6 {
		case 0:
			e.Mode = unix.S_IFREG
		case 1:
			e.Mode, e.Size = unix.S_IFREG, n*1000
			e.Chunks = []index.Chunk{chunk(0, n*1000, n, index.ToNext)}
		case 2:
			e.Mode = unix.S_IFDIR
		case 3:
			e.Mode = unix.S_IFLNK
		case 4:
			e.Mode = 0o600
		case 5:
			e.Mode, e.Size = unix.S_IFREG, n
			e.Chunks = []index.Chunk{chunk(0, n/2, n*n, n), chunk(n/2, n-n/2, n, n*n)}
		}
		out, last, p = append(out, e), name, []byte(rest[2:])
	}
	return out
}

func checkSound(t *testing.T, idx *index.Index) {
	t.Helper()
	nlink := make([]uint32, len(idx.Inodes))
	for i, n := range idx.Inodes {
		for _, e := range n.Entries {
			if strings.ContainsAny(e.Name, "/\x00") || e.Name == "" || e.Name == "." || e.Name == ".." {
				t.Errorf("name %q", e.Name)
			}
			child := idx.Inodes[e.Inode]
			if child.Mode&unix.S_IFMT == unix.S_IFDIR {
				if int(e.Inode) <= i {
					t.Errorf("directory %d in %d", e.Inode, i)
				}
				nlink[i]++
			}
			nlink[e.Inode]++
		}
		if n.Mode&unix.S_IFMT == unix.S_IFDIR {
			nlink[i]++
		} else if len(n.Entries) > 0 {
			t.Errorf("entries in a file of mode %o", n.Mode)
		}
		if n.Size > 0 && (n.Offset%index.BlockSize != 0 || n.Offset+n.Size > idx.DeviceSize) {
			t.Errorf("file at %d+%d of %d", n.Offset, n.Size, idx.DeviceSize)
		}
	}
	nlink[0]++ // the root is its own parent
	for i, n := range idx.Inodes {
		if n.Nlink != nlink[i] {
			t.Errorf("inode %d, mode %o, has %d links, not %d", i, n.Mode, n.Nlink, nlink[i])
		}
	}
	var end int64
	for _, c := range idx.Chunks {
		if c.Offset < end || c.Size <= 0 || c.End() > idx.DeviceSize ||
			c.BlobOffset < 0 || c.BlobSize <= 0 || c.BlobOffset+c.BlobSize > blobSize {
			t.Errorf("chunk %+v after %d", c, end)
		}
		end = c.End()
	}
}
