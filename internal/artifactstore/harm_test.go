// SPDX-License-Identifier: Apache-2.0

package artifactstore_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

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

// put stores a manifest, as tools do that know nothing of the rules of a store.
func put(t testing.TB, s *artifactstore.Store, m v1.Manifest) v1.Descriptor {
	t.Helper()
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	d := blob.Descriptor{Digest: digest.FromBytes(body), Size: int64(len(body))}
	if err := s.Put(t.Context(), d, strings.NewReader(string(body))); err != nil {
		t.Fatal(err)
	}
	return v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: d.Digest, Size: d.Size}
}

// Podman leaves an entry without a name when a tag moves: of several of them just the
// one that was named by its digest is removed.
func TestRemoveUnnamed(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	a, b := put(t, s, manifest("x/a", nil)), put(t, s, manifest("x/b", nil))
	if err := s.List(t.Context(), func([]v1.Descriptor) ([]v1.Descriptor, error) { return []v1.Descriptor{a, b}, nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), a.Digest.String()); err != nil {
		t.Fatal(err)
	}
	if all := list(t, path); len(all) != 1 || all[0].Digest != b.Digest {
		t.Errorf("%+v", all)
	}
}

// What verify advises helps: an artifact that is added again is whole again, even if its
// files have kept their size.
func TestMend(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	m := manifest("x/y", map[string]string{"w": "weights"})
	from := source(t, llama, m, "weights")
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"weights", "{}", string(body)} {
		if _, err := add(t, s, from.Layout, llama); err != nil {
			t.Fatal(err)
		}
		name := blobFile(filepath.Join(path, "artifacts"), content)
		if err := os.WriteFile(name, bytes.Repeat([]byte("x"), len(content)), 0o600); err != nil {
			t.Fatal(err)
		}
		if p := verify(t, path); len(p) != 1 {
			t.Errorf("%+v", p)
		}
		if _, err := add(t, s, from.Layout, llama); err != nil {
			t.Fatal(err)
		}
		if p := verify(t, path); len(p) > 0 {
			t.Errorf("%+v", p)
		}
	}
}

