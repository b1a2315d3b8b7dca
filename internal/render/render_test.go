// SPDX-License-Identifier: Apache-2.0

package render

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	ignition "github.com/coreos/ignition/v2/config/v3_2"
	"github.com/google/go-cmp/cmp"
	"github.com/vincent-petithory/dataurl"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	imagetypes "go.podman.io/image/v5/types"
	"go.podman.io/storage/types"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/config"
)

var update = flag.Bool("update", false, "write what is rendered to testdata")

// objects reads the objects of a case.
func objects(t *testing.T, name string) []apiv1.ContainerRuntimeConfig {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	all, err := apiv1.ParseContainerRuntimeConfigs(data)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range all {
		if errs := o.Validate(); len(errs) > 0 {
			t.Fatal(errs)
		}
	}
	return all
}

// TestGolden renders each case of testdata: objects.yaml on base/ is want/.
func TestGolden(t *testing.T) {
	cases, err := filepath.Glob("testdata/*")
	if err != nil || len(cases) < 5 {
		t.Fatalf("%d cases: %v", len(cases), err)
	}
	for _, dir := range cases {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			spec, problems := Merge(objects(t, filepath.Join(dir, "objects.yaml")))
			base := BaseDir(filepath.Join(dir, "base"))
			if _, err := os.Stat(filepath.Join(dir, "base")); errors.Is(err, fs.ErrNotExist) {
				base = NoBase
			}
			files, err := Files(spec, base, Options{})
			if err != nil {
				t.Fatal(err)
			}
			checkGolden(t, filepath.Join(dir, "want"), files)
			checkLoads(t, filepath.Join(dir, "base"), spec, files)
			checkIgnition(t, files)
			again, err := Files(spec, base, Options{})
			if err != nil || !cmp.Equal(files, again) {
				t.Errorf("rendered twice, it differs: %v", err)
			}
			var text []string
			for _, p := range problems {
				text = append(text, strings.Join(p.Objects, ",")+": "+p.Reason+": "+p.Message)
			}
			compare(t, filepath.Join(dir, "problems"), []byte(strings.Join(append(text, ""), "\n")))
		})
	}
}

func checkGolden(t *testing.T, dir string, files []File) {
	t.Helper()
	if *update {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	var want []string
	for _, f := range files {
		name := filepath.Join(dir, f.Path)
		compare(t, name, f.Data)
		want = append(want, name)
	}
	var got []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			got = append(got, path)
		}
		return nil
	})
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files:\n%s", diff)
	}
}

func compare(t *testing.T, name string, got []byte) {
	t.Helper()
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s: -want +got, -update if it is right\n%s", name, diff)
	}
}

