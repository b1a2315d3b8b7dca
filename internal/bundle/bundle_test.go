// SPDX-License-Identifier: Apache-2.0

package bundle_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/bundle"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/testimage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	app     = "registry.example.com/team/app:v1"
	weights = "registry.example.com/team/weights:v1"
)

// source is a layout with an index of two platforms under the name app, a signature of
// it and something that refers to one of its manifests, and an artifact.
type source struct {
	*ocidir.Writer
	t         *testing.T
	listed    []v1.Descriptor
	root      digest.Digest
	platforms map[string]digest.Digest
}

func newSource(t *testing.T) *source {
	t.Helper()
	return fill(t, t.TempDir())
}

func fill(t *testing.T, dir string) *source {
	t.Helper()
	w, err := ocidir.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	s := &source{Writer: w, t: t, platforms: map[string]digest.Digest{}}
	var idx v1.Index
	idx.SchemaVersion, idx.MediaType = 2, v1.MediaTypeImageIndex
	for i, arch := range []string{image.Machine().Architecture, "s390x"} {
		l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(testimage.File{Content: testimage.Bytes(50_000, uint64(i))}), testimage.Gzip, testimage.Options{})
		if err != nil {
			t.Fatal(err)
		}
		img := testimage.Image{Layers: []testimage.Layer{l}, Cmd: []string{"/" + arch}}
		config, manifest, err := img.Build()
		if err != nil {
			t.Fatal(err)
		}
		s.blob(l.Bytes)
		s.blob(config)
		desc := s.blob(manifest)
		desc.MediaType = v1.MediaTypeImageManifest
		s.platforms[arch] = desc.Digest
		if i == 0 {
			s.manifest("", v1.Manifest{ArtifactType: "application/x-sbom", Subject: &desc, Layers: []v1.Descriptor{s.blob([]byte("sbom"))}})
		}
		desc.Platform = &v1.Platform{OS: "linux", Architecture: arch}
		idx.Manifests = append(idx.Manifests, desc)
	}
	body, err := json.Marshal(idx)
	if err != nil {
		t.Fatal(err)
	}
	root := s.blob(body)
	root.MediaType, root.Annotations = idx.MediaType, map[string]string{v1.AnnotationRefName: app}
	s.root = root.Digest
	s.listed = append(s.listed, root)
	s.manifest("registry.example.com/team/app:sha256-"+root.Digest.Encoded()+".sig", v1.Manifest{Layers: []v1.Descriptor{s.blob([]byte("signed"))}})
	s.manifest(weights, v1.Manifest{ArtifactType: "application/x-weights", Layers: []v1.Descriptor{s.blob(testimage.Bytes(9000, 7))}})
	if err := w.List(t.Context(), func([]v1.Descriptor) ([]v1.Descriptor, error) { return s.listed, nil }); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *source) blob(body []byte) v1.Descriptor {
	s.t.Helper()
	d := blob.Descriptor{Digest: digest.FromBytes(body), Size: int64(len(body))}
	if err := s.Put(s.t.Context(), d, bytes.NewReader(body)); err != nil {
		s.t.Fatal(err)
	}
	return v1.Descriptor{MediaType: "application/octet-stream", Digest: d.Digest, Size: d.Size}
}

func (s *source) manifest(name string, m v1.Manifest) {
	s.t.Helper()
	m.SchemaVersion, m.MediaType = 2, v1.MediaTypeImageManifest
	m.Config = s.blob([]byte("{}"))
	m.Config.MediaType = v1.MediaTypeEmptyJSON
	body, err := json.Marshal(m)
	if err != nil {
		s.t.Fatal(err)
	}
	desc := s.blob(body)
	desc.MediaType = m.MediaType
	if name != "" {
		desc.Annotations = map[string]string{v1.AnnotationRefName: name}
	}
	s.listed = append(s.listed, desc)
}

func machine() []image.Platform { return []image.Platform{image.Machine()} }

// pack packs names of a layout.
func pack(ctx context.Context, from *ocidir.Layout, to ocidir.Sink, o bundle.Options, names ...string) ([]*bundle.Packed, error) {
	return bundle.Import(ctx, from, names, to, o)
}

