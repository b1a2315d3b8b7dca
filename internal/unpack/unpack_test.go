// SPDX-License-Identifier: Apache-2.0

package unpack_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/unpack"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// all is a file system that keeps everything.
var all = unpack.Features{TrustedXattrs: true, SecurityXattrs: true, UserXattrs: true}

// layer unpacks a layer and returns its directory.
func layer(t *testing.T, blob []byte, keeps unpack.Features) (dir string, split []byte, res *unpack.Result) {
	t.Helper()
	dir = t.TempDir()
	var to bytes.Buffer
	res, err := unpack.Layer(t.Context(), bytes.NewReader(blob), int64(len(blob)), dir, unpack.Options{Keeps: keeps, TarSplit: &to})
	if err != nil {
		t.Fatal(err)
	}
	return dir, to.Bytes(), res
}

// Whatever a layer is, its tree is that of a normal pull, and its tar can be put
// together again.
func TestLayer(t *testing.T) {
	for _, c := range testimage.Corpus() {
		for _, f := range []testimage.Format{testimage.Uncompressed, testimage.Gzip, testimage.Zstd} {
			t.Run(c.Name+"/"+string(f), func(t *testing.T) {
				l, err := testimage.ConvertBytes(t.Context(), c.Tar, f, testimage.Options{})
				if err != nil {
					t.Fatal(err)
				}
				dir, split, res := layer(t, l.Bytes, all)
				if res.Blob != l.Descriptor.Digest || res.DiffID != l.DiffID || res.DiffSize != int64(len(c.Tar)) {
					t.Errorf("result %+v", res)
				}
				diff := filepath.Join(dir, unpack.Diff)
				indextest.CheckDirectory(t, diff, c.Tar)
				if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
					t.Errorf("left: %v, %v", left, err)
				}
				if res.Unsplit {
					return
				}
				got, differences, err := unpack.Verify(t.Context(), diff, bytes.NewReader(split), res.DiffSize, all)
				if err != nil || got != l.DiffID || len(differences) > 0 {
					t.Errorf("verified: %s, %q, %v", got, differences, err)
				}
			})
		}
	}
}

func file(name, content string) testimage.File {
	return testimage.File{Header: tar.Header{Name: name}, Content: []byte(content)}
}

func directory(name string) testimage.File {
	return testimage.File{Header: tar.Header{Name: name, Typeflag: tar.TypeDir}}
}

// Whatever is changed in a tree is found.
func TestVerifyFinds(t *testing.T) {
	plain := testimage.Tar(
		directory("d/"), file("d/f", strings.Repeat("content", 1000)), file("d/g", "other"),
		testimage.File{Header: tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "d/f"}}, file("d/.wh.w", ""),
	)
	for name, c := range map[string]struct {
		harm func(diff string) error
		want string
	}{
		"a byte":        {func(d string) error { return overwrite(filepath.Join(d, "d/f"), "C") }, "digest"},
		"torn":          {func(d string) error { return os.Truncate(filepath.Join(d, "d/f"), 4096) }, "error"},
		"longer":        {func(d string) error { return os.Truncate(filepath.Join(d, "d/f"), 8192) }, "error"},
		"file missing":  {func(d string) error { return os.Remove(filepath.Join(d, "d/f")) }, "error"},
		"link missing":  {func(d string) error { return os.Remove(filepath.Join(d, "l")) }, "/l: is missing"},
		"whiteout gone": {func(d string) error { return os.Remove(filepath.Join(d, "d/w")) }, "/d/w: is missing"},
		"one more":      {func(d string) error { return os.WriteFile(filepath.Join(d, "d/x"), nil, 0o600) }, "/d/x: does not belong"},
		"mode":          {func(d string) error { return unix.Chmod(filepath.Join(d, "d/g"), 0o4755) }, "/d/g: has mode"},
		"owner":         {func(d string) error { return os.Lchown(filepath.Join(d, "d"), 1, 1) }, "/d: belongs to"},
		"another target": {func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, "l")), os.Symlink("/etc/passwd", filepath.Join(d, "l")))
		}, "/l: leads to"},
		"capability": {func(d string) error {
			return unix.Setxattr(filepath.Join(d, "d/g"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0)
		}, "/d/g: has file capabilities"},
		"leads out": {func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, "d/f")), os.Symlink("/etc/passwd", filepath.Join(d, "d/f")))
		}, "error"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, split, res := layer(t, plain, all)
			diff := filepath.Join(dir, unpack.Diff)
			if err := c.harm(diff); err != nil {
				t.Fatal(err)
			}
			got, differences, err := unpack.Verify(t.Context(), diff, bytes.NewReader(split), res.DiffSize, all)
			switch c.want {
			case "error":
				if err == nil && got == res.DiffID && len(differences) == 0 {
					t.Error("not found")
				}
			case "digest":
				if err == nil && got == res.DiffID {
					t.Error("not found")
				}
			default:
				if err != nil || got != res.DiffID || !slices.ContainsFunc(differences, func(d string) bool { return strings.HasPrefix(d, c.want) }) {
					t.Errorf("%s, %q, %v", got, differences, err)
				}
			}
		})
	}
}

