// SPDX-License-Identifier: Apache-2.0

package refpattern

import (
	"testing"

	"go.podman.io/image/v5/docker/reference"
)

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		list List
		ref  string
		want bool
	}{
		{nil, "quay.io/a/b:1", false},
		{List{"*"}, "quay.io/a/b:1", true},
		{List{"quay.io"}, "quay.io/a/b:1", true},
		{List{"quay.io"}, "quay.io.evil.com/a/b:1", false},
		{List{"quay.io/a"}, "quay.io/a/b:1", true},
		{List{"quay.io/a"}, "quay.io/ab/b:1", false},
		{List{"quay.io/a/*"}, "quay.io/a/b/c:1", true},
		{List{"quay.io/a/*"}, "quay.io/a:1", false},
		{List{"quay.io/a/b:v*"}, "quay.io/a/b:v1", true},
		{List{"quay.io/a/b:v*"}, "quay.io/a/b:1", false},
		{List{"quay.io/a:1"}, "quay.io/a/b:1", false},
		{List{"quay.io/a/b:1"}, "quay.io/a/b@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", false},
		{List{"*.example.com"}, "r.example.com/x", true},
		{List{"*.example.com"}, "example.com/x", false},
		{List{"127.0.0.1:5000"}, "127.0.0.1:5000/x:1", true},
		{List{"127.0.0.1:*"}, "127.0.0.1:5000/x:1", true},
		{List{"127.0.0.1:5000/x"}, "127.0.0.1:5001/x:1", false},
		{List{"quay.io", "!quay.io/a/secret"}, "quay.io/a/secret:1", false},
		{List{"!quay.io/a/secret", "quay.io"}, "quay.io/a/secret:1", false},
		{List{"quay.io", "!quay.io/a/secret"}, "quay.io/a/b:1", true},
		{List{"docker.io/library"}, "docker.io/library/debian:13", true},
	} {
		ref, err := reference.ParseNormalizedNamed(c.ref)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.list.Match(ref); got != c.want {
			t.Errorf("%v matches %s: %t", c.list, c.ref, got)
		}
	}
}

func TestValidate(t *testing.T) {
	for _, bad := range []string{"", "!", "a//b", "[", "quay.io/a:[", "/a"} {
		if (List{bad}).Validate() == nil {
			t.Errorf("%q is taken for a pattern", bad)
		}
	}
	if err := (List{"*", "quay.io", "!quay.io/a/*:v1"}).Validate(); err != nil {
		t.Error(err)
	}
}
