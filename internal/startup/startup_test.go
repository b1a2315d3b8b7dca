// SPDX-License-Identifier: Apache-2.0

package startup

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	goerofs "github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
)

func link(target string) *fstest.MapFile {
	return &fstest.MapFile{Mode: fs.ModeSymlink | 0o777, Data: []byte(target)}
}

func file(data string) *fstest.MapFile { return &fstest.MapFile{Mode: 0o755, Data: []byte(data)} }

func TestResolve(t *testing.T) {
	tr := tree{
		{FS: fstest.MapFS{
			"usr/bin/python3.11": file("x"), "usr/bin/python3": link("python3.11"),
			"bin": link("usr/bin"), "usr/lib/gone": file("x"), "loop": link("loop"),
			"abs": link("/usr/bin/python3"), "up": link("../../../usr/bin/python3.11"),
		}},
		{FS: fstest.MapFS{"usr/lib/gone": &fstest.MapFile{Mode: fs.ModeDevice | fs.ModeCharDevice}, "usr/bin/new": file("x")}},
	}
	for name, want := range map[string]string{
		"usr/bin/python3.11": "usr/bin/python3.11",
		"bin/python3":        "usr/bin/python3.11",
		"bin/new":            "usr/bin/new",
		"abs":                "usr/bin/python3.11",
		"up":                 "usr/bin/python3.11",
		"../../bin/new":      "usr/bin/new",
		"usr/lib/gone":       "",
		"loop":               "",
		"none/such":          "",
	} {
		if got, ok := tr.resolve(name); got != want || ok != (want != "") {
			t.Errorf("%s resolves to %q, want %q", name, got, want)
		}
	}
}

func TestWarmScript(t *testing.T) {
	layers := []Layer{{FS: fstest.MapFS{
		"usr/bin/env": file("no elf"), "usr/bin/python3": file("#!/bin/sh -e\n"), "bin/sh": file(""),
		"app/run": file("#!/usr/bin/env python3\nprint()\n"),
	}}}
	got, err := Warm(t.Context(), layers, Command{Args: []string{"./run"}, Dir: "/app"})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"app/run", "usr/bin/env", "usr/bin/python3", "bin/sh"}, got); d != "" {
		t.Error(d)
	}
}

func TestWarmNothing(t *testing.T) {
	for _, args := range [][]string{nil, {""}, {"none"}, {"/none"}} {
		got, err := Warm(t.Context(), []Layer{{FS: fstest.MapFS{}}}, Command{Args: args})
		if err != nil || len(got) != 0 {
			t.Errorf("%q: %v, %v", args, got, err)
		}
	}
}

// TestWarmProgram follows a program of this machine.
func TestWarmProgram(t *testing.T) {
	sh, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Warm(t.Context(), []Layer{{FS: os.DirFS("/")}}, Command{Args: []string{"sh"}, Env: []string{"PATH=/none:/bin"}})
	if err != nil {
		t.Fatal(err)
	}
	libc := func(name string) bool { return strings.Contains(filepath.Base(name), "libc.so") }
	if len(got) < 3 || got[0] != sh[1:] || !slices.ContainsFunc(got, libc) {
		t.Errorf("for %s: %v", sh, got)
	}
}

// device is a layer's data that is all there.
type device struct{ *strings.Reader }

func (d device) Wait(context.Context, int64, int) (func(), error) { return func() {}, nil }

// TestWarmImage finds the content of files by where an image says that it is.
func TestWarmImage(t *testing.T) {
	idx := &index.Index{Inodes: []index.Inode{
		{Mode: unix.S_IFDIR | 0o755, Nlink: 3, Entries: []index.Dirent{{Name: "bin", Inode: 1}}},
		{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Entries: []index.Dirent{{Name: "a", Inode: 2}, {Name: "b", Inode: 3}, {Name: "c", Inode: 4}}},
	}}
	data := ""
	for _, c := range []string{"#!/bin/b", "#!/bin/c", "x"} {
		idx.Inodes = append(idx.Inodes, index.Inode{Mode: unix.S_IFREG | 0o755, Nlink: 1, Size: int64(len(c)), Offset: int64(len(data))})
		data += c + strings.Repeat("\x00", index.BlockSize-len(c))
	}
	idx.DeviceSize = int64(len(data))
	image, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = image.Close() }()
	if err := erofs.Write(image, idx, "layer"); err != nil {
		t.Fatal(err)
	}
	origin, _, err := erofs.Device(image)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := goerofs.Open(image, goerofs.WithExtraDevices(strings.NewReader(data)))
	if err != nil {
		t.Fatal(err)
	}
	files, err := fs.Sub(whole, "diff")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		origin int64
		want   []string
	}{
		{origin, []string{"bin/a", "bin/b", "bin/c"}},
		{origin + index.BlockSize, []string{"bin/a"}}, // it lies before the data: passed over
	} {
		layers := []Layer{{FS: files, Data: device{strings.NewReader(data)}, Origin: c.origin}}
		got, err := Warm(t.Context(), layers, Command{Args: []string{"/bin/a"}})
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("data at %d: %s", c.origin, d)
		}
	}
}

func FuzzWarm(f *testing.F) {
	self, err := os.ReadFile("/bin/true")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(self[:min(len(self), 1<<16)], "libc.so.6")
	f.Add([]byte("#!/bin/x y"), "/x/../..")
	f.Add([]byte("\x7fELF"), "")
	f.Fuzz(func(t *testing.T, data []byte, target string) {
		layers := []Layer{{FS: fstest.MapFS{"bin/x": file(string(data)), "lib/libc.so.6": file(string(data)), "lib64": link(target)}}}
		got, err := Warm(t.Context(), layers, Command{Args: []string{"/bin/x"}})
		if err != nil || len(got) > maxFiles+1 {
			t.Errorf("%d files, %v", len(got), err)
		}
	})
}
