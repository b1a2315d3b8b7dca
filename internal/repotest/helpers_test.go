// SPDX-License-Identifier: Apache-2.0

package repotest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const module = "github.com/holdfast/holdfast"

// root is the root of the repository; tests run in their package's directory.
const root = "../.."

// command runs a program in the root of the repository and returns what it
// prints on stdout. A program that is missing is a failure.
func command(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = root
	// A make that runs these tests must not talk to one that they run.
	cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return out
}

// pkg is what go list says of a package.
type pkg struct {
	ImportPath, Dir, Name, Doc string
	GoFiles, Imports           []string
}

// path is the package's path in the repository.
func (p pkg) path() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

// packages lists the packages of the module that have more than tests.
func packages(t *testing.T) []pkg {
	t.Helper()
	out := command(t, "go", "list", "-json=ImportPath,Dir,Name,Doc,GoFiles,Imports", "./...")
	var all []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		if len(p.GoFiles) > 0 {
			all = append(all, p)
		}
	}
}

// files lists the repository's files whose names match one of the patterns, by
// their paths from the root. What builds and runs leave behind is left out.
func files(t *testing.T, patterns ...string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch rel {
		case ".git", "bin", ".demo", ".bench":
			if !d.IsDir() {
				return nil // .git in a worktree
			}
			return fs.SkipDir
		}
		for _, p := range patterns {
			if ok, err := filepath.Match(p, d.Name()); err != nil {
				return err
			} else if ok && d.Type().IsRegular() {
				all = append(all, rel)
				break
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatalf("no file matches %q", patterns)
	}
	return all
}

func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
