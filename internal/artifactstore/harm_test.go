// SPDX-License-Identifier: Apache-2.0

package artifactstore_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/blob"
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