func nothing(digest.Digest, int64, int64) {}

func verify(t *testing.T, path string) *bundle.Report {
	t.Helper()
	r, err := bundle.Verify(t.Context(), ocidir.New(path), nothing)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// sinks runs a test with both forms of a bundle.
func sinks(t *testing.T, test func(t *testing.T, path string, open func() (ocidir.Sink, func() error))) {
	t.Helper()
	t.Run("directory", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "bundle")
		test(t, path, func() (ocidir.Sink, func() error) {
			w, err := ocidir.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			return w, w.Close
		})
	})
	t.Run("archive", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "bundle.tar")
		test(t, path, func() (ocidir.Sink, func() error) {
			a, err := ocidir.CreateArchive(path)
			if err != nil {
				t.Fatal(err)
			}
			return a, a.Close
		})
	})
}

// What was packed is there byte for byte, with what belongs to it, and nothing else.
func TestPack(t *testing.T) {
	sinks(t, func(t *testing.T, path string, open func() (ocidir.Sink, func() error)) {
		s := newSource(t)
		sink, end := open()
		all, err := pack(t.Context(), s.Layout, sink, bundle.Options{Platforms: machine()}, app, weights)
		if err := errors.Join(err, end()); err != nil {
			t.Fatal(err)
		}
		if len(all) != 2 || all[0].Digest != s.root || all[0].Platforms != 1 || all[0].Referrers != 2 || all[1].Referrers != 0 {
			t.Errorf("%+v %+v", all[0], all[1])
		}
		r := verify(t, path)
		if len(r.Problems) > 0 || len(r.Notes) > 0 || len(r.Names) != 3 {
			t.Errorf("%+v", r)
		}
		l := ocidir.New(path)
		names, err := bundle.Names(t.Context(), l, nil)
		if err != nil || !slices.Equal(names, []string{app, weights}) {
			t.Errorf("%q, %v", names, err)
		}
		if _, err := l.Stat(t.Context(), s.platforms["s390x"]); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("another platform: %v", err)
		}
		opened, err := image.Opener{Platform: image.Machine()}.Open(t.Context(), "oci:"+path+":"+app)
		if err != nil || opened.Manifest.Digest != s.platforms[image.Machine().Architecture] {
			t.Errorf("%+v, %v", opened, err)
		}
		listed, err := bundle.List(t.Context(), l)
		if err != nil || len(listed) != 2 || listed[0].Bytes != all[0].Bytes {
			t.Errorf("%+v, %v", listed, err)
		}
		if _, err := bundle.Names(t.Context(), l, []string{"registry.example.com/none:v1"}); !errors.Is(err, bundle.ErrNotThere) {
			t.Error(err)
		}
	})
}

// The same content makes the same file.
func TestReproducible(t *testing.T) {
	s := newSource(t)
	var files [][]byte
	for range 2 {
		path := filepath.Join(t.TempDir(), "b.tar")
		a, err := ocidir.CreateArchive(path)
		if err != nil {
			t.Fatal(err)
		}
		_, err = pack(t.Context(), s.Layout, a, bundle.Options{}, weights)
		body, rerr := os.ReadFile(path)
		if err := errors.Join(err, a.Close(), rerr); err != nil {
			t.Fatal(err)
		}
		files = append(files, body)
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two files")
	}
}

