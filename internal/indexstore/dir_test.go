// SPDX-License-Identifier: Apache-2.0

package indexstore_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/indexstore"
	"github.com/holdfast/holdfast/internal/killtest"
)

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// Nodes that run as somebody else read what is published, whatever the umask.
func TestFilesAreForAll(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	dir := filepath.Join(t.TempDir(), "index")
	publish(t, indexstore.NewDir(dir), indexstore.Publication{
		Image: image(), Layers: []indexstore.LayerDocuments{about(1, "x", "y")}, Profile: []byte("z"),
	})
	modes := map[string]fs.FileMode{".": fs.ModeDir | 0o755}
	got := map[string]fs.FileMode{}
	for name, subject := range map[string]string{"ztoc": layer(1).Digest.Encoded(), "digests": layer(1).Digest.Encoded(), "profile": image().Digest.Encoded()} {
		modes[subject+"."+name] = 0o644
	}
	for _, name := range append(names(t, dir), ".") {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		got[name] = info.Mode()
	}
	if diff := cmp.Diff(modes, got); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// What is no regular file in the directory is not read, and nothing waits for it.
func TestDirectoryHoldsStrangeThings(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, make := range map[string]func(path string) error{
		"link":          func(path string) error { return os.Symlink(secret, path) },
		"dangling link": func(path string) error { return os.Symlink(secret+"x", path) },
		"pipe":          func(path string) error { return unix.Mkfifo(path, 0o600) },
		"socket":        func(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) },
		"directory":     func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, layer(1).Digest.Encoded()+".ztoc")
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			place := indexstore.NewDir(dir)
			if text, err := tryFetch(t.Context(), place, layer(1).Digest, indexstore.ZTOC); err == nil || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%q, error %v", text, err)
			}
			if list, err := place.List(); len(list) != 0 || err != nil {
				t.Errorf("listed %v, error %v", list, err)
			}
			if name == "directory" {
				return
			}
			publish(t, place, indexstore.Publication{Layers: []indexstore.LayerDocuments{about(1, "x", "")}})
			want(t, place, map[indexstore.Kind]string{indexstore.ZTOC: "x"}, layer(1).Digest)
			if text, err := os.ReadFile(secret); string(text) != "secret" || err != nil {
				t.Errorf("what the link led to is %q, error %v", text, err)
			}
		})
	}
}

func TestReadOnlyMedia(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	place := indexstore.NewDir(dir)
	publish(t, place, indexstore.Publication{Layers: []indexstore.LayerDocuments{about(1, "x", "")}})
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	want(t, place, map[indexstore.Kind]string{indexstore.ZTOC: "x"}, layer(1).Digest)
	err := place.Publish(t.Context(), indexstore.Publication{Layers: []indexstore.LayerDocuments{about(2, "x", "")}})
	if !errors.Is(err, unix.EROFS) {
		t.Errorf("publishing: error = %v; want %v", err, unix.EROFS)
	}
	if err := place.Trim(0); !errors.Is(err, unix.EROFS) {
		t.Errorf("trimming: error = %v; want %v", err, unix.EROFS)
	}
	want(t, place, map[indexstore.Kind]string{indexstore.ZTOC: "x"}, layer(1).Digest)
}

