// SPDX-License-Identifier: Apache-2.0

package mirrorconf_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"go.podman.io/image/v5/types"

	"github.com/holdfast/holdfast/internal/mirrorconf"
)

// node has files of an administrator.
func node(t *testing.T, conf, dropIn string) mirrorconf.Config {
	t.Helper()
	dir := t.TempDir()
	c := mirrorconf.Config{Conf: filepath.Join(dir, "registries.conf"), ConfDir: filepath.Join(dir, "registries.conf.d")}
	write(t, c.Conf, conf)
	if dropIn != "" {
		write(t, filepath.Join(c.ConfDir, "10-admin.conf"), dropIn)
	}
	return c
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// places is where a runtime looks for an image.
func places(t *testing.T, c mirrorconf.Config, image string) (list []string) {
	t.Helper()
	sysregistriesv2.InvalidateCache()
	system := &types.SystemContext{SystemRegistriesConfPath: c.Conf, SystemRegistriesConfDirPath: c.ConfDir}
	ref, err := reference.ParseNamed(image)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := sysregistriesv2.FindRegistry(system, ref.Name())
	if err != nil {
		t.Fatal(err)
	}
	if reg == nil {
		return []string{image}
	}
	if reg.Blocked {
		return []string{"blocked"}
	}
	all, err := reg.PullSourcesFromReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		text := p.Reference.String()
		if p.Endpoint.Insecure {
			text += " insecure"
		}
		list = append(list, text)
	}
	return list
}

const (
	app    = "registry.example.com/team/app"
	mirror = "127.0.0.1:5117/registry.example.com/team/app"
	digest = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

// Runtimes look at the mirror, and then where the administrator says.
func TestPlaces(t *testing.T) {
	for name, c := range map[string]struct {
		conf, dropIn    string
		after           bool
		tag, byDigest   []string
		anotherUnharmed []string
	}{
		"nothing said": {
			tag:      []string{mirror + ":v1 insecure", app + ":v1"},
			byDigest: []string{mirror + digest + " insecure", app + digest}, anotherUnharmed: []string{"registry.example.com/team/other:v1"},
		},
		"after the registry": {
			after: true, tag: []string{app + ":v1", mirror + ":v1 insecure", app + ":v1"},
			byDigest: []string{app + digest, mirror + digest + " insecure", app + digest}, anotherUnharmed: []string{"registry.example.com/team/other:v1"},
		},
		"mirrors and another location": {
			conf: "[[registry]]\nprefix = \"registry.example.com/team\"\nlocation = \"real.example.com/t\"\n[[registry.mirror]]\nlocation = \"m1.example.com/x\"\ninsecure = true\n" +
				"[[registry.mirror]]\nlocation = \"m2.example.com\"\npull-from-mirror = \"digest-only\"\n",
			tag:             []string{mirror + ":v1 insecure", "m1.example.com/x/app:v1 insecure", "real.example.com/t/app:v1"},
			byDigest:        []string{mirror + digest + " insecure", "m1.example.com/x/app" + digest + " insecure", "m2.example.com/app" + digest, "real.example.com/t/app" + digest},
			anotherUnharmed: []string{"m1.example.com/x/other:v1 insecure", "real.example.com/t/other:v1"},
		},
		"mirrors by digest only, for subdomains": {
			dropIn:          "[[registry]]\nprefix = \"*.example.com\"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"m.example.org/all\"\n",
			tag:             []string{mirror + ":v1 insecure", app + ":v1"},
			byDigest:        []string{mirror + digest + " insecure", "m.example.org/all/team/app" + digest, app + digest},
			anotherUnharmed: []string{"registry.example.com/team/other:v1"},
		},
		"blocked": {
			conf: "[[registry]]\nlocation = \"registry.example.com\"\nblocked = true\n",
			tag:  []string{"blocked"}, byDigest: []string{"blocked"}, anotherUnharmed: []string{"blocked"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := node(t, c.conf, c.dropIn)
			all := []mirrorconf.Repository{{Name: app, Mirror: mirror, AfterRegistry: c.after}}
			for _, want := range []bool{true, false} { // the second time there is nothing to do
				if changed, err := mirrorconf.Write(n, all); err != nil || changed != want && name != "blocked" {
					t.Errorf("changed %t, %v", changed, err)
				}
			}
			if got := places(t, n, app+":v1"); !slices.Equal(got, c.tag) {
				t.Errorf("by tag: %q, want %q", got, c.tag)
			}
			if got := places(t, n, app+digest); !slices.Equal(got, c.byDigest) {
				t.Errorf("by digest: %q, want %q", got, c.byDigest)
			}
			if got := places(t, n, "registry.example.com/team/other:v1"); !slices.Equal(got, c.anotherUnharmed) {
				t.Errorf("another repository: %q, want %q", got, c.anotherUnharmed)
			}
			if _, err := mirrorconf.Write(n, nil); err != nil {
				t.Error(err)
			}
			if left, err := filepath.Glob(filepath.Join(n.ConfDir, "90-*")); err != nil || len(left) > 0 {
				t.Errorf("left: %q, %v", left, err)
			}
		})
	}
}

// Another's file, and files that could not be read anyway, stay as they are.
func TestNotWritten(t *testing.T) {
	all := []mirrorconf.Repository{{Name: app, Mirror: mirror}}
	n := node(t, "", "")
	theirs := filepath.Join(n.ConfDir, mirrorconf.FileName)
	write(t, theirs, "# mine\n")
	if _, err := mirrorconf.Write(n, all); !errors.Is(err, mirrorconf.ErrForeign) {
		t.Error(err)
	}
	if _, err := mirrorconf.Write(n, nil); !errors.Is(err, mirrorconf.ErrForeign) {
		t.Error(err)
	}
	n = node(t, "", "[[registry]\n")
	if _, err := mirrorconf.Write(n, all); err == nil {
		t.Error("written beside a file that cannot be read")
	}
	if _, err := mirrorconf.Write(node(t, "", ""), []mirrorconf.Repository{{Name: app, Mirror: "http://127.0.0.1:5117/x"}}); err == nil {
		t.Error("written what no runtime can read")
	}
	many := make([]mirrorconf.Repository, mirrorconf.MaxRepositories+1)
	if _, err := mirrorconf.Write(node(t, "", ""), many); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Error(err)
	}
	n = node(t, "", "")
	before := n.Stamp()
	write(t, filepath.Join(n.ConfDir, "20-new.conf"), "")
	if n.Stamp() == before {
		t.Error("a new file makes no difference")
	}
}
