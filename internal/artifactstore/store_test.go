// SPDX-License-Identifier: Apache-2.0

package artifactstore_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/bundle"
	"github.com/holdfast/holdfast/internal/image"
)

const (
	llama  = "quay.io/models/llama:8b"
	second = "quay.io/models/second:1"
)

// open opens a store until the end of the test.
func open(t testing.TB, path string) *artifactstore.Store {
	t.Helper()
	s, err := artifactstore.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // twice, perhaps
	return s
}

// files writes files below a directory of the test's.
func files(t testing.TB, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range content {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func list(t testing.TB, path string) []artifactstore.Summary {
	t.Helper()
	all, err := artifactstore.List(t.Context(), artifactstore.Layout(path))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func verify(t testing.TB, path string) []artifactstore.Problem {
	t.Helper()
	r, err := artifactstore.Verify(t.Context(), path, func(digest.Digest, int64, int64) {})
	if err != nil {
		t.Fatal(err)
	}
	return r.Problems
}

// source is a layout that has one artifact, listed under a name.
func source(t testing.TB, name string, m v1.Manifest, blobs ...string) *ocidir.Writer {
	t.Helper()
	w, err := ocidir.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range append(blobs, string(body), "{}") {
		if err := w.Put(t.Context(), blob.Descriptor{Digest: digest.FromString(b), Size: int64(len(b))}, strings.NewReader(b)); err != nil {
			t.Fatal(err)
		}
	}
	err = w.List(t.Context(), func([]v1.Descriptor) ([]v1.Descriptor, error) {
		return []v1.Descriptor{{MediaType: m.MediaType, Digest: digest.FromBytes(body), Size: int64(len(body)), Annotations: map[string]string{v1.AnnotationRefName: name}}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func manifest(artifactType string, layers map[string]string) v1.Manifest {
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: artifactType,
		Config: v1.Descriptor{MediaType: v1.MediaTypeEmptyJSON, Digest: digest.FromString("{}"), Size: 2}, Layers: []v1.Descriptor{},
	}
	for name, content := range layers {
		m.Layers = append(m.Layers, v1.Descriptor{
			MediaType: "application/octet-stream", Digest: digest.FromString(content), Size: int64(len(content)), Annotations: map[string]string{v1.AnnotationTitle: name},
		})
	}
	return m
}

func add(t testing.TB, s *artifactstore.Store, from *ocidir.Layout, name string) (*artifactstore.Summary, error) {
	t.Helper()
	return s.Add(t.Context(), bundle.Origin{Name: name, Asked: name, Reader: from, Sources: []blob.Source{from}}, image.Machine(), bundle.Options{})
}

// The same files make the same artifact, in whatever order; names move, and several name
// one digest.
func TestFiles(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	dir := files(t, map[string]string{"config.json": "{}", "sub/w1": "one", "w2": "two"})
	first, err := s.AddFiles(t.Context(), llama, []string{dir}, artifactstore.FileOptions{Type: "application/x.model"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.AddFiles(t.Context(), second, []string{filepath.Join(dir, "w2"), filepath.Join(dir, "config.json"), dir + "/sub/.."}, artifactstore.FileOptions{})
	if err == nil {
		t.Errorf("two files of a name: %+v", again)
	}
	if again, err = s.AddFiles(t.Context(), second, []string{dir}, artifactstore.FileOptions{Type: "application/x.model"}); err != nil || again.Digest != first.Digest {
		t.Fatalf("%+v, %v", again, err)
	}
	all := list(t, path)
	if len(all) != 2 || all[0].Listed != "" || all[1].Listed == "" || all[1].Digest != first.Digest || all[0].Type != "application/x.model" || all[1].Size != 8 || all[0].Files[1].Name != "sub/w1" {
		t.Errorf("%+v", all)
	}
	if p := verify(t, path); len(p) > 0 {
		t.Errorf("%+v", p)
	}
	if err := os.WriteFile(filepath.Join(dir, "w2"), []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddFiles(t.Context(), llama, []string{dir}, artifactstore.FileOptions{}); err != nil {
		t.Fatal(err)
	}
	if all = list(t, path); len(all) != 2 || all[0].Name != second || all[1].Digest == first.Digest {
		t.Errorf("%+v", all)
	}
	body, err := os.ReadFile(filepath.Join(path, "artifacts", "index.json"))
	if err != nil || bytes.Contains(body, []byte("\n ")) {
		t.Errorf("index.json has white space, which readers pay for: %s, %v", body, err)
	}
}

func TestBadFiles(t *testing.T) {
	s := open(t, t.TempDir())
	dir := files(t, map[string]string{"w": "w"})
	if err := errors.Join(os.Symlink("/etc/passwd", filepath.Join(dir, "out"))); err != nil {
		t.Fatal(err)
	}
	pipe := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(pipe, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		name  string
		paths []string
		want  string
	}{
		"no registry":   {"models/llama:8b", []string{dir + "/w"}, "full name with a registry"},
		"no tag":        {"quay.io/models/llama", []string{dir + "/w"}, "full name with a registry and a tag"},
		"leads out":     {llama, []string{dir}, "allow that with --follow-links"},
		"a pipe":        {llama, []string{pipe}, "pipe is no regular file"},
		"nothing":       {llama, []string{t.TempDir()}, "there are no files"},
		"missing":       {llama, []string{dir + "/none"}, "no such file"},
		"a name, twice": {llama, []string{dir + "/w", files(t, map[string]string{"w": "other"})}, "would both be the file w"},
	} {
		if _, err := s.AddFiles(t.Context(), c.name, c.paths, artifactstore.FileOptions{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if idx, err := s.Index(t.Context()); err != nil || len(idx.Manifests) > 0 {
		t.Errorf("%+v, %v", idx, err)
	}
}

// What readers could not read is refused, and so is what leads out of its directory.
func TestParse(t *testing.T) {
	good := manifest("application/x.model", map[string]string{"w": "w"})
	change := func(do func(*v1.Manifest)) blob.Manifest {
		m := manifest("application/x.model", map[string]string{"w": "w"})
		do(&m)
		body, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return blob.Manifest{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Body: body}
	}
	for name, c := range map[string]struct {
		m    blob.Manifest
		want error
	}{
		"good":            {change(func(*v1.Manifest) {}), nil},
		"typed image":     {change(func(m *v1.Manifest) { m.Config.MediaType = v1.MediaTypeImageConfig }), nil},
		"image":           {change(func(m *v1.Manifest) { m.Config.MediaType, m.ArtifactType = v1.MediaTypeImageConfig, "" }), artifactstore.ErrImage},
		"index":           {blob.Manifest{MediaType: v1.MediaTypeImageIndex, Body: []byte(`{"schemaVersion":2,"manifests":[]}`)}, artifactstore.ErrUnreadable},
		"index, disguise": {blob.Manifest{MediaType: v1.MediaTypeImageManifest, Body: []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`)}, artifactstore.ErrUnreadable},
		"both":            {blob.Manifest{MediaType: v1.MediaTypeImageManifest, Body: []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[],"manifests":[]}`)}, artifactstore.ErrUnreadable},
		"nothing":         {blob.Manifest{MediaType: v1.MediaTypeImageManifest}, artifactstore.ErrUnreadable},
		"other type":      {blob.Manifest{MediaType: "application/json", Body: []byte(`{}`)}, artifactstore.ErrUnreadable},
		"leads out":       {change(func(m *v1.Manifest) { m.Layers[0].Annotations[v1.AnnotationTitle] = "../../etc/passwd" }), artifactstore.ErrUnreadable},
		"absolute":        {change(func(m *v1.Manifest) { m.Layers[0].Annotations[v1.AnnotationTitle] = "/etc/passwd" }), artifactstore.ErrUnreadable},
		"bad digest":      {change(func(m *v1.Manifest) { m.Layers[0].Digest = "sha256:../../x" }), artifactstore.ErrUnreadable},
		"negative":        {change(func(m *v1.Manifest) { m.Layers[0].Size = -1 }), artifactstore.ErrUnreadable},
	} {
		if a, err := artifactstore.Parse(c.m); !errors.Is(err, c.want) || c.want == nil && len(a.Blobs()) != 2 {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	body, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	m := blob.Manifest{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Body: body}
	alias, err := artifactstore.Alias(m, second)
	if err != nil || alias.Digest == m.Digest {
		t.Fatalf("%+v, %v", alias, err)
	}
	twice, err := artifactstore.Alias(alias, second)
	if err != nil || twice.Digest != alias.Digest {
		t.Errorf("the alias of an alias is another: %s, %s, %v", twice.Body, alias.Body, err)
	}
	if a, err := artifactstore.Parse(alias); err != nil || a.Original != m.Digest {
		t.Errorf("%+v, %v", a, err)
	}
}

// FuzzParse: what is parsed has sound blobs and names that stay inside.
func FuzzParse(f *testing.F) {
	body, err := json.Marshal(manifest("t", map[string]string{"w": "w"}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add([]byte(`{"schemaVersion":2,"layers":[{"annotations":{"org.cncf.model.filepath":"../x"}}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		a, err := artifactstore.Parse(blob.Manifest{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Body: body})
		if err != nil {
			return
		}
		for _, d := range a.Layers {
			if name := artifactstore.FileName(d); d.Digest.Validate() != nil || d.Size < 0 || name != "" && !filepath.IsLocal(name) && filepath.Clean(name) != "." {
				t.Errorf("%+v", d)
			}
		}
	})
}

// From a layout: tags move, an image is refused, and a source that lies changes nothing.
func TestAdd(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	from := source(t, llama, manifest("x/y", map[string]string{"w": "weights"}), "weights")
	for range 2 {
		if got, err := add(t, s, from.Layout, llama); err != nil || got.Name != llama || got.Size != 7 {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	image := manifest("", nil)
	image.Config.MediaType = v1.MediaTypeImageConfig
	if _, err := add(t, s, source(t, second, image).Layout, second); !errors.Is(err, artifactstore.ErrImage) {
		t.Errorf("an image: %v", err)
	}
	lies := source(t, second, manifest("x/y", map[string]string{"w": "truth"}), "truth")
	if err := os.WriteFile(filepath.Join(lies.Path(), "blobs", "sha256", digest.FromString("truth").Encoded()), []byte("TRUTH"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := add(t, s, lies.Layout, second); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("a lie: %v", err)
	}
	missing := source(t, second, manifest("x/y", map[string]string{"w": "missing"}))
	if _, err := add(t, s, missing.Layout, second); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("a missing blob: %v", err)
	}
	huge := manifest("x/y", map[string]string{"w": "x"})
	huge.Layers[0].Size = 1 << 60
	if _, err := add(t, s, source(t, second, huge).Layout, second); !errors.Is(err, artifactstore.ErrNoRoom) {
		t.Errorf("larger than the disk: %v", err)
	}
	if all := list(t, path); len(all) != 1 || len(verify(t, path)) > 0 {
		t.Errorf("%+v", all)
	}
	if _, err := artifactstore.Open(path); !errors.Is(err, ocidir.ErrBusy) {
		t.Errorf("two writers: %v", err)
	}
}

func TestRemoveAndPrune(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	dir := files(t, map[string]string{"w": "weights"})
	for _, name := range []string{llama, second} {
		if _, err := s.AddFiles(t.Context(), name, []string{dir}, artifactstore.FileOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Remove(t.Context(), llama, "quay.io/none:1"); !errors.Is(err, artifactstore.ErrUnknown) || len(list(t, path)) != 2 {
		t.Errorf("unknown: %v", err)
	}
	if err := s.Remove(t.Context(), llama); err != nil {
		t.Fatal(err)
	}
	all, err := s.Prune(t.Context(), time.Hour, false)
	if err != nil || len(all) != 1 || all[0].Remove { // the first name's manifest
		t.Errorf("%+v, %v", all, err)
	}
	if err := s.Remove(t.Context(), list(t, path)[0].Digest.String()); err != nil {
		t.Fatal(err)
	}
	if all, err = s.Prune(t.Context(), 0, true); err != nil || len(all) != 4 || !all[0].Remove {
		t.Errorf("%+v, %v", all, err)
	}
	if all, err = s.Prune(t.Context(), 0, false); err != nil || len(all) != 4 {
		t.Errorf("%+v, %v", all, err)
	}
	left, err := os.ReadDir(filepath.Join(path, "artifacts", "blobs", "sha256"))
	if err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// Whatever is wrong with a store is told, and nothing is written.
func TestVerify(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(dir string) error
		want string
	}{
		"lying":   {func(dir string) error { return os.WriteFile(blobFile(dir, "weights"), []byte("WEIGHTS"), 0o600) }, "it has digest"},
		"torn":    {func(dir string) error { return os.Truncate(blobFile(dir, "weights"), 3) }, "it has 3 bytes, not 7"},
		"missing": {func(dir string) error { return os.Remove(blobFile(dir, "weights")) }, "not found"},
		"leads out": {func(dir string) error {
			return errors.Join(os.Remove(blobFile(dir, "weights")), os.Symlink("/etc/passwd", blobFile(dir, "weights")))
		}, ""},
		"no lock":   {func(dir string) error { return os.Remove(filepath.Join(dir, "index.lock")) }, "it is missing"},
		"bare name": {func(dir string) error { return replace(dir, llama, "8b") }, "full name"},
		"an index":  {func(dir string) error { return replace(dir, v1.MediaTypeImageManifest, v1.MediaTypeImageIndex) }, "cannot read the store"},
	} {
		path := t.TempDir()
		s := open(t, path)
		_, err := s.AddFiles(t.Context(), llama, []string{files(t, map[string]string{"w": "weights"})}, artifactstore.FileOptions{})
		if err := errors.Join(err, c.harm(filepath.Join(path, "artifacts"))); err != nil {
			t.Fatal(err)
		}
		problems := verify(t, path)
		if len(problems) != 1 || !strings.Contains(problems[0].Wrong, c.want) || problems[0].Remedy == "" {
			t.Errorf("%s: %+v", name, problems)
		}
	}
}

func blobFile(dir, content string) string {
	return filepath.Join(dir, "blobs", "sha256", digest.FromString(content).Encoded())
}

func replace(dir, from, to string) error {
	name := filepath.Join(dir, "index.json")
	body, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	head, rest, _ := strings.Cut(string(body), `"manifests"`) // the index has a type of its own
	return os.WriteFile(name, []byte(head+`"manifests"`+strings.ReplaceAll(rest, from, to)), 0o600)
}

// On a full disk a store stays as it was.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=300k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s := open(t, dir)
	t.Cleanup(func() { _ = s.Close() })
	if _, err := s.AddFiles(t.Context(), llama, []string{files(t, map[string]string{"w": "small"})}, artifactstore.FileOptions{}); err != nil {
		t.Fatal(err)
	}
	large := files(t, map[string]string{"w": strings.Repeat("x", 1<<20)})
	if _, err := s.AddFiles(t.Context(), second, []string{large}, artifactstore.FileOptions{}); !errors.Is(err, artifactstore.ErrNoRoom) || !strings.Contains(err.Error(), "1MiB") {
		t.Errorf("error %v", err)
	}
	// It does not fit once there are inodes and directories, either.
	large = files(t, map[string]string{"w": strings.Repeat("x", 200<<10), "v": strings.Repeat("y", 60<<10)})
	_, err := s.AddFiles(t.Context(), second, []string{large}, artifactstore.FileOptions{})
	if err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, artifactstore.ErrNoRoom) {
		t.Errorf("error %v", err)
	}
	if p := verify(t, dir); len(p) > 0 || list(t, dir)[0].Name != llama {
		t.Errorf("%+v", p)
	}
}
