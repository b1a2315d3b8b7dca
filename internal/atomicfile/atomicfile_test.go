// SPDX-License-Identifier: Apache-2.0

package atomicfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

func TestWrite(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	for _, c := range []struct {
		text string
		mode fs.FileMode
	}{{"", 0o600}, {"first", 0o644}, {strings.Repeat("longer", 100_000), 0o600}, {"short", 0o400}, {"again", 0o600}} {
		if err := atomicfile.Write(name, []byte(c.text), c.mode); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(name)
		if err != nil || string(got) != c.text {
			t.Errorf("%d bytes, error %v", len(got), err)
		}
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != c.mode {
			t.Errorf("mode %v, error %v", info.Mode(), err)
		}
	}
	alone(t, name)
}

// WriteIn follows no link out of its directory, and replaces one of the file's name.
func TestWriteIn(t *testing.T) {
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "file")
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	name := filepath.Join(dir, "below", "file")
	if err := errors.Join(os.WriteFile(outside, []byte("kept"), 0o600), os.Mkdir(filepath.Dir(name), 0o700),
		os.Symlink(outside, name), os.Symlink(outside, filepath.Join(dir, "below", ".file.tmp")), os.Symlink(filepath.Dir(outside), filepath.Join(dir, "out"))); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"first", "", "again"} {
		if err := atomicfile.WriteIn(root, "below/file", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(name)
		if got, bad := os.ReadFile(name); err != nil || bad != nil || string(got) != text || info.Mode() != 0o644 {
			t.Errorf("%q, %v, %v, %v", got, info, err, bad)
		}
		alone(t, name)
	}
	for _, bad := range []string{"out/file", "../file", "none/file"} {
		if err := atomicfile.WriteIn(root, bad, []byte("x"), 0o644); err == nil {
			t.Errorf("%s was written", bad)
		}
	}
	if got, err := os.ReadFile(outside); err != nil || string(got) != "kept" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestClean(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	err := atomicfile.Create(name, 0o600, func(f *os.File) error {
		// As if the process was killed now: what it has is left under its name.
		return os.Link(f.Name(), strings.TrimSuffix(f.Name(), ".tmp")+"0.tmp")
	})
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Fatalf("the directory holds %v, error %v", entries, err)
	}
	for range 2 {
		if err := atomicfile.Clean(dir); err != nil {
			t.Fatal(err)
		}
		alone(t, name)
	}
	if err := atomicfile.Clean(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

// alone checks that a directory holds one file.
func alone(t *testing.T, name string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(name))
	if err != nil || len(entries) != 1 || entries[0].Name() != filepath.Base(name) {
		t.Errorf("the directory holds %v, error %v", entries, err)
	}
}

func TestWhatFailsChangesNothing(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	if err := atomicfile.Write(name, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	err := atomicfile.Create(name, 0o600, func(f *os.File) error {
		if _, err := f.WriteString("new"); err != nil {
			return err
		}
		if got, err := os.ReadFile(name); err != nil || string(got) != "old" {
			t.Errorf("meanwhile: %q, error %v", got, err)
		}
		return boom
	})
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), name) {
		t.Errorf("error %v", err)
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != "old" {
		t.Errorf("afterwards: %q, error %v", got, err)
	}
	alone(t, name)
	if err := atomicfile.WriteJSON(name, func() {}, 0o600); err == nil {
		t.Error("a function is no JSON")
	}
	if err := atomicfile.Write(filepath.Join(filepath.Dir(name), "none", "file"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestCleanBefore(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	for name, age := range map[string]time.Duration{".a.1.tmp": time.Hour, ".a.2.tmp": time.Minute, "a": time.Hour, ".a": time.Hour, "a.tmp": time.Hour} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, now, now.Add(-age))); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := atomicfile.CleanBefore(dir, now.Add(-2*time.Minute)); err != nil {
			t.Error(err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if diff := cmp.Diff([]string{".a", ".a.2.tmp", "a", "a.tmp"}, left); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
	if err := atomicfile.CleanBefore(filepath.Join(dir, "none"), now); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: error = %v", err)
	}
}

func TestTargetThatCannotBeReplaced(t *testing.T) {
	name := filepath.Join(t.TempDir(), "directory")
	if err := os.MkdirAll(filepath.Join(name, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.Write(name, []byte("x"), 0o600); err == nil {
		t.Error("no error")
	}
	alone(t, name)
}

// A reader sees one of the contents, whole.
func TestConcurrentWriters(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	texts := map[string]bool{}
	for _, c := range "abcd" {
		texts[strings.Repeat(string(c), 50_000)] = true
	}
	if err := atomicfile.Write(name, []byte(strings.Repeat("a", 50_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	var g errgroup.Group
	for text := range texts {
		g.Go(func() error {
			for range 10 {
				if err := atomicfile.Write(name, []byte(text), 0o600); err != nil {
					return err
				}
			}
			return nil
		})
		g.Go(func() error {
			for range 100 {
				got, err := os.ReadFile(name)
				if err != nil {
					return err
				}
				if !texts[string(got)] {
					return errors.New("a torn file")
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	alone(t, name)
}

func TestJSON(t *testing.T) {
	type value struct {
		Name string
		N    []int
	}
	name := filepath.Join(t.TempDir(), "file.json")
	want := value{"x", []int{1, 2}}
	if err := atomicfile.WriteJSON(name, want, 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, limit := range []int64{info.Size(), info.Size() + 1, 1 << 20} {
		var got value
		if err := atomicfile.ReadJSON(name, limit, &got); err != nil {
			t.Errorf("limit %d: %v", limit, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("limit %d (-want +got):\n%s", limit, diff)
		}
	}
	for _, limit := range []int64{0, 1, info.Size() - 1} {
		if err := atomicfile.ReadJSON(name, limit, &value{}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("limit %d: error %v", limit, err)
		}
	}
	if err := atomicfile.ReadJSON(name+".none", 100, &value{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for _, text := range []string{"", "{", "[]", "{}{}", "{} x"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.ReadJSON(name, 100, &value{}); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}
