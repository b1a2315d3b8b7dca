// SPDX-License-Identifier: Apache-2.0

package ocidir_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func create(t *testing.T, dir string) *ocidir.Writer {
	t.Helper()
	w, err := ocidir.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func put(t *testing.T, w *ocidir.Writer, body []byte) v1.Descriptor {
	t.Helper()
	d := blob.Descriptor{Digest: digest.FromBytes(body), Size: int64(len(body))}
	if err := w.Put(t.Context(), d, bytes.NewReader(body)); err != nil {
		t.Fatal(err)
	}
	return v1.Descriptor{Digest: d.Digest, Size: d.Size}
}

// image stores an image of one layer, or something that refers to another, and
// lists it under a name.
func image(t *testing.T, w *ocidir.Writer, layer, name string, subject *v1.Descriptor) v1.Descriptor {
	t.Helper()
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: put(t, w, []byte("{}")), Layers: []v1.Descriptor{put(t, w, []byte(layer))}, Subject: subject}
	if subject != nil {
		m.ArtifactType = "application/x-about"
	}
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	desc := put(t, w, body)
	desc.MediaType = m.MediaType
	if name != "" {
		desc.Annotations = map[string]string{v1.AnnotationRefName: name}
	}
	err = w.List(t.Context(), func(all []v1.Descriptor) ([]v1.Descriptor, error) { return append(all, desc), nil })
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

// pack makes an archive of a layout.
func pack(t *testing.T, dir string) string { return packFor(t, dir) }

func packFor(t testing.TB, dir string) string {
	t.Helper()
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	if err := tw.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "layout.tar")
	if err := os.WriteFile(name, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// forms runs a test with a layout as a directory and as an archive.
func forms(t *testing.T, fill func(w *ocidir.Writer), test func(t *testing.T, l *ocidir.Layout)) {
	t.Helper()
	dir := t.TempDir()
	w := create(t, dir)
	fill(w)
	t.Run("directory", func(t *testing.T) { test(t, ocidir.New(dir)) })
	t.Run("archive", func(t *testing.T) { test(t, ocidir.New(pack(t, dir))) })
}

func TestSource(t *testing.T) {
	for _, form := range []string{"directory", "archive"} {
		t.Run(form, func(t *testing.T) {
			blobtest.Run(t, func(t *testing.T, blobs map[digest.Digest][]byte) blob.Source {
				dir := t.TempDir()
				w := create(t, dir)
				for _, p := range blobs {
					put(t, w, p)
				}
				if form == "archive" {
					dir = pack(t, dir)
				}
				return ocidir.New(dir)
			})
		})
	}
}

func named(t *testing.T, name string) reference.Named {
	t.Helper()
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func TestNames(t *testing.T) {
	var app, about v1.Descriptor
	forms(t, func(w *ocidir.Writer) {
		app = image(t, w, "app", "registry.example.com/team/app:v1", nil)
		image(t, w, "second", "registry.example.com/team/app:v1", nil) // the first counts
		image(t, w, "docker", "docker.io/library/debian:latest", nil)
		image(t, w, "bare", "v7", nil)
		about = image(t, w, "about", "", &app)
	}, func(t *testing.T, l *ocidir.Layout) {
		names, err := l.Names(t.Context())
		if want := []string{"docker.io/library/debian:latest", "registry.example.com/team/app:v1"}; err != nil || !slices.Equal(names, want) {
			t.Errorf("names %q, %v", names, err)
		}
		for name, want := range map[string]error{
			"registry.example.com/team/app:v1": nil, "debian": nil, "registry.example.com/team/app": blob.ErrNotFound,
			"registry.example.com/team/app@" + app.Digest.String(): nil, "v7": blob.ErrNotFound,
		} {
			if _, err := l.Resolve(t.Context(), named(t, name)); !errors.Is(err, want) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if d, err := l.Resolve(t.Context(), named(t, "registry.example.com/team/app:v1")); d != app.Digest {
			t.Errorf("%s, %v", d, err)
		}
		if m, err := l.Manifest(t.Context(), "v7"); err != nil || m.MediaType != v1.MediaTypeImageManifest {
			t.Errorf("by its bare tag: %+v, %v", m, err)
		}
		if _, err := l.Manifest(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "say which") {
			t.Errorf("without a name: %v", err)
		}
		tags, err := l.Tags(t.Context(), "registry.example.com/team/app")
		if err != nil || !slices.Equal(tags, []string{"v1"}) {
			t.Errorf("tags %q, %v", tags, err)
		}
		if _, err := l.Tags(t.Context(), "registry.example.com/team"); !errors.Is(err, blob.ErrNotFound) {
			t.Error(err)
		}
		m, err := l.Referrers(t.Context(), app.Digest)
		if err != nil {
			t.Fatal(err)
		}
		var idx v1.Index
		if err := json.Unmarshal(m.Body, &idx); err != nil {
			t.Fatal(err)
		}
		want := []v1.Descriptor{{MediaType: v1.MediaTypeImageManifest, Digest: about.Digest, Size: about.Size, ArtifactType: "application/x-about"}}
		if diff := cmp.Diff(want, idx.Manifests); diff != "" {
			t.Error(diff)
		}
		if _, err := l.Referrers(t.Context(), about.Digest); !errors.Is(err, blob.ErrNotFound) {
			t.Error(err)
		}
	})
}

// What is not attached may be attached later; what a layout does not have it does
// not have.
func TestNotAttached(t *testing.T) {
	dir := t.TempDir()
	at := filepath.Join(dir, "stick")
	l := ocidir.New(at)
	d := blob.Descriptor{Digest: digest.FromString("app"), Size: 3}
	if _, err := l.Open(t.Context(), d, 0, 3); !blob.IsTemporary(err) {
		t.Error(err)
	}
	if err := os.Mkdir(at, 0o700); err != nil { // the mount point without its mount
		t.Fatal(err)
	}
	if _, err := l.Open(t.Context(), d, 0, 3); !blob.IsTemporary(err) {
		t.Error(err)
	}
	w := create(t, at)
	if _, err := l.Open(t.Context(), d, 0, 3); !errors.Is(err, blob.ErrNotFound) || blob.IsTemporary(err) {
		t.Error(err)
	}
	put(t, w, []byte("app"))
	rc, err := l.Open(t.Context(), d, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(rc)
	if err := errors.Join(err, rc.Close()); err != nil || string(got) != "pp" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestHostile(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("secret")
	desc := blob.Descriptor{Digest: d, Size: 6}
	for name, damage := range map[string]func(file string) error{
		"link out of it":  func(file string) error { return os.Symlink(secret, file) },
		"pipe":            func(file string) error { return unix.Mkfifo(file, 0o600) },
		"directory":       func(file string) error { return os.Mkdir(file, 0o700) },
		"shorter":         func(file string) error { return os.WriteFile(file, []byte("secre"), 0o600) },
		"another content": func(file string) error { return os.WriteFile(file, []byte("public"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			create(t, dir)
			if err := damage(filepath.Join(dir, "blobs", "sha256", d.Encoded())); err != nil {
				t.Fatal(err)
			}
			if body, err := ocidir.New(dir).Blob(t.Context(), desc, 100); err == nil {
				t.Errorf("%q", body)
			}
		})
	}
	dir := t.TempDir()
	create(t, dir)
	index := filepath.Join(dir, "index.json")
	if err := os.WriteFile(index, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ocidir.New(dir).Names(t.Context()); err == nil {
		t.Error("half an index was read")
	}
	if err := os.Truncate(index, 65<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := ocidir.New(dir).Names(t.Context()); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Error(err)
	}
	for name, content := range map[string]string{"text": "no tar at all", "empty": ""} {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, []byte(strings.Repeat(content, 100)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ocidir.New(file).Names(t.Context()); !errors.Is(err, ocidir.ErrNoLayout) && !blob.IsTemporary(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	packed := filepath.Join(t.TempDir(), "a.tar.gz")
	if err := os.WriteFile(packed, []byte("\x1f\x8b\x08\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ocidir.New(packed).Names(t.Context()); !errors.Is(err, ocidir.ErrCompressed) {
		t.Error(err)
	}
}

// A blob is there when it is right, or not at all.
func TestPut(t *testing.T) {
	dir := t.TempDir()
	w := create(t, dir)
	body := blobtest.Bytes(5<<20+1, 1)
	good := blob.Descriptor{Digest: digest.FromBytes(body), Size: int64(len(body))}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context //nolint:containedctx // of one case
		desc blob.Descriptor
		body io.Reader
		want error
	}{
		"too short":      {t.Context(), good, bytes.NewReader(body[1:]), blob.ErrCorrupt},
		"too long":       {t.Context(), good, io.MultiReader(bytes.NewReader(body), strings.NewReader("x")), blob.ErrCorrupt},
		"another":        {t.Context(), good, io.MultiReader(strings.NewReader("x"), bytes.NewReader(body[1:])), blob.ErrCorrupt},
		"broken":         {t.Context(), good, io.MultiReader(bytes.NewReader(body[:9]), brokenReader{}), errBroken},
		"cancelled":      {ended, good, bytes.NewReader(body), context.Canceled},
		"not the digest": {t.Context(), blob.Descriptor{Digest: "sha256:x", Size: 1}, strings.NewReader("x"), digest.ErrDigestInvalidLength},
	} {
		if err := w.Put(c.ctx, c.desc, c.body); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if have, err := w.Has(t.Context(), good); have || err != nil {
			t.Errorf("%s: stored, %v", name, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(dir, ".ingest")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	put(t, w, body)
	if have, err := w.Has(t.Context(), good); !have || err != nil {
		t.Errorf("%t, %v", have, err)
	}
	if _, err := ocidir.Create(dir); !errors.Is(err, ocidir.ErrBusy) {
		t.Errorf("second writer: %v", err)
	}
}

var errBroken = errors.New("broken")

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errBroken }

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	w := create(t, dir)
	app := image(t, w, "app", "registry.example.com/app:v1", nil)
	old := image(t, w, "old layer", "registry.example.com/app:v0", nil)
	keep := func(all []v1.Descriptor) ([]v1.Descriptor, error) {
		return slices.DeleteFunc(all, func(d v1.Descriptor) bool { return d.Digest == old.Digest }), nil
	}
	if err := w.List(t.Context(), keep); err != nil {
		t.Fatal(err)
	}
	freed, err := w.Sweep(t.Context())
	if want := old.Size + int64(len("old layer")); err != nil || freed != want {
		t.Errorf("freed %d, want %d, %v", freed, want, err)
	}
	for _, d := range []digest.Digest{app.Digest, digest.FromString("app"), digest.FromString("{}")} {
		if _, err := w.Stat(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
	// Whatever cannot be read may need anything.
	orphan := put(t, w, []byte("orphan"))
	if err := os.Remove(filepath.Join(dir, "blobs", "sha256", app.Digest.Encoded())); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Sweep(t.Context()); err == nil {
		t.Error("swept without knowing what is needed")
	}
	if _, err := w.Stat(t.Context(), orphan.Digest); err != nil {
		t.Error(err)
	}
}
