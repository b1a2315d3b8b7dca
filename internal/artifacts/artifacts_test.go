// SPDX-License-Identifier: Apache-2.0

package artifacts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/shards"
	"github.com/holdfast/holdfast/internal/sources"
)

func artifact(kind string, size int64) *artifactstore.Artifact {
	return &artifactstore.Artifact{Manifest: v1.Manifest{ArtifactType: kind, Layers: []v1.Descriptor{{Size: size}}}}
}

func TestFilter(t *testing.T) {
	for _, c := range []struct {
		f    Filter
		name string
		a    *artifactstore.Artifact
		want bool
	}{
		{Filter{}, "quay.io/a/b:1", artifact("x/y", 5), true},
		{Filter{References: []string{"quay.io/a/*"}}, "quay.io/a/b:1", artifact("x/y", 5), true},
		{Filter{References: []string{"quay.io/a/*"}}, "quay.io/b/b:1", artifact("x/y", 5), false},
		{Filter{References: []string{"quay.io/a/*", "!quay.io/a/b"}}, "quay.io/a/b:1", artifact("x/y", 5), false},
		{Filter{References: []string{"!quay.io/a/b"}}, "quay.io/a/c:1", artifact("x/y", 5), true},
		{Filter{References: []string{"!quay.io/a/b"}}, "quay.io/a/b:1", artifact("x/y", 5), false},
		{Filter{Types: []string{"x/*"}}, "quay.io/a/b:1", artifact("x/y", 5), true},
		{Filter{Types: []string{"y/*"}}, "quay.io/a/b:1", artifact("x/y", 5), false},
		{Filter{Types: []string{"!x/*"}}, "quay.io/a/b:1", artifact("x/y", 5), false},
		{Filter{Types: []string{"!y/*"}}, "quay.io/a/b:1", artifact("x/y", 5), true},
		{Filter{MaxSize: 5}, "quay.io/a/b:1", artifact("x/y", 5), true},
		{Filter{MaxSize: 4}, "quay.io/a/b:1", artifact("x/y", 5), false},
	} {
		ref, err := reference.ParseNamed(c.name)
		if err != nil {
			t.Fatal(err)
		}
		if why := c.f.refuses(ref, c.a); (why == "") != c.want {
			t.Errorf("%+v for %s: %q", c.f, c.name, why)
		}
	}
	for _, bad := range []Filter{{References: []string{"a//b"}}, {Types: []string{"["}}, {Types: []string{"!"}}, {MaxSize: -1}} {
		if bad.Validate() == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"quay.io/a/b:1": true, "quay.io/a/b": true, "b": true, // as docker.io/library/b:latest
		"quay.io/a/*:v*": true, "quay.io/a/b:*": true, "quay.io/*/b": true, "127.0.0.1:5000/m/*:v1": true,
		"*/a:1": false, "quay.io": true, "quay.io/": false, "quay.io/A*:1": true, "quay.io/[": false, "": false, "Not a name": false,
		"quay.io/a:1@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855": false,
	} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// newManager returns a manager of stores, which runs until the end of the test.
func newManager(t *testing.T, stores ...Store) *Manager {
	t.Helper()
	dir := t.TempDir()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	blobs, err := lazyblob.NewSet(lazyblob.Config{
		Root: filepath.Join(dir, "blobs"), Mounts: filepath.Join(dir, "mounts"), Space: cache.NewSpace(0, log),
		Scheduler: device.NewScheduler(1), Logger: log, Changed: func() {},
	})
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(Config{
		Dir: filepath.Join(dir, "store"), State: filepath.Join(dir, "state.json"), Stores: stores, Interval: time.Hour,
		Sources: sources.New(sources.Config{}), Blobs: blobs, Wake: make(chan struct{}, 1), Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-done, blobs.Close()); err != nil {
			t.Error(err)
		}
	})
	return m
}