func overwrite(name, text string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(text), 10)
	return errors.Join(err, f.Close())
}

// Where directories cannot be marked as opaque, whiteouts have the same effect.
func TestOpaqueWithoutMark(t *testing.T) {
	base := testimage.Tar(
		directory("a/"), file("a/old", "1"), file("a/kept", "1"), directory("a/both/"), file("a/both/old", "1"),
		directory("a/gone/"), file("a/gone/f", "1"), file("a/becomes-dir", "1"), directory("a/becomes-file/"), file("b", "1"),
	)
	middle := testimage.Tar(directory("a/"), file("a/middle", "2"), testimage.File{Header: tar.Header{Name: "b", Typeflag: tar.TypeSymlink, Linkname: "/etc"}})
	top := testimage.Tar(
		directory("a/"), file("a/.wh..wh..opq", ""), file("a/kept", "3"), directory("a/both/"), file("a/both/new", "3"),
		directory("a/becomes-dir/"), file("a/becomes-file", "3"), directory("b/"), file("b/.wh..wh..opq", ""),
	)
	var merged []string
	for _, keeps := range []unpack.Features{all, {SecurityXattrs: true, UserXattrs: true}} {
		var diffs []string
		for _, blob := range [][]byte{base, middle, top} {
			dir, split, res := layer(t, blob, keeps)
			diff := filepath.Join(dir, unpack.Diff)
			if keeps == all && len(res.Opaque) > 0 {
				t.Errorf("opaque: %q", res.Opaque)
			}
			if err := unpack.HideBelow(diff, res.Opaque, diffs); err != nil {
				t.Fatal(err)
			}
			got, differences, err := unpack.Verify(t.Context(), diff, bytes.NewReader(split), res.DiffSize, keeps)
			if err != nil || got != digest.FromBytes(blob) || len(differences) > 0 {
				t.Errorf("verified: %s, %q, %v", got, differences, err)
			}
			diffs = slices.Insert(diffs, 0, diff)
		}
		at := t.TempDir()
		if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(diffs, ":")); err != nil {
			t.Fatal(err)
		}
		var names []string
		err := filepath.WalkDir(at, func(p string, d os.DirEntry, err error) error {
			names = append(names, strings.TrimPrefix(p, at)+" "+d.Type().String())
			return err
		})
		if err := errors.Join(err, unix.Unmount(at, 0)); err != nil {
			t.Fatal(err)
		}
		text := strings.Join(names, "\n")
		if strings.Contains(text, "old") || strings.Contains(text, "middle") || strings.Contains(text, "gone") || !strings.Contains(text, "new") {
			t.Errorf("merged:\n%s", text)
		}
		merged = append(merged, text)
	}
	if merged[0] != merged[1] {
		t.Errorf("with marks:\n%s\nwithout:\n%s", merged[0], merged[1])
	}
}

func TestNotKept(t *testing.T) {
	plain := testimage.Tar(testimage.File{Header: tar.Header{Name: "bin/ping", PAXRecords: map[string]string{
		"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	}}, Content: []byte("ping")})
	_, err := unpack.Layer(t.Context(), bytes.NewReader(plain), int64(len(plain)), t.TempDir(), unpack.Options{Keeps: unpack.Features{TrustedXattrs: true}})
	if !errors.Is(err, unpack.ErrNotKept) || !strings.Contains(err.Error(), "bin/ping") {
		t.Error(err)
	}
}

func TestUnsound(t *testing.T) {
	for name, blob := range map[string][]byte{
		"no tar":    bytes.Repeat([]byte("no tar"), 1000),
		"path":      testimage.Tar(file("../../etc/passwd", "root")),
		"hard link": testimage.Tar(testimage.File{Header: tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "../../etc/passwd"}}),
		"cut short": testimage.Tar(file("f", strings.Repeat("x", 10_000)))[:5000],
	} {
		dir := t.TempDir()
		if _, err := unpack.Layer(t.Context(), bytes.NewReader(blob), int64(len(blob)), dir, unpack.Options{Keeps: all, TarSplit: &bytes.Buffer{}}); !errors.Is(err, index.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	got, err := unpack.Probe(t.Context(), dir)
	if err != nil || got != all || got.String() != "everything" {
		t.Errorf("%v, %v", got, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	// procfs keeps nothing at all, and tmpfs without its owner's rights something.
	if _, err := unpack.Probe(t.Context(), "/proc"); err == nil {
		t.Error("procfs was found good")
	}
}