// A manifest that cannot be read hinders neither who adds nor who removes, the broken one
// above all; nothing is pruned as long as it is not known what is needed.
func TestBroken(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	names := []string{llama, second, "quay.io/models/third:1"}
	for _, name := range names {
		added, err := s.AddFiles(t.Context(), name, []string{files(t, map[string]string{"w": name})}, artifactstore.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if name == names[2] {
			break
		}
		if err := os.WriteFile(filepath.Join(path, "artifacts", "blobs", "sha256", added.Digest.Encoded()), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range names[:2] {
		if _, err := s.Prune(t.Context(), 0, false); err == nil || !strings.Contains(err.Error(), "holdfast artifact verify") {
			t.Errorf("pruned: %v", err)
		}
		if err := s.Remove(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Prune(t.Context(), 0, false); err != nil {
		t.Error(err)
	}
	if all := list(t, path); len(all) != 1 || all[0].Name != names[2] || len(verify(t, path)) > 0 {
		t.Errorf("%+v, %+v", all, verify(t, path))
	}
}

// However names and digests have come together, no two entries have the same digest: here
// a manifest that was made for the second name is there under the third.
func TestAliasUnderAnotherName(t *testing.T) {
	path, other := t.TempDir(), t.TempDir()
	s, from := open(t, path), open(t, other)
	dir := files(t, map[string]string{"w": "weights"})
	var err error
	for _, name := range []string{llama, second} {
		_, failed := from.AddFiles(t.Context(), name, []string{dir}, artifactstore.FileOptions{})
		err = errors.Join(err, failed)
	}
	if _, failed := s.AddFiles(t.Context(), llama, []string{dir}, artifactstore.FileOptions{}); failed != nil || err != nil {
		t.Fatal(failed, err)
	}
	const third = "quay.io/models/third:1"
	origin := bundle.Origin{Name: third, Asked: second, Reader: from.Layout, Sources: []blob.Source{from.Layout}}
	if _, err := s.Add(t.Context(), origin, image.Machine(), bundle.Options{}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.AddFiles(t.Context(), second, []string{dir}, artifactstore.FileOptions{}); err != nil {
			t.Fatal(err)
		}
		all := list(t, path)
		if p := verify(t, path); len(p) > 0 || len(all) != 3 || all[0].Digest != all[1].Digest || all[0].Digest != all[2].Digest {
			t.Errorf("%+v, %+v", all, p)
		}
	}
}

// Readers compare the digest of a name with that of the manifest.
func TestDigestNames(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	m := manifest("x/y", map[string]string{"w": "weights"})
	from := source(t, llama, m, "weights")
	idx, err := from.Index(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	add := func(name string) error {
		_, err := s.Add(t.Context(), bundle.Origin{Name: name, Asked: llama, Reader: from.Layout, Sources: []blob.Source{from.Layout}}, image.Machine(), bundle.Options{})
		return err
	}
	right := "quay.io/models/llama@" + idx.Manifests[0].Digest.String()
	if err := add("quay.io/models/llama@" + digest.FromString("another").String()); err == nil || !strings.Contains(err.Error(), "--as") {
		t.Errorf("another digest: %v", err)
	}
	if err := errors.Join(add(right), add(right), add(llama)); err != nil || len(verify(t, path)) > 0 {
		t.Errorf("%v, %+v", err, verify(t, path))
	}
	if err := s.Remove(t.Context(), right); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(add(second), s.Remove(t.Context(), llama), add(llama)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddFiles(t.Context(), right, []string{files(t, map[string]string{"w": "w"})}, artifactstore.FileOptions{}); !errors.Is(err, artifactstore.ErrName) {
		t.Errorf("files: %v", err)
	}
	if err := add(right); !errors.Is(err, artifactstore.ErrName) {
		t.Errorf("a second name with a digest: %v", err)
	}
	if err := replace(filepath.Join(path, "artifacts"), llama, "quay.io/models/llama@"+digest.FromString("another").String()); err != nil {
		t.Fatal(err)
	}
	if p := verify(t, path); len(p) != 1 || !strings.Contains(p[0].Wrong, "found neither") {
		t.Errorf("%+v", p)
	}
}

// Sizes whose sum is no number do not pass for an artifact that fits.
func TestTooLarge(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	huge := manifest("x/y", map[string]string{"a": "a", "b": "b"})
	huge.Layers[0].Size, huge.Layers[1].Size = math.MaxInt64, math.MaxInt64
	if _, err := add(t, s, source(t, llama, huge).Layout, llama); !errors.Is(err, artifactstore.ErrUnreadable) {
		t.Errorf("files: %v", err)
	}
	m := manifest("x/y", nil)
	m.Annotations = map[string]string{"large": strings.Repeat("x", ocidir.MaxManifest-1000)}
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	fits := blob.Manifest{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Body: body}
	if _, err := artifactstore.Parse(fits); err != nil {
		t.Error(err)
	}
	if _, err := artifactstore.Alias(fits, "quay.io/models/"+strings.Repeat("n", 1000)+":1"); !errors.Is(err, artifactstore.ErrUnreadable) {
		t.Errorf("alias: %v", err)
	}
	fits.Body = append(body, bytes.Repeat([]byte(" "), 1001)...)
	if _, err := artifactstore.Parse(fits); !errors.Is(err, artifactstore.ErrUnreadable) {
		t.Errorf("manifest: %v", err)
	}
}

// A name that JSON cannot hold would become another one, and two of them the same.
func TestFileNames(t *testing.T) {
	path := t.TempDir()
	s := open(t, path)
	dir := files(t, map[string]string{"a\xff": "1", "a\xfe": "2"})
	if _, err := s.AddFiles(t.Context(), llama, []string{dir}, artifactstore.FileOptions{}); err == nil || !strings.Contains(err.Error(), `a\xfe`) {
		t.Errorf("error %v", err)
	}
	inside := files(t, map[string]string{"blobs/x": "content"})
	if err := os.Symlink("blobs/x", filepath.Join(inside, "weights")); err != nil {
		t.Fatal(err)
	}
	got, err := s.AddFiles(t.Context(), llama, []string{inside}, artifactstore.FileOptions{})
	if err != nil || len(got.Files) != 2 || got.Files[1].Name != "weights" || got.Files[0].Digest != got.Files[1].Digest {
		t.Errorf("a link that stays inside: %+v, %v", got, err)
	}
}

// Of an index the manifest for the platform is listed, since readers understand no
// index. Verify writes nothing, so it works where nothing can be written.
func TestIndexAndReadOnly(t *testing.T) {
	path := t.TempDir()
	if err := unix.Mount("tmpfs", path, "tmpfs", 0, "size=2m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, 0); err != nil {
			t.Error(err)
		}
	})
	s := open(t, path)
	from := source(t, llama, manifest("x/y", map[string]string{"w": "weights"}), "weights")
	old, err := from.Index(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	mine, other := old.Manifests[0], old.Manifests[0]
	mine.Annotations, other.Annotations = nil, nil
	mine.Platform = &v1.Platform{OS: "linux", Architecture: image.Machine().Architecture}
	other.Platform, other.Digest = &v1.Platform{OS: "linux", Architecture: "s390x"}, digest.FromString("other")
	body, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{other, mine}})
	if err != nil {
		t.Fatal(err)
	}
	root := v1.Descriptor{MediaType: v1.MediaTypeImageIndex, Digest: digest.FromBytes(body), Size: int64(len(body)), Annotations: map[string]string{v1.AnnotationRefName: llama}}
	err = from.Put(t.Context(), blob.Descriptor{Digest: root.Digest, Size: root.Size}, bytes.NewReader(body))
	err = errors.Join(err, from.List(t.Context(), func([]v1.Descriptor) ([]v1.Descriptor, error) { return []v1.Descriptor{root}, nil }))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := add(t, s, from.Layout, llama); err != nil || got.Digest != mine.Digest {
		t.Errorf("%+v, %v", got, err)
	}
	if err := errors.Join(s.Close(), unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")); err != nil {
		t.Fatal(err)
	}
	if p := verify(t, path); len(p) > 0 {
		t.Errorf("%+v", p)
	}
	if _, err := artifactstore.Open(path); !errors.Is(err, unix.EROFS) {
		t.Errorf("opened for writing: %v", err)
	}
}

// A cache of Hugging Face keeps the content of a snapshot's files beside it.
func TestLinksOut(t *testing.T) {
	cache := files(t, map[string]string{"blobs/abc": "weights", "snapshots/1/config.json": "{}"})
	snapshot := filepath.Join(cache, "snapshots", "1")
	if err := os.Symlink("../../blobs/abc", filepath.Join(snapshot, "w.safetensors")); err != nil {
		t.Fatal(err)
	}
	s := open(t, t.TempDir())
	got, err := s.AddFiles(t.Context(), llama, []string{snapshot}, artifactstore.FileOptions{FollowLinks: true})
	if err != nil || got.Size != 9 || got.Files[1].Name != "w.safetensors" {
		t.Errorf("%+v, %v", got, err)
	}
}
