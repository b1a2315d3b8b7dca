// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"
	"go.podman.io/storage/pkg/mount"
	"go.podman.io/storage/pkg/reexec"
)

func TestMain(m *testing.M) {
	if reexec.Init() {
		return
	}
	os.Exit(m.Run())
}

// chain returns layers whose trees look like mounts of package erofs.
func chain(t *testing.T, n int) []Layer {
	t.Helper()
	dir := t.TempDir()
	var layers []Layer
	parent := ""
	for i := range n {
		l := probeLayer(parent, "layer "+string(rune('a'+i)), dir)
		if err := os.MkdirAll(filepath.Join(l.MountDirectory, "diff", "of", string(rune('a'+i))), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"link", "lower", "lower-layers"} {
			if err := os.Symlink("../"+name, filepath.Join(l.MountDirectory, name)); err != nil {
				t.Fatal(err)
			}
		}
		layers, parent = append(layers, l), l.ID
	}
	return layers
}

func create(t *testing.T) *Store {
	t.Helper()
	dir := t.TempDir()
	s, err := Create(filepath.Join(dir, "store"), filepath.Join(dir, "records"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Detach(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func read(t *testing.T, s *Store, name ...string) string {
	t.Helper()
	data, err := os.ReadFile(s.path(name...))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func ids(layers []Layer) []string {
	var ids []string
	for _, l := range layers {
		ids = append(ids, l.ID)
	}
	return ids
}

func TestProbeIsReadByContainersStorage(t *testing.T) {
	dir := t.TempDir()
	if err := Probe(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	mounts, err := mount.GetMounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if rel, err := filepath.Rel(dir, m.Mountpoint); err == nil && filepath.IsLocal(rel) {
			t.Errorf("mount left behind: %s", m.Mountpoint)
		}
	}
}

func TestPublish(t *testing.T) {
	s, c := create(t), chain(t, 3)
	if err := s.Publish(t.Context(), c[:1]); err != nil {
		t.Fatal(err)
	}
	if err := s.Publish(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := s.Publish(t.Context(), c); err != nil {
		t.Fatalf("publishing again: %v", err)
	}
	got, err := s.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(c, got, cmpopts.IgnoreFields(Layer{}, "MountDirectory")); d != "" {
		t.Error(d)
	}
	up := strings.Repeat("../", 10)
	if got := read(t, s, driverDir, c[1].ID, "link"); got != up+c[1].MountDirectory[1:]+"/l/x" {
		t.Errorf("link is %q", got)
	}
	if got, want := read(t, s, driverDir, c[2].ID, "lower"), up+c[1].MountDirectory[1:]+"/l/x:"+up+c[0].MountDirectory[1:]+"/l/x"; got != want {
		t.Errorf("lower is %q, want %q", got, want)
	}
	if got, want := read(t, s, driverDir, c[2].ID, "lower-layers"), c[1].ID+":"+c[0].ID; got != want {
		t.Errorf("lower-layers is %q, want %q", got, want)
	}
	for _, name := range []string{"lower", "lower-layers"} {
		if _, err := os.Stat(s.path(driverDir, c[0].ID, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the base has a file %s (%v)", name, err)
		}
	}
	for i, l := range c {
		if _, err := os.Stat(s.path(driverDir, l.ID, "diff", "of", string(rune('a'+i)))); err != nil {
			t.Error(err)
		}
		if got, err := os.Readlink(s.path(driverDir, l.name())); err != nil || got != l.MountDirectory {
			t.Errorf("the name of layer %d leads to %q (%v)", i, got, err)
		}
	}
	if err := s.Detach(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.path(driverDir, c[0].ID)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a detached layer resolves (%v)", err)
	}
}

func TestPublishRefusesBrokenChains(t *testing.T) {
	s, c := create(t), chain(t, 2)
	for name, bad := range map[string][]Layer{
		"mount by another name": {{ID: c[0].ID, DiffID: c[0].DiffID, BlobDigest: c[0].BlobDigest, MountDirectory: "/x"}},
		"no blob":               {{ID: c[0].ID, DiffID: c[0].DiffID, MountDirectory: c[0].MountDirectory}},
		"no parent":             c[1:],
		"wrong order":           {c[1], c[0]},
		"path as id":            {{ID: "../../etc", DiffID: c[0].DiffID, MountDirectory: "/x"}},
		"wrong id":              {{ID: c[1].ID, DiffID: c[0].DiffID, MountDirectory: "/x"}},
		"relative mount":        {{ID: c[0].ID, DiffID: c[0].DiffID, MountDirectory: "x"}},
	} {
		if err := s.Publish(t.Context(), bad); err == nil {
			t.Errorf("%s: published", name)
		}
		if got, err := s.Layers(); err != nil || len(got) != 0 {
			t.Errorf("%s: records %v, %v", name, got, err)
		}
	}
}

func TestWithdraw(t *testing.T) {
	s, c := create(t), chain(t, 3)
	if err := s.Publish(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := s.Withdraw(t.Context(), c[0].ID); err == nil {
		t.Error("withdrew a parent")
	}
	if err := s.Withdraw(t.Context(), c[1].ID, c[2].ID, "unknown"); err != nil {
		t.Fatal(err)
	}
	got, err := s.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(ids(c[:1]), ids(got)); d != "" {
		t.Error(d)
	}
	for _, name := range []string{c[1].ID, c[1].name()} {
		if _, err := os.Lstat(s.path(driverDir, name)); err == nil {
			t.Errorf("%s of a withdrawn layer is still there", name)
		}
	}
	if _, err := os.Lstat(s.path(driverDir, c[0].name())); err != nil {
		t.Error(err)
	}
}

func TestRecover(t *testing.T) {
	s, c := create(t), chain(t, 3)
	if err := s.Publish(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	lower := read(t, s, driverDir, c[2].ID, "lower")
	if err := os.RemoveAll(s.path(driverDir, c[2].ID)); err != nil {
		t.Fatal(err)
	}
	stray := digest.FromString("stray").Encoded()
	if err := os.Mkdir(s.path(driverDir, stray), 0o700); err != nil {
		t.Fatal(err)
	}
	known := func(d digest.Digest) (string, bool) {
		for _, l := range c {
			if l.BlobDigest == d {
				return l.MountDirectory, true
			}
		}
		return "", false
	}
	broken, err := s.Recover(t.Context(), known)
	if err != nil || len(broken) != 0 {
		t.Fatalf("Recover: %v, %v", broken, err)
	}
	if got := read(t, s, driverDir, c[2].ID, "lower"); got != lower {
		t.Errorf("lower is %q, want %q", got, lower)
	}
	if _, err := os.Stat(s.path(driverDir, stray)); err == nil {
		t.Error("stray directory is still there")
	}
	broken, err = s.Recover(t.Context(), func(d digest.Digest) (string, bool) {
		dir, ok := known(d)
		return dir, ok && d != c[1].BlobDigest
	})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(ids(c[1:]), broken); d != "" {
		t.Error(d)
	}
	if _, err := os.Stat(s.path(driverDir, c[1].ID)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a layer that is not mounted resolves (%v)", err)
	}
	if _, err := os.Stat(s.path(driverDir, c[0].ID, "diff")); err != nil {
		t.Error(err)
	}
}

func TestLockHonoursContext(t *testing.T) {
	s, c := create(t), chain(t, 1)
	unlock, err := s.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Publish(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
