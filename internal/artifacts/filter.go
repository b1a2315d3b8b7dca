// SPDX-License-Identifier: Apache-2.0

package artifacts

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/refpattern"
)

// Filter says what is taken of a store. The zero Filter takes all.
type Filter struct {
	// References are patterns of names; if all of them take out, the rest is taken.
	References refpattern.List
	// Types are patterns of artifact types.
	Types []string
	// MaxSize is how many bytes the files of an artifact may have; 0: any.
	MaxSize int64
}

// Validate reports what of a filter does not parse.
func (f Filter) Validate() error {
	if err := f.References.Validate(); err != nil {
		return err
	}
	for _, t := range f.Types {
		if _, err := path.Match(strings.TrimPrefix(t, "!"), ""); err != nil || strings.TrimPrefix(t, "!") == "" {
			return fmt.Errorf("artifact type pattern %q: want a media type, with * for any characters but a slash, ! to take out", t)
		}
	}
	if f.MaxSize < 0 {
		return fmt.Errorf("max_size %d: want 0 or more", f.MaxSize)
	}
	return nil
}

// refuses returns why an artifact is left out, "" if it is taken.
func (f Filter) refuses(name reference.Named, a *artifactstore.Artifact) string {
	switch {
	case !f.takesName(name):
		return "its name does not match the filter"
	case !f.takesType(a.Type()):
		return fmt.Sprintf("its type %s does not match the filter", a.Type())
	case f.MaxSize > 0 && a.Size() > f.MaxSize:
		return fmt.Sprintf("its %s are more than the filter's max_size", units.BytesSize(float64(a.Size())))
	}
	return ""
}

func takesOut(pattern string) bool { return strings.HasPrefix(pattern, "!") }

func (f Filter) takesName(name reference.Named) bool {
	patterns := f.References
	if !slices.ContainsFunc(patterns, func(p string) bool { return !takesOut(p) }) {
		patterns = append(slices.Clone(patterns), "*")
	}
	return patterns.Match(name)
}

func (f Filter) takesType(t string) bool {
	found := !slices.ContainsFunc(f.Types, func(p string) bool { return !takesOut(p) })
	for _, p := range f.Types {
		if ok, err := path.Match(strings.TrimPrefix(p, "!"), t); err == nil && ok {
			if takesOut(p) {
				return false
			}
			found = true
		}
	}
	return found
}
