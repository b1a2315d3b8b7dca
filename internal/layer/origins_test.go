// SPDX-License-Identifier: Apache-2.0

package layer

import "testing"

func TestMayGive(t *testing.T) {
	of := func(public bool, repositories ...string) *Layer {
		l := &Layer{lending: &lending{}}
		for _, r := range repositories {
			l.AddOrigin(r, public)
			l.AddOrigin(r, false) // another image: it stays public
		}
		return l
	}
	for _, tt := range []struct {
		name     string
		from, to *Layer
		want     bool
	}{
		{"public to anybody", of(true, "a"), of(false, "b"), true},
		{"public to one that is not known", of(true, "a"), of(false), true},
		{"within a repository", of(false, "a"), of(false, "a"), true},
		{"to a public image of the repository", of(false, "a"), of(true, "a"), true},
		{"to another repository", of(false, "a"), of(false, "b"), false},
		{"to another repository, which is public", of(false, "a"), of(true, "b"), false},
		{"all that it is in have it", of(false, "a", "b", "c"), of(false, "c", "a"), true},
		{"one that it is in does not", of(false, "a", "b"), of(false, "a", "c"), false},
		{"from one that is not known", of(false), of(false, "a"), false},
		{"to one that is not known", of(false, "a"), of(false), false},
		{"between two that are not", of(false), of(false), false},
	} {
		if got := mayGive(tt.from, tt.to); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
	if l := of(false); !mayGive(l, l) {
		t.Error("a layer may not have its own content")
	}
}
