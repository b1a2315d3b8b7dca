// SPDX-License-Identifier: Apache-2.0

package bundle_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/bundle"
	"github.com/holdfast/holdfast/internal/killtest"
)

// An import that is killed at any step leaves a layout that verifies, and goes on when it
// is run again.
func TestKilledImport(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		return func() error {
			w, err := ocidir.Create(in.Args[1])
			if err != nil {
				return err
			}
			_, err = pack(context.Background(), ocidir.New(in.Args[0]), w, bundle.Options{}, app, weights)
			return errors.Join(err, w.Close())
		}
	})
	from := newSource(t)
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		dir := filepath.Join(t.TempDir(), "to")
		kill(t, []string{from.Path(), dir})
		l := ocidir.New(dir)
		if _, err := l.Index(t.Context()); err == nil {
			if r := verify(t, dir); len(r.Problems) > 0 {
				t.Errorf("%+v", r)
			}
		}
		w, err := ocidir.Create(dir)
		if err != nil {
			t.Fatal(err)
		}
		_, err = pack(t.Context(), from.Layout, w, bundle.Options{}, app, weights)
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		if r := verify(t, dir); len(r.Problems) > 0 || len(r.Names) != 3 || len(r.Notes) > 0 {
			t.Errorf("%+v", r)
		}
	})
}

// An archive is there whole, or not at all.
func TestKilledArchive(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		return func() error {
			a, err := ocidir.CreateArchive(in.Args[1])
			if err != nil {
				return err
			}
			_, err = pack(context.Background(), ocidir.New(in.Args[0]), a, bundle.Options{}, weights)
			return errors.Join(err, a.Close())
		}
	})
	from := newSource(t)
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		path := filepath.Join(t.TempDir(), "b.tar")
		kill(t, []string{from.Path(), path})
		if _, err := os.Stat(path); err != nil {
			return
		}
		if r := verify(t, path); len(r.Problems) > 0 || len(r.Names) != 1 {
			t.Errorf("%+v", r)
		}
	})
}
