// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"testing"

	"github.com/holdfast/holdfast/internal/blob/registry"
)

// The rows are what kubelet is known to do; they were not compared with its source.
func TestMatches(t *testing.T) {
	for _, tt := range []struct {
		pattern, image string
		want           bool
	}{
		{"123456789.dkr.ecr.us-east-1.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com/app", true},
		{"*.dkr.ecr.*.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com/team/app", true},
		{"*.dkr.ecr.*.amazonaws.com", "dkr.ecr.us-east-1.amazonaws.com/app", false},
		{"*.azurecr.io", "mine.azurecr.io/app", true},
		{"*.azurecr.io", "azurecr.io/app", false},
		{"*.azurecr.io", "a.b.azurecr.io/app", false},
		{"*.*.registry.io", "foo.bar.registry.io/app", true},
		{"app*.k8s.io", "app1.k8s.io/app", true},
		{"app?.k8s.io", "app12.k8s.io/app", false},
		{"gcr.io", "gcr.io/project/app", true},
		{"gcr.io", "eu.gcr.io/project/app", false},
		{"registry.io:8080/path", "registry.io:8080/path/app", true},
		{"registry.io:8080/path", "registry.io/path/app", false},
		{"registry.io/path", "registry.io:8080/path/app", false},
		{"registry.io/path", "registry.io/path", true},
		{"registry.io/path", "registry.io/other/path", false},
		{"registry.io/*", "registry.io/path", false},
		{"[.io", "x.io/app", false},
		{"a[.io", "a.io/app", false},
		{"%zz", "a.io/app", false},
		{"", "a.io/app", false},
	} {
		if got := matches(tt.pattern, tt.image); got != tt.want {
			t.Errorf("%q for %s: %v", tt.pattern, tt.image, got)
		}
	}
}

func TestPick(t *testing.T) {
	all := auths{
		"registry.io":                      login(1),
		"*.io":                             login(2),
		"registry.io/team":                 login(3),
		"https://registry.io/v2/team/app/": login(4),
		"https://index.docker.io/v1/":      login(5),
		"empty.io":                         {},
	}
	for _, tt := range []struct {
		image   string
		refused []registry.Credentials
		want    registry.Credentials
	}{
		{"registry.io/other", nil, login(1)},
		{"registry.io/team/x", nil, login(3)},
		{"registry.io/team/app/x", nil, login(4)},
		{"registry.io/team/x", []registry.Credentials{login(3)}, login(1)},
		{"registry.io/team/x", []registry.Credentials{login(3), login(1)}, login(2)},
		{"registry.io/team/x", []registry.Credentials{login(3), login(2), login(1)}, registry.Credentials{}},
		{"docker.io/library/x", nil, login(5)},
		{"other.org/x", nil, registry.Credentials{}},
		{"empty.io/x", nil, login(2)},
	} {
		if got := all.pick(tt.image, tt.refused); got != tt.want {
			t.Errorf("%s without %d: %s; want %s", tt.image, len(tt.refused), password(got), password(tt.want))
		}
	}
}

func TestNormalize(t *testing.T) {
	for key, want := range map[string]string{
		"quay.io":                     "quay.io",
		"quay.io/":                    "quay.io",
		"http://quay.io:80/v1/":       "quay.io:80",
		"https://quay.io/v2":          "quay.io",
		"https://quay.io/v2/team":     "quay.io/team",
		"quay.io/v1team":              "quay.io/v1team",
		"https://index.docker.io/v1/": "docker.io",
		"registry-1.docker.io":        "docker.io",
	} {
		if got := normalize(key); got != want {
			t.Errorf("%s = %s; want %s", key, got, want)
		}
	}
}

func FuzzMatches(f *testing.F) {
	f.Add("*.azurecr.io", "mine.azurecr.io/app")
	f.Add("[.io", "a:1/b")
	f.Add("https://[::1]:x/", "[::1]/x")
	f.Fuzz(func(_ *testing.T, pattern, image string) {
		matches(normalize(pattern), image)
	})
}