// store makes a store that has artifacts with one file each, by their names.
func store(t *testing.T, content map[string]string) string {
	t.Helper()
	path := t.TempDir()
	s, err := artifactstore.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range content {
		file := filepath.Join(t.TempDir(), "w")
		err := os.WriteFile(file, []byte(text), 0o600)
		if err == nil {
			_, err = s.AddFiles(t.Context(), name, []string{file}, artifactstore.FileOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// offers returns what readers see, by name: the content of the file of each.
func (m *Manager) offers(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, dir := range shards.Directories(m.config.Dir) {
		l := artifactstore.Layout(dir)
		list, err := artifactstore.List(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		idx, err := l.Index(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range idx.Manifests {
			if seen[d.Digest.String()] {
				t.Errorf("%s is listed twice", d.Digest)
			}
			seen[d.Digest.String()] = true
		}
		for _, a := range list {
			if dir != shards.Directories(m.config.Dir)[shards.Of(a.Name)] || a.Error != "" {
				t.Errorf("%s in %s: %s", a.Name, dir, a.Error)
			}
			text, err := os.ReadFile(filepath.Join(dir, "artifacts", "blobs", "sha256", a.Files[0].Digest.Encoded()))
			if err != nil {
				t.Error(err)
			}
			all[a.Name] = string(text)
		}
	}
	return all
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what + ": not yet")
		}
	}
}

// Many names of one digest: wherever two are listed together, they have manifests of
// their own.
func TestManyNames(t *testing.T) {
	want := map[string]string{}
	for i := range 2 * shards.Count {
		want[fmt.Sprintf("quay.io/models/m%d:1", i)] = "the same"
	}
	m := newManager(t, Store{Path: store(t, want)})
	if got := m.offers(t); len(got) != len(want) {
		t.Errorf("%d of %d names: %v", len(got), len(want), got)
	}
}

// A store that hangs holds up nothing: neither the others, nor readers, nor the end.
func TestHangingStore(t *testing.T) {
	hangs := filepath.Join(t.TempDir(), "hangs")
	if err := os.Mkdir(hangs, 0o700); err != nil {
		t.Fatal(err)
	}
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("deaf", hangs, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev.Fd())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(dev.Close(), unix.Unmount(hangs, unix.MNT_DETACH)); err != nil { // closing ends all requests
			t.Error(err)
		}
	})
	m := newManager(t, Store{Path: hangs}, Store{Path: store(t, map[string]string{"quay.io/m/a:1": "a"})})
	if got := m.offers(t); got["quay.io/m/a:1"] != "a" {
		t.Errorf("offered %v", got)
	}
	s := m.Status()
	if !strings.Contains(s.Stores[0].Error, errSlow.Error()) || s.Stores[1].Error != "" || s.Artifacts[0].From != m.stores[1].Path {
		t.Errorf("%+v", s)
	}
}

// A file that is not what its digest says is not offered where files are compared.
func TestVerifiedStore(t *testing.T) {
	path := store(t, map[string]string{"quay.io/m/good:1": "good", "quay.io/m/lies:1": "lies"})
	all, err := artifactstore.List(t.Context(), artifactstore.Layout(path))
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(a artifactstore.Summary) bool { return a.Name == "quay.io/m/lies:1" })
	if err := os.WriteFile(filepath.Join(path, "artifacts", "blobs", "sha256", all[i].Files[0].Digest.Encoded()), []byte("LIES"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, Store{Path: path, Verify: true})
	if got := m.offers(t); len(got) != 1 || got["quay.io/m/good:1"] != "good" {
		t.Errorf("offered %v", got)
	}
	if s := m.Status().Stores[0]; len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "quay.io/m/lies:1") {
		t.Errorf("%+v", s)
	}
}

// Whoever looks all the time sees whole lists, also when a reader holds the lock.
func TestLocked(t *testing.T) {
	path := store(t, map[string]string{"quay.io/m/a:1": "a"})
	m := newManager(t, Store{Path: path})
	lock, err := os.OpenFile(filepath.Join(shards.Directories(m.config.Dir)[shards.Of("quay.io/m/a:1")], "artifacts", "index.lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close() //nolint:errcheck // ends the lock
	held := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &held); err != nil {
		t.Fatal(err)
	}
	s, err := artifactstore.Open(path)
	if err == nil {
		err = errors.Join(s.Remove(t.Context(), "quay.io/m/a:1"), s.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the store to be looked at", func() bool { return m.Status().Stores[0].Artifacts == 0 })
	if got := m.offers(t); got["quay.io/m/a:1"] != "a" {
		t.Errorf("changed under a reader: %v", got)
	}
	held.Type = unix.F_UNLCK
	if err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &held); err != nil {
		t.Fatal(err)
	}
	await(t, "the change", func() bool { return len(m.offers(t)) == 0 })
}

// What was looked up lately is left alone, unless its files are gone.
func TestOutdated(t *testing.T) {
	m := &Manager{config: Config{Interval: time.Hour, Blobs: new(lazyblob.Set)}, lazy: map[string]*lazy{}} // which does not run
	empty := artifact("x/y", 0)
	empty.Layers, empty.Config.Digest = nil, digest.FromString("{}")
	gone := artifact("x/y", 1)
	gone.Config.Digest, gone.Layers[0].Digest = empty.Config.Digest, digest.FromString("w")
	for name, l := range map[string]*lazy{
		"quay.io/a/fresh:1": {artifact: empty, checked: time.Now()}, "quay.io/a/old:1": {artifact: empty},
		"quay.io/a/gone:1": {artifact: gone, checked: time.Now()}, "quay.io/a/unknown:1": {checked: time.Now()}, "quay.io/a/failed:1": {artifact: empty, checked: time.Now(), err: errSlow},
		"quay.io/a/fixed@" + digest.FromString("m").String(): {artifact: empty}, "quay.io/b/fixed@" + digest.FromString("m").String(): {artifact: gone},
	} {
		ref, err := reference.ParseNamed(name)
		if err != nil {
			t.Fatal(err)
		}
		l.ref, l.prepared, l.config = ref, true, []byte("{}")
		m.lazy[name] = l
	}
	var got []string
	for _, l := range m.outdated() {
		got = append(got, l.ref.Name())
	}
	if want := []string{"quay.io/a/failed", "quay.io/a/gone", "quay.io/a/old", "quay.io/a/unknown", "quay.io/b/fixed"}; !slices.Equal(got, want) {
		t.Errorf("outdated %v", got)
	}
}

// A damaged state is no reason not to start.
func TestDamagedState(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state.json")
	for _, text := range []string{"{", `[{"name":"Not A Name"},{"name":"quay.io/a/b:1","manifest":"e30="},{"name":"quay.io/a/c:1","prepared":true}]`} {
		if err := os.WriteFile(state, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := New(Config{State: state, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if text[0] == '[' && (len(m.lazy) != 1 || !m.lazy["quay.io/a/c:1"].prepared) {
			t.Errorf("%v", m.lazy)
		}
	}
	if _, err := New(Config{State: state, Names: []string{"*/x"}, Logger: slog.New(slog.DiscardHandler)}); err == nil {
		t.Error("a bad pattern is taken")
	}
}