// From a bundle to another layout, all platforms that are there, names move.
func TestImport(t *testing.T) {
	s := newSource(t)
	to := filepath.Join(t.TempDir(), "to")
	for range 2 {
		w, err := ocidir.Create(to)
		if err != nil {
			t.Fatal(err)
		}
		_, err = pack(t.Context(), s.Layout, w, bundle.Options{}, app)
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if r := verify(t, to); len(r.Problems) > 0 || len(r.Names) != 2 {
		t.Errorf("%+v", r)
	}
	if _, err := ocidir.New(to).Stat(t.Context(), s.platforms["s390x"]); err != nil {
		t.Error(err)
	}
}

// Whatever is wrong with a bundle is told, exactly.
func TestVerify(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(s *source) error
		want string
	}{
		"missing": {func(s *source) error { return os.Remove(s.file([]byte("signed"))) }, "it is missing"},
		"torn":    {func(s *source) error { return os.Truncate(s.file([]byte("signed")), 3) }, "it has 3 bytes instead of 6"},
		"lying":   {func(s *source) error { return os.WriteFile(s.file([]byte("signed")), []byte("signet"), 0o600) }, "it has digest"},
		"a pipe": {func(s *source) error {
			return errors.Join(os.Remove(s.file([]byte("signed"))), unix.Mkfifo(s.file([]byte("signed")), 0o600))
		}, "instead of 6"},
		"leads out": {func(s *source) error {
			return errors.Join(os.Remove(s.file([]byte("signed"))), os.Symlink("/etc/passwd", s.file([]byte("signed"))))
		}, "instead of 6"},
		"twice": {func(s *source) error {
			return s.List(s.t.Context(), func(all []v1.Descriptor) ([]v1.Descriptor, error) { return append(all, s.listed...), nil })
		}, "two entries"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSource(t)
			if err := c.harm(s); err != nil {
				t.Fatal(err)
			}
			if r := verify(t, s.Path()); len(r.Problems) == 0 || !slices.ContainsFunc(r.Problems, func(p bundle.Problem) bool { return strings.Contains(p.Wrong, c.want) }) {
				t.Errorf("%+v", r)
			}
		})
	}
	s := newSource(t)
	s.blob([]byte("stray"))
	if r := verify(t, s.Path()); len(r.Problems) > 0 || len(r.Notes) != 1 {
		t.Errorf("%+v", r)
	}
	if err := os.WriteFile(filepath.Join(s.Path(), "oci-layout"), []byte(`{"imageLayoutVersion":"2.0.0"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := bundle.Verify(t.Context(), s.Layout, nothing); err == nil || !strings.Contains(err.Error(), `version "2.0.0"`) {
		t.Error(err)
	}
}

func (s *source) file(body []byte) string {
	return filepath.Join(s.Path(), "blobs", "sha256", digest.FromBytes(body).Encoded())
}

// An archive with tricks is read for what it is; nothing is unpacked.
func TestTricks(t *testing.T) {
	s := newSource(t)
	path := filepath.Join(t.TempDir(), "b.tar")
	a, err := ocidir.CreateArchive(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pack(t.Context(), s.Layout, a, bundle.Options{}, weights); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	tricks := testimage.Tar(
		testimage.File{Header: tar.Header{Name: "../../../etc/cron.d/evil"}, Content: []byte("evil")},
		testimage.File{Header: tar.Header{Name: "/etc/passwd"}, Content: []byte("evil")},
		testimage.File{Header: tar.Header{Name: "blobs/sha256/" + digest.FromString("x").Encoded(), Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"}},
	)
	tricks = tricks[:len(tricks)-1024]
	if err := os.WriteFile(path, append(tricks, body...), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, path); len(r.Problems) > 0 || len(r.Notes) != 2 {
		t.Errorf("%+v", r)
	}
	if err := os.WriteFile(path, body[:len(body)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := bundle.Verify(t.Context(), ocidir.New(path), nothing); err == nil {
		t.Errorf("half an archive: %+v", r)
	}
}

// A full disk leaves no archive, and a directory that verifies.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=60k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s := newSource(t)
	a, err := ocidir.CreateArchive(filepath.Join(dir, "b.tar"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = pack(t.Context(), s.Layout, a, bundle.Options{}, app)
	if err := errors.Join(err, a.Close()); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	w, err := ocidir.Create(filepath.Join(dir, "b"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = pack(t.Context(), s.Layout, w, bundle.Options{}, app)
	if err := errors.Join(err, w.Close()); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if r := verify(t, filepath.Join(dir, "b")); len(r.Problems) > 0 || len(r.Names) > 0 {
		t.Errorf("%+v", r)
	}
}
