// SPDX-License-Identifier: Apache-2.0

package killtest_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/killtest"
)

func TestEachStep(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		dir := in.Args[0]
		return func() error {
			fmt.Println("not a step") // nor is reading
			if _, err := os.ReadDir(dir); err != nil {
				return err
			}
			if _, err := in.Files[0].Write([]byte("x")); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, "a"), []byte("text"), 0o600); err != nil {
				return err
			}
			done := make(chan error) // another thread
			go func() { done <- os.Mkdir(filepath.Join(dir, "b"), 0o700) }()
			if err := <-done; err != nil {
				return err
			}
			return os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, "b", "c"))
		}
	})
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var got []string
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		dir := t.TempDir()
		kill(t, []string{dir}, file)
		got = append(got, list(t, dir))
	})
	want := []string{"", "", "a:", "a:text", "a:text b", "b b/c:text"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if content, err := os.ReadFile(file.Name()); err != nil || len(content) != 5 {
		t.Errorf("the file that was passed has %q, error %v", content, err)
	}
}

func list(t *testing.T, dir string) string {
	t.Helper()
	text := ""
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if text != "" {
			text += " "
		}
		text += rel
		if d.Type().IsRegular() {
			content, err := os.ReadFile(path)
			text += ":" + string(content)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}
