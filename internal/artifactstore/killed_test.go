// SPDX-License-Identifier: Apache-2.0

package artifactstore_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/killtest"
)

// An addition, a move of a name and a removal that are killed at any step: a reader sees
// what was there before or after, all of it, and the next command goes on.
func TestKilled(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		s, err := artifactstore.Open(in.Args[0])
		return func() error {
			if err != nil {
				return err
			}
			_, err := s.AddFiles(context.Background(), llama, []string{in.Args[1]}, artifactstore.FileOptions{})
			if err == nil {
				err = s.Remove(context.Background(), second)
			}
			return errors.Join(err, s.Close())
		}
	})
	old, moved := files(t, map[string]string{"w": "old"}), files(t, map[string]string{"w": "moved", "v": "v"})
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		path := t.TempDir()
		s := open(t, path)
		for _, name := range []string{llama, second} {
			if _, err := s.AddFiles(t.Context(), name, []string{old}, artifactstore.FileOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		kill(t, []string{path, moved})
		if p := verify(t, path); len(p) > 0 {
			t.Errorf("%+v", p)
		}
		all := list(t, path)
		if len(all) < 1 || len(all) > 2 {
			t.Errorf("%+v", all)
		}
		s = open(t, path)
		added, err := s.AddFiles(t.Context(), llama, []string{moved}, artifactstore.FileOptions{})
		if err != nil || added.Size != 6 {
			t.Errorf("%+v, %v", added, err)
		}
		if _, err := s.Prune(t.Context(), 0, false); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(filepath.Join(path, "artifacts", ".ingest")); err != nil || len(left) > 0 {
			t.Errorf("left %v, %v", left, err)
		}
	})
}