// However many publish the same, a reader finds one of them, whole.
func TestConcurrentPublish(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "index")
	var g errgroup.Group
	const size = 100_000
	for n := range 8 {
		text := strings.Repeat(fmt.Sprint(n), size)
		g.Go(func() error {
			place := indexstore.NewDir(dir)
			for range 5 {
				p := indexstore.Publication{Layers: []indexstore.LayerDocuments{about(1, text, text)}}
				if err := place.Publish(t.Context(), p); err != nil {
					return err
				}
				if err := place.Trim(size * 2); err != nil {
					return err
				}
			}
			return nil
		})
		g.Go(func() error {
			for range 50 {
				got, err := tryFetch(t.Context(), indexstore.NewDir(dir), layer(1).Digest, indexstore.ZTOC)
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err != nil || len(got) != size || strings.Trim(got, got[:1]) != "" {
					return fmt.Errorf("got %d bytes, error %w", len(got), err)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if list := names(t, dir); len(list) != 2 {
		t.Errorf("there is %v", list)
	}
}

// at makes a document as old as that, in minutes.
func at(t *testing.T, dir, name string, minutes int) {
	t.Helper()
	when := time.Now().Add(-time.Duration(minutes) * time.Minute)
	if err := os.Chtimes(filepath.Join(dir, name), when, when); err != nil {
		t.Fatal(err)
	}
}

func TestListAndRemove(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "index")
	place := indexstore.NewDir(dir)
	if list, err := place.List(); list != nil || err != nil {
		t.Errorf("no directory: %v, error %v", list, err)
	}
	publish(t, place, indexstore.Publication{
		Image: image(), Layers: []indexstore.LayerDocuments{about(1, "1", "22")}, Profile: []byte("333"),
	})
	for _, other := range []string{"x", "x.ztoc", layer(1).Digest.Encoded() + ".x", layer(1).Digest.Encoded(), layer(1).Digest.Encoded() + ".ztoc.x"} {
		if err := os.WriteFile(filepath.Join(dir, other), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	at(t, dir, layer(1).Digest.Encoded()+".ztoc", 1)
	at(t, dir, layer(1).Digest.Encoded()+".digests", 3)
	at(t, dir, image().Digest.Encoded()+".profile", 2)
	describe := func() []string {
		t.Helper()
		list, err := place.List()
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, e := range list {
			all = append(all, fmt.Sprint(e.Subject, " ", e.Kind, " ", e.Size, " ", time.Since(e.Used).Round(time.Minute)))
		}
		return all
	}
	digests := layer(1).Digest.String() + " digests 2 3m0s"
	profile := image().Digest.String() + " profile 3 2m0s"
	ztoc := layer(1).Digest.String() + " ztoc 1 1m0s"
	if diff := cmp.Diff([]string{digests, profile, ztoc}, describe()); diff != "" {
		t.Errorf("list (-want +got):\n%s", diff)
	}
	// A document that is fetched has been used.
	want(t, place, map[indexstore.Kind]string{indexstore.Profile: "333"}, image().Digest)
	if diff := cmp.Diff([]string{digests, ztoc, image().Digest.String() + " profile 3 0s"}, describe()); diff != "" {
		t.Errorf("list after a fetch (-want +got):\n%s", diff)
	}
	for range 2 {
		if err := place.Remove(layer(1).Digest, indexstore.Digests); err != nil {
			t.Error(err)
		}
	}
	want(t, place, map[indexstore.Kind]string{indexstore.ZTOC: "1"}, layer(1).Digest)
	for _, err := range []error{place.Remove("sha256:../x", indexstore.ZTOC), place.Remove(layer(1).Digest, "x")} {
		if err == nil {
			t.Error("removing what has no name: no error")
		}
	}
}

func TestTrim(t *testing.T) {
	if err := indexstore.NewDir(filepath.Join(t.TempDir(), "none")).Trim(0); err != nil {
		t.Errorf("no directory: %v", err)
	}
	for _, tt := range []struct {
		limit int64
		left  string // of the documents 1 to 4, of 10 bytes each, 1 the oldest
	}{
		{100, "1234"}, {40, "1234"}, {39, "234"}, {30, "234"}, {29, "34"}, {10, "4"}, {9, ""}, {0, ""}, {-1, ""},
	} {
		dir := t.TempDir()
		place := indexstore.NewDir(dir)
		for n := 1; n <= 4; n++ {
			publish(t, place, indexstore.Publication{Layers: []indexstore.LayerDocuments{about(n, strings.Repeat("x", 10), "")}})
			at(t, dir, layer(n).Digest.Encoded()+".ztoc", 100-n)
		}
		for name, minutes := range map[string]int{".new.1.tmp": 59, ".old.1.tmp": 61, "other": 61} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			at(t, dir, name, minutes)
		}
		if err := place.Trim(tt.limit); err != nil {
			t.Errorf("limit %d: %v", tt.limit, err)
		}
		left := ""
		for n := 1; n <= 4; n++ {
			if fetch(t, place, layer(n).Digest, indexstore.ZTOC) != "" {
				left += fmt.Sprint(n)
			}
		}
		if left != tt.left {
			t.Errorf("limit %d: %q is left; want %q", tt.limit, left, tt.left)
		}
		if got := names(t, dir); len(got) != len(tt.left)+2 || got[0] != ".new.1.tmp" {
			t.Errorf("limit %d: there is %v", tt.limit, got)
		}
	}
}

// A publication that was killed leaves whole documents, and can be made again.
func TestKilledPublish(t *testing.T) {
	newer := func() indexstore.Publication {
		return indexstore.Publication{
			Image:   image(),
			Layers:  []indexstore.LayerDocuments{about(1, "new ztoc", "new digests"), about(2, "new ztoc", "new digests")},
			Profile: []byte("new profile"),
		}
	}
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		return func() error { return indexstore.NewDir(in.Args[0]).Publish(t.Context(), newer()) }
	})
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		dir := filepath.Join(t.TempDir(), "index")
		place := indexstore.NewDir(dir)
		kill(t, []string{dir})
		check := func(complete bool) {
			t.Helper()
			for kind, subjects := range map[indexstore.Kind][]indexstore.Subject{
				indexstore.ZTOC: {layer(1), layer(2)}, indexstore.Digests: {layer(1), layer(2)}, indexstore.Profile: {image()},
			} {
				for _, s := range subjects {
					if got := fetch(t, place, s.Digest, kind); got != "new "+string(kind) && (complete || got != "") {
						t.Errorf("%s is %q", kind, got)
					}
				}
			}
		}
		check(false)
		publish(t, place, newer())
		check(true)
		for _, name := range names(t, dir) {
			at(t, dir, name, 100)
		}
		if err := place.Trim(limit); err != nil {
			t.Error(err)
		}
		check(true)
		if list := names(t, dir); len(list) != 5 {
			t.Errorf("there is %v", list)
		}
	})
}

func TestDirectoryIsUnusable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	place := indexstore.NewDir(file)
	if _, err := tryFetch(t.Context(), place, layer(1).Digest, indexstore.ZTOC); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("fetching: error = %v", err)
	}
	if err := place.Publish(t.Context(), indexstore.Publication{Image: image(), Profile: []byte("x")}); err == nil {
		t.Error("publishing: no error")
	}
	if list, err := place.List(); err == nil {
		t.Errorf("listed %v", list)
	}
}
