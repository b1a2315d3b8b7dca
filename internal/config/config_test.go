// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestDefaultNamesEverySetting(t *testing.T) {
	c, err := Default()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	for _, name := range names(reflect.TypeFor[Config](), "") {
		if !strings.Contains(DefaultFile, "\n"+name+" = ") {
			t.Errorf("default.toml does not have %s", name)
		}
	}
}

// names are those of all settings, with the names of the tables that they are in.
func names(typ reflect.Type, prefix string) (all []string) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		name := prefix + f.Tag.Get("toml")
		if f.Type == reflect.TypeFor[Index]() {
			all = append(all, names(f.Type, name+".")...)
			continue
		}
		all = append(all, name)
	}
	return all
}

func TestLoad(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", ""},
		{"good", "trusted = [\"quay.io/a\"]\nread_timeout = \"5s\"\ntop_layer_limit = \"1GB\"", ""},
		{"unknown", "thrusted = []", `unknown setting "thrusted"`},
		{"syntax", "root = ", "config.toml"},
		{"relative", `root = "var"`, `root = "var": want an absolute path`},
		{"dots", `root = "/var/../etc"`, "without . or .."},
		{"pattern", `trusted = ["a["]`, "trusted: reference pattern"},
		{"size", `read_ahead = "many"`, `size "many"`},
		{"time", `read_timeout = "2"`, `time span "2"`},
		{"zero time", `hook_timeout = "0s"`, "want more than 0"},
		{"no limit", `cache_limit = "0"`, ""},
		{"percentage", `cache_limit = "many%"`, `share "many%": want a size such as`},
		{"more than all", `cache_limit = "101%"`, `share "101%"`},
		{"not a number", `cache_limit = "NaN%"`, `share "NaN%"`},
		{"limit", `cache_limit = "half"`, `size "half"`},
		{"negative grace", `gc_grace = "-1s"`, "want 0s or more"},
		{"fill rate", `fill = "50MiB"`, ""},
		{"no fill", `fill = "off"`, ""},
		{"fill", `fill = "fast"`, `pace "fast": want on, off,`},
		{"fill what is missing", `fill = "missing"`, ""},
		{"fill what is missing at a rate", `fill = "missing 1MiB"`, ""},
		{"fill what is missing, fast", `fill = "missing fast"`, `pace "missing fast"`},
		{"no profiles", `profile = "off"`, ""},
		{"profile", `profile = "maybe"`, `profile = "maybe": want on or off`},
		{"no time to settle", `profile_settle = "0s"`, "want more than 0"},
		{"no grace", `gc_grace = "0s"`, ""},
		{"mount", `mount = "fuse"`, "want auto, file or loop"},
		{"own store as runtime", `runtime_roots = ["/var/lib/holdfast/store"]`, "own directory"},
		{"relative auth file", `auth_files = ["config.json"]`, "auth_files: \"config.json\": want absolute paths"},
		{"providers without programs", `credential_provider_config = "/etc/providers.yaml"`, "want both or none"},
		{"relative providers", "credential_provider_config = \"/etc/providers.yaml\"\ncredential_provider_bin_dir = \"bin\"", "want an absolute path"},
		{"index places", `index.stores = ["registry", "/mnt/indexes", "docker://quay.io/team/indexes"]`, ""},
		{"index table", "[index]\npublish = [\"/mnt/indexes\"]\ntrust = \"bound\"\nbuild = false", ""},
		{"index place", `index.stores = ["mnt"]`, `index.stores: "mnt": want "registry"`},
		{"index repository with tag", `index.publish = ["docker://quay.io/a:1"]`, "without a tag"},
		{"index repository without host", `index.publish = ["docker://team/indexes"]`, "docker://HOST/REPOSITORY"},
		{"trust", `index.trust = "full"`, `trust "full": want found, bound or verified`},
		{"runtime path", `runtimes = ["/usr/bin/podman"]`, "without a path"},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "config.toml")
			if err := os.WriteFile(name, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := Load(name)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if c.name == "good" && (time.Duration(got.ReadTimeout) != 5*time.Second || got.TopLayerLimit != 1<<30 || got.Root != "/var/lib/holdfast") {
					t.Errorf("got %+v", got)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestShare(t *testing.T) {
	for _, c := range []struct {
		text string
		want int64 // of 1000
		back string
	}{
		{"", 0, ""}, {"0", 0, ""}, {"0%", 0, ""}, {"50%", 500, "50%"}, {"100%", 1000, "100%"},
		{"12.5%", 125, "12.5%"}, {"100GiB", 100 << 30, "100GiB"}, {"1kb", 1024, "1KiB"},
	} {
		var s Share
		if err := s.UnmarshalText([]byte(c.text)); err != nil {
			t.Errorf("%q: %v", c.text, err)
		}
		back, err := s.MarshalText()
		if got := s.Of(1000); got != c.want || string(back) != c.back || err != nil {
			t.Errorf("%q: %d bytes, written as %q, error %v", c.text, got, back, err)
		}
	}
}

func TestPace(t *testing.T) {
	for _, c := range []struct {
		text string
		want Pace
		back string
	}{
		{"on", Pace{}, "on"}, {"off", Pace{Off: true}, "off"}, {"1mb", Pace{Rate: 1 << 20}, "1MiB"},
		{"missing", Pace{Missing: true}, "missing"}, {"missing 1mb", Pace{Missing: true, Rate: 1 << 20}, "missing 1MiB"},
	} {
		var p Pace
		err := p.UnmarshalText([]byte(c.text))
		if back, werr := p.MarshalText(); p != c.want || string(back) != c.back || err != nil || werr != nil {
			t.Errorf("%q: %+v, written as %q, errors %v, %v", c.text, p, back, err, werr)
		}
	}
	for _, text := range []string{"", "missing 0", "missing -1", "missing  ", "missing on", "missing50MiB", "0", "-1", "Missing"} {
		if err := new(Pace).UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

func TestLoadMissingFile(t *testing.T) {
	if _, err := Load(filepath.Join(t.TempDir(), "config.toml")); err == nil {
		t.Error("a file that was named and does not exist was taken for an empty one")
	}
}
