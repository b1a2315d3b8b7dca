// SPDX-License-Identifier: Apache-2.0

package repotest

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	imagetypes "go.podman.io/image/v5/types"
	"go.podman.io/storage/types"

	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/imagestore"
)

// TestInstall checks what `make install` puts where.
func TestInstall(t *testing.T) {
	dest := t.TempDir()
	command(t, "make", "--no-print-directory", "install", "DESTDIR="+dest, "BIN="+t.TempDir(), "PREFIX=/opt/holdfast")
	in := func(path string) string { return filepath.Join(dest, path) }
	const program, hook = "/opt/holdfast/bin/holdfast", "/opt/holdfast/bin/holdfast-pull-hook"

	t.Run("hook", func(t *testing.T) {
		if got, err := os.Readlink(in(hook)); err != nil || got != "holdfast" {
			t.Errorf("the hook links to %q, %v", got, err)
		}
		run := exec.CommandContext(t.Context(), in(hook)) // its parent is none of the runtimes
		run.Stdin = strings.NewReader("{}")
		if out, err := run.CombinedOutput(); err != nil {
			t.Errorf("the hook: %v: %s", err, out)
		}
	})
	t.Run("registries.conf.d", func(t *testing.T) {
		main := filepath.Join(t.TempDir(), "registries.conf")
		if err := os.WriteFile(main, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := sysregistriesv2.AdditionalLayerStoreAuthHelper(&imagetypes.SystemContext{
			SystemRegistriesConfPath: main, SystemRegistriesConfDirPath: in("/etc/containers/registries.conf.d"),
		})
		if err != nil || got != hook {
			t.Errorf("runtimes run the hook %q, %v; want %s", got, err, hook)
		}
	})
	t.Run("configuration", func(t *testing.T) {
		want, err := config.Default()
		if err != nil {
			t.Fatal(err)
		}
		got, err := config.Load(in(config.DefaultPath))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("installed settings (+) are not the default ones (-):\n%s", d)
		}
	})
	t.Run("unit", func(t *testing.T) {
		unit, err := os.ReadFile(in("/etc/systemd/system/holdfast.service"))
		if err != nil {
			t.Fatal(err)
		}
		// systemd-analyze looks for the program.
		here := string(unit)
		for _, key := range []string{"ExecStart=", "ExecReload="} {
			before := here
			if here = strings.Replace(here, key+program+" ", key+in(program)+" ", 1); here == before {
				t.Errorf("%s does not run %s", key, program)
			}
		}
		verifyUnit(t, "holdfast.service", here)
		unit, err = os.ReadFile(in("/etc/systemd/system/holdfast-agent.service"))
		if err != nil {
			t.Fatal(err)
		}
		operator := "ExecStart=/opt/holdfast/bin/holdfast-operator "
		if !strings.Contains(string(unit), operator) {
			t.Errorf("the agent's unit does not run %s", operator)
		}
		verifyUnit(t, "holdfast-agent.service", strings.Replace(string(unit), operator, "ExecStart="+in("/opt/holdfast/bin/holdfast-operator")+" ", 1))
	})
	t.Run("again", func(t *testing.T) {
		if err := os.WriteFile(in(config.DefaultPath), []byte("log_level = \"debug\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		command(t, "make", "--no-print-directory", "install", "DESTDIR="+dest, "BIN="+t.TempDir(), "PREFIX=/opt/holdfast")
		if got, err := config.Load(in(config.DefaultPath)); err != nil || got.LogLevel != "debug" {
			t.Errorf("a second installation replaced the configuration: %+v, %v", got, err)
		}
	})
}

func verifyUnit(t *testing.T, name, unit string) {
	t.Helper()
	name = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(name, []byte(unit), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", name).CombinedOutput()
	// It says what it ignores, and exits with 0.
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// TestUnit checks what systemd-analyze cannot know.
func TestUnit(t *testing.T) {
	settings := map[string]string{}
	setting := regexp.MustCompile(`(?m)^([A-Za-z]+)=(.*)$`)
	for _, m := range setting.FindAllStringSubmatch(read(t, "deploy/holdfast.service"), -1) {
		settings[m[1]] = m[2]
	}
	for key, want := range map[string]string{"Type": "notify", "KillMode": "mixed", "Restart": "on-failure",
		"OOMPolicy": "continue", "FileDescriptorStoreMax": "1", "WantedBy": "multi-user.target crio.service"} {
		if settings[key] != want {
			t.Errorf("%s=%s, want %s", key, settings[key], want)
		}
	}
	for _, runtime := range []string{"crio.service", "podman.service", "kubelet.service"} {
		if !slices.Contains(strings.Fields(settings["Before"]), runtime) {
			t.Errorf("Before=%s lacks %s", settings["Before"], runtime)
		}
	}
	for _, key := range []string{"Requires", "BindsTo", "Requisite"} {
		if v, ok := settings[key]; ok {
			t.Errorf("%s=%s: the daemon starts without anybody else", key, v)
		}
	}
	// systemd.exec(5): each of these gives the service a mount namespace, or
	// removes the directory that mounts are in.
	apart := regexp.MustCompile(`^(Private|Protect|ReadOnly|ReadWrite|Inaccessible|Exec(Paths)|NoExecPaths|Bind|TemporaryFileSystem|` +
		`MountFlags|MountAPIVFS|MountImages|ExtensionImages|Root(Directory|Image)|DynamicUser|RuntimeDirectory|StateDirectory|CacheDirectory)`)
	for key := range settings {
		if apart.MatchString(key) {
			t.Errorf("%s hides the daemon's mounts from the host, or takes them away", key)
		}
	}
}

// TestTmpfilesMakeTheStore compares the store that is made at installation and
// at boot with the one that the daemon makes.
func TestTmpfilesMakeTheStore(t *testing.T) {
	cfg, err := config.Default()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	source, err := filepath.Abs(filepath.Join(root, "deploy/tmpfiles.d/holdfast.conf"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it finds all of it
		command(t, "systemd-tmpfiles", "--root="+dir, "--create", source)
	}
	if _, err := imagestore.Create(filepath.Join(dir, "daemon"), filepath.Join(dir, "records")); err != nil {
		t.Fatal(err)
	}
	want, got := tree(t, filepath.Join(dir, "daemon")), tree(t, filepath.Join(dir, cfg.StorePath()))
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("what tmpfiles.d makes (+) is not what the daemon makes (-):\n%s", d)
	}
	if info, err := os.Stat(filepath.Join(dir, cfg.Root)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%s has mode %v, %v: others could run an image's setuid files", cfg.Root, info.Mode(), err)
	}
}

// tree describes all files below a directory.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		all[rel] = info.Mode().String()
		if d.Type().IsRegular() {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			all[rel] += fmt.Sprintf(" %q", content)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestStorageConf(t *testing.T) {
	cfg, err := config.Default()
	if err != nil {
		t.Fatal(err)
	}
	name, err := filepath.Abs(filepath.Join(root, "deploy/storage.conf"))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("CONTAINERS_STORAGE_CONF", name)
	got, err := types.LoadStoreOptions(types.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if want := "imagestore=" + cfg.StorePath(); !slices.Contains(got.GraphDriverOptions, want) {
		t.Errorf("containers/storage reads the options %q, want %q", got.GraphDriverOptions, want)
	}
	if !slices.Contains(cfg.RuntimeRoots, got.GraphRoot) {
		t.Errorf("the graph root %s is not among runtime_roots, %q", got.GraphRoot, cfg.RuntimeRoots)
	}
}
