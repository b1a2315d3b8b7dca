// SPDX-License-Identifier: Apache-2.0

// Package refpattern matches image references against the patterns of settings.
//
// A pattern is a host, optionally followed by path components and a tag:
// "quay.io", "quay.io/models", "*.example.com/team-*/app:v1". A star stands for
// any characters but a slash. What a pattern names includes all below it. A
// pattern that starts with "!" takes out of what the others name.
package refpattern

import (
	"fmt"
	"path"
	"strings"

	"go.podman.io/image/v5/docker/reference"
)

// List is a list of patterns.
type List []string

// Validate reports the first pattern that does not parse.
func (l List) Validate() error {
	for _, p := range l {
		name, tag := split(strings.TrimPrefix(p, "!"))
		for part := range strings.SplitSeq(name, "/") {
			if _, err := path.Match(part, ""); err != nil || part == "" {
				return fmt.Errorf("reference pattern %q: want HOST[/PATH][:TAG], with * for any characters but a slash", p)
			}
		}
		if _, err := path.Match(tag, ""); err != nil {
			return fmt.Errorf("reference pattern %q: bad tag pattern", p)
		}
	}
	return nil
}

// Match reports whether the list names the reference.
func (l List) Match(ref reference.Named) bool {
	found := false
	for _, p := range l {
		if rest, not := strings.CutPrefix(p, "!"); not {
			if match(rest, ref) {
				return false
			}
		} else if match(p, ref) {
			found = true
		}
	}
	return found
}

func match(pattern string, ref reference.Named) bool {
	name, tag := split(pattern)
	if tag != "" {
		tagged, ok := ref.(reference.Tagged)
		if !ok || !matchPart(tag, tagged.Tag()) {
			return false
		}
	}
	want, got := strings.Split(name, "/"), strings.Split(ref.Name(), "/")
	if len(want) > len(got) {
		return false
	}
	for i := range want {
		if !matchPart(want[i], got[i]) {
			return false
		}
	}
	// A tag names one repository, not all below it.
	return tag == "" || len(want) == len(got)
}

func matchPart(pattern, s string) bool {
	ok, err := path.Match(pattern, s)
	return ok && err == nil
}

// split cuts the tag off; a colon before the last slash belongs to a port, and
// so does one in a pattern that is a host only.
func split(pattern string) (name, tag string) {
	slash := strings.LastIndexByte(pattern, '/')
	if colon := strings.LastIndexByte(pattern, ':'); slash >= 0 && colon > slash {
		return pattern[:colon], pattern[colon+1:]
	}
	return pattern, ""
}
