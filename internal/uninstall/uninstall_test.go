// SPDX-License-Identifier: Apache-2.0

package uninstall_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/layer/layertest"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/uninstall"
)

// node is a machine on which a daemon has run.
type node struct {
	dir     string
	options uninstall.Options
}

// nodeIn is a node below a directory.
func nodeIn(dir string) *node {
	n := &node{dir: dir}
	n.options = uninstall.Options{
		Config: config.Config{
			Root: n.path("lib/holdfast"), RunRoot: n.path("run/holdfast"), RuntimeRoots: []string{n.path("runtime")},
		},
		StorageConf: []string{n.path("etc/storage.conf"), n.path("etc/crio.conf.d/*")},
	}
	return n
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := nodeIn(t.TempDir())
	t.Cleanup(func() { layertest.UnmountAll(t, n.dir) })
	if _, err := imagestore.Create(n.path("lib/holdfast/store"), n.path("run/holdfast/records")); err != nil {
		t.Fatal(err)
	}
	n.write(t, "lib/holdfast/daemon.lock", "")
	n.write(t, "lib/holdfast/layers/abc/data", "data")
	n.write(t, "lib/holdfast/store/overlay-layers/layers.json", `[{"id":"base"},{"id":"top","parent":"base"}]`)
	n.write(t, "run/holdfast/daemon.lock", "")
	n.write(t, "etc/storage.conf", "[storage]\ndriver = \"overlay\"\n")
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

func (n *node) write(t *testing.T, name, text string) {
	t.Helper()
	name = n.path(name)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (n *node) exists(t *testing.T, name string) bool {
	t.Helper()
	_, err := os.Lstat(n.path(name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// mountLayer mounts the image of a layer, as a daemon that was killed leaves it.
func (n *node) mountLayer(t *testing.T, name string) string {
	t.Helper()
	image, err := os.Create(n.path("image.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	idx := &index.Index{Inodes: []index.Inode{{Mode: unix.S_IFDIR | 0o755, Nlink: 2, ModTime: time.Unix(0, 0)}}}
	if err := errors.Join(erofs.Write(image, idx, "layer"), image.Close()); err != nil {
		t.Fatal(err)
	}
	target := n.path(name)
	if err := os.MkdirAll(target, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mount.New(mount.Loop, slog.New(slog.DiscardHandler)).Mount(t.Context(), image.Name(), "", target); err != nil {
		t.Fatal(err)
	}
	return target
}

// mountForeign mounts what is not Holdfast's, with a file in it.
func (n *node) mountForeign(t *testing.T, name string) {
	t.Helper()
	n.write(t, "foreign/precious", "precious")
	if err := os.MkdirAll(n.path(name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mount.Bind(n.path("foreign"), n.path(name)); err != nil {
		t.Fatal(err)
	}
}

// refuses checks that nothing is removed, in earnest or not.
func (n *node) refuses(t *testing.T, want string) {
	t.Helper()
	n.refusal(t, want, nil)
}

// refusal wants an error that also is the given one.
func (n *node) refusal(t *testing.T, want string, is error) {
	t.Helper()
	for _, dry := range []bool{true, false} {
		o := n.options
		o.DryRun = dry
		_, err := uninstall.Run(o)
		if err == nil || !strings.Contains(err.Error(), want) || is != nil && !errors.Is(err, is) {
			t.Errorf("dry run %v: error %v, want %q", dry, err, want)
		}
		if !n.exists(t, "lib/holdfast/store/overlay-layers/layers.json") || !n.exists(t, "run/holdfast/records") {
			t.Error("something was removed")
		}
	}
}

func TestUninstall(t *testing.T) {
	n := newNode(t)
	layer := n.mountLayer(t, "run/holdfast/layers/abc")
	record := n.path("run/holdfast/records/base/tree")
	if err := os.MkdirAll(record, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mount.Bind(layer, record); err != nil {
		t.Fatal(err)
	}
	want := &uninstall.Report{
		DryRun: true, Unmounted: []string{record, layer}, Emptied: []string{},
		Removed: []string{n.path("run/holdfast"), n.path("lib/holdfast")},
	}
	o := n.options
	o.DryRun = true
	got, err := uninstall.Run(o)
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Fatalf("dry run: error %v (-want +got):\n%s", err, d)
	}
	if mounted, err := mount.Mounted(layer); err != nil || !mounted || !n.exists(t, "lib/holdfast/layers/abc/data") {
		t.Errorf("a dry run changed something: mounted %v, error %v", mounted, err)
	}
	want.DryRun = false
	got, err = uninstall.Run(n.options)
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("error %v (-want +got):\n%s", err, d)
	}
	if n.exists(t, "lib/holdfast") || n.exists(t, "run/holdfast") || !n.exists(t, "lib") {
		t.Error("the wrong directories are gone")
	}
	again, err := uninstall.Run(n.options)
	if err != nil || len(again.Removed)+len(again.Unmounted) > 0 {
		t.Errorf("again: %+v, error %v", again, err)
	}
}

func TestRefusesWhileInUse(t *testing.T) {
	for name, list := range map[string][2]string{
		"an image":    {"overlay-images/images.json", `[{"id":"i","names":["quay.io/x:1"],"layer":"top"}]`},
		"a container": {"overlay-containers/containers.json", `[{"id":"db","layer":"base"}]`},
		"a layer":     {"overlay-layers/layers.json", `[{"id":"own","parent":"base"}]`},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.write(t, filepath.Join("runtime", list[0]), list[1])
			n.refusal(t, "in use: "+strings.Fields(name)[1], prepare.ErrInUse)
			n.write(t, filepath.Join("runtime", list[0]), `[]`)
			if _, err := uninstall.Run(n.options); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRefusesWhatItCannotRead(t *testing.T) {
	n := newNode(t)
	n.write(t, "runtime/overlay-images/images.json", `[{"id":`)
	n.refuses(t, "runtime/overlay-images/images.json")
	n.write(t, "runtime/overlay-images/images.json", `[]`)
	n.write(t, "lib/holdfast/store/overlay-layers/layers.json", `[{`)
	n.refuses(t, "reading records")
	n.write(t, "lib/holdfast/store/overlay-layers/layers.json", `[]`)
	n.write(t, "etc/storage.conf", "[storage\n")
	n.refuses(t, "etc/storage.conf")
}

func TestRefusesWhileListed(t *testing.T) {
	for name, c := range map[string]struct {
		file, text string
		listed     bool
	}{
		"storage.conf":       {"etc/storage.conf", "[storage.options]\nadditionalimagestores = [\"/x\", \"STORE/\"]", true},
		"commented out":      {"etc/storage.conf", "[storage.options]\nadditionalimagestores = [\"/x\"] # \"STORE\"", false},
		"another store":      {"etc/storage.conf", "[storage.options]\nadditionalimagestores = [\"STORE2\"]", false},
		"by a link":          {"etc/storage.conf", "[storage.options]\nadditionalimagestores = [\"LINK\"]", true},
		"CRI-O":              {"etc/crio.conf.d/10-x.conf", "[crio]\nstorage_option = [\"overlay.imagestore=/x,STORE\"]", true},
		"CRI-O, its runtime": {"etc/crio.conf.d/10-x.conf", "[[crio.x]]\ny = [\"STORE\"]", true},
		"no file":            {"etc/crio.conf.d/.keep", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			if err := os.Symlink(n.path("lib/holdfast/store"), n.path("link")); err != nil {
				t.Fatal(err)
			}
			n.write(t, c.file, strings.NewReplacer("STORE", n.path("lib/holdfast/store"), "LINK", n.path("link")).Replace(c.text))
			if c.listed {
				n.refuses(t, c.file+" lists")
				return
			}
			if _, err := uninstall.Run(n.options); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRefusesWhileTheDaemonRuns(t *testing.T) {
	for _, dir := range []string{"lib/holdfast", "run/holdfast"} {
		n := newNode(t)
		f, err := os.Open(n.path(dir + "/daemon.lock"))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		n.refuses(t, "systemctl disable --now holdfast")
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := uninstall.Run(n.options); err != nil {
			t.Error(err)
		}
	}
}

// What somebody has mounted there is neither deleted nor unmounted.
func TestRefusesForeignMounts(t *testing.T) {
	for _, name := range []string{"run/holdfast/x", "lib/holdfast/layers/x"} {
		n := newNode(t)
		n.mountForeign(t, name)
		n.refuses(t, "mounted at "+n.path(name))
		if !n.exists(t, "foreign/precious") || !n.exists(t, name+"/precious") {
			t.Error("it is gone")
		}
	}
}

func TestRefusesForeignDirectories(t *testing.T) {
	n := newNode(t)
	if err := os.Remove(n.path("lib/holdfast/daemon.lock")); err != nil {
		t.Fatal(err)
	}
	n.refuses(t, "does not look like")
	n = newNode(t)
	n.options.Config.RuntimeRoots = []string{n.path("lib/holdfast/storage")}
	n.refuses(t, "the store of a runtime")
}

func TestADirectoryThatIsAMountStays(t *testing.T) {
	n := newNode(t)
	if err := mount.Bind(n.path("lib/holdfast"), n.path("lib/holdfast")); err != nil {
		t.Fatal(err)
	}
	got, err := uninstall.Run(n.options)
	if err != nil || cmp.Diff([]string{n.path("lib/holdfast")}, got.Emptied) != "" {
		t.Errorf("report %+v, error %v", got, err)
	}
	if entries, err := os.ReadDir(n.path("lib/holdfast")); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, error %v", entries, err)
	}
}

// The directories may be behind links, and the store may be somewhere else.
func TestOtherPlaces(t *testing.T) {
	n := newNode(t)
	if err := os.Symlink("run", n.path("var-run")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(n.path("lib/holdfast/store"), n.path("store")); err != nil {
		t.Fatal(err)
	}
	n.options.Config.ImageStore = n.path("store")
	n.options.Config.RunRoot = n.path("var-run/holdfast")
	layer := n.mountLayer(t, "run/holdfast/layers/abc")
	got, err := uninstall.Run(n.options)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{n.path("run/holdfast"), n.path("store"), n.path("lib/holdfast")}
	if d := cmp.Diff(want, got.Removed) + cmp.Diff([]string{layer}, got.Unmounted); d != "" {
		t.Error(d)
	}
}

// What an installation makes goes although no daemon has ever run.
func TestNeverStarted(t *testing.T) {
	n := newNode(t)
	for _, name := range []string{"lib/holdfast/layers", "lib/holdfast/daemon.lock", "run"} {
		if err := os.RemoveAll(n.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := uninstall.Run(n.options); err != nil || n.exists(t, "lib/holdfast") {
		t.Errorf("error %v", err)
	}
}