// checkLoads has the programs' own parsers read the files: a root directory with
// the base, and the files over it.
func checkLoads(t *testing.T, base string, spec apiv1.ContainerRuntimeConfigSpec, files []File) {
	t.Helper()
	root := t.TempDir()
	if _, err := os.Stat(base); err == nil {
		if err := os.CopyFS(root, os.DirFS(base)); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range files {
		name := filepath.Join(root, f.Path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, f.Data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	options, err := types.LoadStoreOptions(types.LoadOptions{RootForImplicitAbsolutePaths: root})
	if err != nil {
		t.Fatalf("containers/storage: %v", err)
	}
	daemon, err := DaemonPaths(BaseDir(root))
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, s := range spec.ContainerRuntimeConfig.AdditionalImageStores {
		want = append(want, "imagestore="+filepath.Clean(string(s.Path)))
	}
	for _, s := range spec.ContainerRuntimeConfig.AdditionalLayerStores {
		if !daemon.Own(s.Path) {
			want = append(want, "additionallayerstore="+string(s.Path)+":ref")
		}
	}
	if UsesDaemon(spec, daemon) {
		want = append(want, "imagestore="+daemon.Store)
	}
	if size := spec.ContainerRuntimeConfig.OverlaySize; size != nil && !size.IsZero() {
		want = append(want, fmt.Sprintf("overlay.size=%d", size.Value()))
	}
	for _, o := range want {
		if !slices.Contains(options.GraphDriverOptions, o) {
			t.Errorf("containers/storage does not find %s in %v", o, options.GraphDriverOptions)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "registries.conf"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	registries := &imagetypes.SystemContext{SystemRegistriesConfPath: filepath.Join(root, "registries.conf"), SystemRegistriesConfDirPath: filepath.Join(root, "etc/containers/registries.conf.d")}
	helper, err := sysregistriesv2.AdditionalLayerStoreAuthHelper(registries)
	if (helper != "") != UsesDaemon(spec, daemon) || err != nil {
		t.Errorf("registries.conf.d: the hook is %q: %v", helper, err)
	}
	if spec.Holdfast != nil {
		for _, m := range spec.Holdfast.RegistryMirrors {
			r, err := sysregistriesv2.FindRegistry(registries, strings.Replace(m.Source, "*", "x", 1)+"/a/b")
			if err != nil || r == nil || len(r.Mirrors) != len(m.Mirrors) || r.Mirrors[0].Location != m.Mirrors[0] {
				t.Errorf("registries.conf.d: %s is %v: %v", m.Source, r, err)
			}
		}
	}
	checkCRIO(t, root, spec)
	checkDaemon(t, filepath.Join(root, DaemonConf), spec)
}

func checkCRIO(t *testing.T, root string, spec apiv1.ContainerRuntimeConfigSpec) {
	t.Helper()
	var crio struct {
		CRIO struct {
			Runtime struct {
				Stores    []string `toml:"additional_artifact_stores"`
				PidsLimit int64    `toml:"pids_limit"`
				LogLevel  string   `toml:"log_level"`
			} `toml:"runtime"`
		} `toml:"crio"`
	}
	names, err := filepath.Glob(filepath.Join(root, CRIODropIns, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		meta, err := toml.DecodeFile(name, &crio)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if len(meta.Keys()) != 3 {
			t.Errorf("%s says more than one thing: %v", name, meta.Keys())
		}
	}
	got, want := crio.CRIO.Runtime, spec.ContainerRuntimeConfig
	if got.LogLevel != want.LogLevel || want.PidsLimit != nil && got.PidsLimit != *want.PidsLimit || (len(got.Stores) > 0) != (len(want.AdditionalArtifactStores) > 0) {
		t.Errorf("CRI-O reads %+v", got)
	}
}

func checkDaemon(t *testing.T, name string, spec apiv1.ContainerRuntimeConfigSpec) {
	t.Helper()
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return
	}
	c, err := config.Load(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.ArtifactStores) != len(spec.ContainerRuntimeConfig.AdditionalArtifactStores) {
		t.Errorf("artifact stores %v", c.ArtifactStores)
	}
	if h := spec.Holdfast; h != nil && !slices.Equal(texts(h.Trusted), c.Trusted) {
		t.Errorf("trusted %v", c.Trusted)
	}
}

func checkIgnition(t *testing.T, files []File) {
	t.Helper()
	mc, err := MachineConfig("worker", files)
	if err != nil {
		t.Fatal(err)
	}
	parsed, report, err := ignition.Parse(mc.Spec.Config.Raw)
	if err != nil || len(report.Entries) > 0 {
		t.Fatalf("%v\n%s", err, report)
	}
	if len(parsed.Storage.Files) != len(files) {
		t.Fatalf("%d files of %d", len(parsed.Storage.Files), len(files))
	}
	for i, f := range parsed.Storage.Files {
		url, err := dataurl.DecodeString(*f.Contents.Source)
		if err != nil || f.Path != files[i].Path || !bytes.Equal(url.Data, files[i].Data) || *f.Mode != 0o644 {
			t.Errorf("%s: %v", f.Path, err)
		}
	}
}

// The paths without a configuration of the daemon are those of the daemon.
func TestDaemonDefaults(t *testing.T) {
	want, err := config.Default()
	if err != nil {
		t.Fatal(err)
	}
	got, err := DaemonPaths(NoBase)
	if err != nil || got.Root != want.Root || got.RunRoot != want.RunRoot || got.Store != want.StorePath() {
		t.Errorf("%+v, %v", got, err)
	}
	c := config.Config{RunRoot: "/r"}
	if dir := c.ArtifactStorePath(); dir != "/r/artifact-store" {
		t.Errorf("the composed store is %s", dir)
	}
}

func TestWithoutDaemon(t *testing.T) {
	spec, _ := Merge(objects(t, "testdata/daemon/objects.yaml"))
	files, err := Files(spec, NoBase, Options{WithoutDaemon: true})
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{}
	for _, f := range files {
		names[f.Path] = string(f.Data)
	}
	if len(names) != 2 || names[MirrorsConf] == "" || names[ArtifactsConf] != "[crio]\n  [crio.runtime]\n    additional_artifact_stores = [\"/mnt/ssd-artifacts\"]\n" {
		t.Errorf("%v", names)
	}
}

// What an administrator has made of the files decides whether they can be changed.
func TestUnreadableBase(t *testing.T) {
	spec, _ := Merge(objects(t, "testdata/lazy/objects.yaml"))
	for _, c := range []struct{ name, text, want string }{
		{StorageConf, "[storage", "reading /etc/containers/storage.conf: parsing TOML"},
		{StorageConf, "[storage]\noptions = {size = \"\"}\n", "write it as a key below the header [storage.options]"},
		{StorageConf, "[storage.options]\nadditionalimagestores = \"x\"\n", "want an array of strings"},
		{DaemonConf, "trusted = [", "reading /etc/holdfast/config.toml"},
	} {
		_, err := Files(spec, func(path string) ([]byte, error) {
			if path == c.name {
				return []byte(c.text), nil
			}
			return NoBase(path)
		}, Options{})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v", c.text, err)
		}
	}
}

func TestBaseDirStaysInside(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "etc/containers"), 0o755), os.Symlink("/etc/passwd", filepath.Join(dir, StorageConf)),
		os.MkdirAll(filepath.Join(dir, DaemonConf), 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{StorageConf, DaemonConf, "/../" + filepath.Base(dir)} {
		if data, err := BaseDir(dir)(name); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	if _, err := BaseDir(dir)(HookConf); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
