// SPDX-License-Identifier: Apache-2.0

package ocidir_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

// FuzzArchive reads an archive that may be anything: what it returns is what its
// digest says.
func FuzzArchive(f *testing.F) {
	dir := f.TempDir()
	w, err := ocidir.Create(dir)
	if err != nil {
		f.Fatal(err)
	}
	const body = "a blob"
	desc := blob.Descriptor{Digest: digest.FromString(body), Size: int64(len(body))}
	blobFile := filepath.Join("blobs", "sha256", desc.Digest.Encoded())
	for name, content := range map[string]string{
		blobFile:     body,
		"index.json": `{"manifests":[{"digest":"` + desc.Digest.String() + `","size":6,"annotations":{"org.opencontainers.image.ref.name":"a.example/b:c"}}]}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	seed, err := os.ReadFile(packFor(f, dir))
	if err != nil || len(seed) < 1024 {
		f.Fatalf("the seed has %d bytes: %v", len(seed), err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		name := filepath.Join(t.TempDir(), "a.tar")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		l := ocidir.New(name)
		if got, err := l.Blob(t.Context(), desc, 100); err == nil && string(got) != body {
			t.Errorf("%q", got)
		}
		names, _ := l.Names(t.Context())
		for _, n := range names {
			if m, err := l.Manifest(t.Context(), n); err == nil && digest.FromBytes(m.Body) != m.Digest {
				t.Errorf("manifest %s has digest %s", n, digest.FromBytes(m.Body))
			}
		}
		_, _ = l.Referrers(t.Context(), desc.Digest)
	})
}
