// SPDX-License-Identifier: Apache-2.0

package sharedstore_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/killtest"
	"github.com/holdfast/holdfast/internal/sharedstore"
	"github.com/holdfast/holdfast/internal/testimage"
)

// killed kills an operation on a store at each of its steps. At each a runtime sees the
// images that it always sees and those whose change is complete; whatever Verify finds
// has the remedy that the next writer tidies up; and the next writer does.
func killed(t *testing.T, before func(t *testing.T, s *sharedstore.Store), args []string, always []string, again func(t *testing.T, s *sharedstore.Store)) {
	t.Helper()
	saved := create(t)
	before(t, saved)
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		root := filepath.Join(t.TempDir(), "store")
		if out, err := exec.CommandContext(t.Context(), "cp", "-a", saved.Root(), root).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		kill(t, append([]string{root}, args...))
		names := runtime(t, root)
		for _, n := range always {
			if !slices.Contains(names, n) {
				t.Errorf("a runtime sees %q", names)
			}
		}
		s, err := sharedstore.Open(root)
		if err != nil {
			t.Fatal(err)
		}
		r, err := s.Verify(t.Context(), noProgress)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range r.Problems {
			if !strings.Contains(p.Remedy, "holdfast store prune") {
				t.Errorf("%+v", p)
			}
		}
		again(t, s)
		if r := clean(t, s); len(r.Notes) > 0 {
			t.Errorf("%+v", r)
		}
		if left, err := os.ReadDir(filepath.Join(root, "staging")); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	})
}

func TestKilledAdd(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		s, err := sharedstore.Open(in.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		img, err := made{dir: in.Args[1], name: app}.load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return func() error {
			_, err := s.Add(context.Background(), img, noProgress)
			return err
		}
	})
	m := makeImage(t, app, testimage.Gzip, tree(1), tree(3))
	killed(t, func(t *testing.T, s *sharedstore.Store) {
		t.Helper()
		mustAdd(t, s, makeImage(t, other, testimage.Gzip, tree(1), tree(2)))
	}, []string{m.dir}, []string{other}, func(t *testing.T, s *sharedstore.Store) {
		t.Helper()
		if a := mustAdd(t, s, m); a.Layers != 2 {
			t.Errorf("%+v", a)
		}
		if got := runtime(t, s.Root()); !slices.Equal(got, []string{app, other}) {
			t.Errorf("a runtime sees %q", got)
		}
	})
}

func TestKilledPrune(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		s, err := sharedstore.Open(in.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		return func() error {
			_, err := s.Prune(context.Background(), sharedstore.PruneOptions{})
			return err
		}
	})
	killed(t, func(t *testing.T, s *sharedstore.Store) {
		t.Helper()
		mustAdd(t, s, makeImage(t, other, testimage.Gzip, tree(1), tree(2)))
		mustAdd(t, s, makeImage(t, app, testimage.Gzip, tree(1), tree(3)))
		if err := s.Remove(t.Context(), app); err != nil {
			t.Fatal(err)
		}
	}, nil, []string{other}, func(t *testing.T, s *sharedstore.Store) {
		t.Helper()
		if _, err := s.Prune(t.Context(), sharedstore.PruneOptions{}); err != nil {
			t.Error(err)
		}
		if r := clean(t, s); r.Layers != 2 || r.Images != 1 {
			t.Errorf("%+v", r)
		}
	})
}

func TestKilledRemove(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		s, err := sharedstore.Open(in.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		return func() error { return s.Remove(context.Background(), app) }
	})
	killed(t, func(t *testing.T, s *sharedstore.Store) {
		t.Helper()
		mustAdd(t, s, makeImage(t, other, testimage.Gzip, tree(1)))
		mustAdd(t, s, makeImage(t, app, testimage.Gzip, tree(1), tree(3)))
	}, nil, []string{other}, func(t *testing.T, s *sharedstore.Store) {
		t.Helper()
		mustAdd(t, s, makeImage(t, app, testimage.Gzip, tree(1), tree(3)))
	})
}
