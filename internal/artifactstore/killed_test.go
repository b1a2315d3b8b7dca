// SPDX-License-Identifier: Apache-2.0

package artifactstore_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

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
		var seen []string
		for _, a := range list(t, path) {
			seen = append(seen, fmt.Sprintf("%s %d", a.Name, a.Size))
		}
		slices.Sort(seen)
		before, between, after := []string{llama + " 3", second + " 3"}, []string{llama + " 6", second + " 3"}, []string{llama + " 6"}
		if !slices.Equal(seen, before) && !slices.Equal(seen, between) && !slices.Equal(seen, after) {
			t.Errorf("a reader sees %q", seen)
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

// The clock of files that were needed in between begins anew, even if who listed them was
// killed before it could say so.
func TestKilledClock(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		s, err := artifactstore.Open(in.Args[0])
		return func() error {
			if err != nil {
				return err
			}
			_, err := s.AddFiles(context.Background(), llama, []string{in.Args[1]}, artifactstore.FileOptions{})
			return errors.Join(err, s.Close())
		}
	})
	dir := files(t, map[string]string{"w": "weights"})
	const grace = 24 * time.Hour
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		path := t.TempDir()
		s := open(t, path)
		if _, err := s.AddFiles(t.Context(), llama, []string{dir}, artifactstore.FileOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.Remove(t.Context(), llama), age(path, 2*grace)); err != nil {
			t.Fatal(err)
		}
		if all, err := s.Prune(t.Context(), grace, true); err != nil || len(all) != 3 || !all[0].Remove {
			t.Fatalf("%+v, %v", all, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		kill(t, []string{path, dir})
		if len(list(t, path)) == 0 {
			return // nothing has needed them
		}
		s = open(t, path)
		if err := s.Remove(t.Context(), llama); err != nil {
			t.Fatal(err)
		}
		all, err := s.Prune(t.Context(), grace, true)
		if err != nil || len(all) != 3 || all[0].Remove || all[1].Remove || all[2].Remove {
			t.Errorf("%+v, %v", all, err)
		}
	})
}

// age makes all clocks of a store older.
func age(path string, by time.Duration) error {
	name := filepath.Join(path, "artifacts", ".unneeded.json")
	body, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var since map[string]time.Time
	if err := json.Unmarshal(body, &since); err != nil {
		return err
	}
	for d, at := range since {
		since[d] = at.Add(-by)
	}
	if body, err = json.Marshal(since); err != nil {
		return err
	}
	return os.WriteFile(name, body, 0o600)
}
