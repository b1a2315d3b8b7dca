// SPDX-License-Identifier: Apache-2.0

package render

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRebase(t *testing.T) {
	for _, c := range []struct{ name, base, written, edited, want string }{
		{"comment", "[a]\nx = 1\n", "[a]\nx = 1\ny = [\"/s\"]\n", "# mine\n[a]\nx = 1\ny = [\"/s\"]\n", "# mine\n[a]\nx = 1\n"},
		{"theirs", "[a]\nx = 1\n", "[a]\nx = 2\n", "[a]\nx = 3\nz = 1\n", "[a]\nx = 3\nz = 1\n"},
		{"ours", "[a]\nx = 1\n", "[a]\nx = 2\n", "[a]\nx = 2\nz = 1\n", "[a]\nx = 1\nz = 1\n"},
		{"a list", "[a]\ny = [\"/b\"]\n", "[a]\ny = [\"/b\", \"/s\"]\n", "[a]\ny = [\"/b\", \"/s\", \"/t\"]\n", "[a]\ny = [\"/b\", \"/t\"]\n"},
		{"a list without ours", "[a]\ny = []\n", "[a]\ny = [\"/s\"]\n", "[a]\ny = []\n", "[a]\ny = []\n"},
		{"gone", "[a]\ny = []\n", "[a]\ny = [\"/s\"]\n", "[a]\n", "[a]\n"},
		{"tables", "s = []\n", "s = [{path = \"/a\"}]\n", "s = [{path = \"/a\"}] # x\n", "s = [] # x\n"},
	} {
		got, err := Rebase([]byte(c.base), []byte(c.written), []byte(c.edited))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if diff := cmp.Diff(c.want, string(got)); diff != "" {
			t.Errorf("%s:\n%s", c.name, diff)
		}
	}
	if _, err := Rebase(nil, nil, []byte("x = [")); err == nil {
		t.Error("a file that is not TOML has become a base")
	}
}
