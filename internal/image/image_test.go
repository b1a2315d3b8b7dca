// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func app(t *testing.T) testimage.Image {
	t.Helper()
	img := testimage.Image{Entrypoint: []string{"/app"}}
	for i, f := range []testimage.Format{testimage.Gzip, testimage.Uncompressed} {
		l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(testimage.File{Content: testimage.Bytes(1000, uint64(i))}), f, testimage.Options{})
		if err != nil {
			t.Fatal(err)
		}
		img.Layers = append(img.Layers, l)
	}
	return img
}

// opener reads from a test registry.
func opener(t *testing.T, s *testregistry.Server) image.Opener {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "registries.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", s.Host()), 0o600); err != nil {
		t.Fatal(err)
	}
	client := registry.New(registry.Config{RegistriesConf: conf, RegistriesConfDir: "/nonexistent", CertsDir: []string{}})
	t.Cleanup(client.Close)
	return image.Opener{Registry: client, Platform: image.Platform{OS: "linux", Architecture: "amd64"}}
}

func start(t *testing.T) *testregistry.Server {
	t.Helper()
	s, err := testregistry.Start(testregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// An image is the same whatever it is read from, and by whichever of its names.
func TestOpen(t *testing.T) {
	s, want := start(t), app(t)
	d, err := want.PushTo(s, "team/app", "v1")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	if err := want.WriteLayout(dir, "v1"); err != nil {
		t.Fatal(err)
	}
	archive, packed := dir+".tar", dir+".tar.gz"
	for _, args := range [][]string{{"-cf", archive}, {"-czf", packed}} {
		if out, err := exec.CommandContext(t.Context(), "tar", append(args, "-C", dir, ".")...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	o := opener(t, s)
	for _, name := range []string{
		s.Host() + "/team/app:v1", "docker://" + s.Host() + "/team/app:v1", s.Host() + "/team/app@" + d.String(),
		dir, "oci:" + dir, "oci:" + dir + ":v1", archive, packed, "oci-archive:" + archive, "oci-archive:" + archive + ":v1",
	} {
		t.Run(name, func(t *testing.T) {
			got, err := o.Open(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := got.Close(); err != nil {
					t.Error(err)
				}
			}()
			if got.Name != name || got.Manifest.Digest != d || got.Manifest.MediaType != v1.MediaTypeImageManifest || got.Config.NoCommand() {
				t.Errorf("%s: manifest %+v, configuration %+v", got.Name, got.Manifest, got.Config)
			}
			if len(got.Layers) != len(want.Layers) {
				t.Fatalf("%d layers", len(got.Layers))
			}
			for i, l := range got.Layers {
				if l.DiffID != want.Layers[i].DiffID {
					t.Errorf("layer %d has diff ID %s", i, l.DiffID)
				}
				for _, src := range got.Sources() {
					rc, err := src.Open(t.Context(), l.Blob(), 0, l.Size)
					if err != nil {
						t.Fatal(err)
					}
					body, err := io.ReadAll(rc)
					if err := errors.Join(err, rc.Close()); err != nil || digest.FromBytes(body) != l.Digest {
						t.Errorf("layer %d from %s: %d bytes, %v", i, src, len(body), err)
					}
				}
			}
		})
	}
}

func TestOpenFails(t *testing.T) {
	s := start(t)
	o := opener(t, s)
	dir := t.TempDir()
	other := filepath.Join(dir, "other.tar") // as podman save writes by default
	if err := os.WriteFile(other, testimage.Tar(testimage.File{Header: tar.Header{Name: "manifest.json"}, Content: []byte("[]")}), 0o600); err != nil {
		t.Fatal(err)
	}
	layout := filepath.Join(dir, "layout")
	if err := app(t).WriteLayout(layout, "v1"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"":                              "not the name of an image",
		"Upper/Case":                    "not the name of an image",
		dir:                             "no OCI layout",
		"./nothing":                     "no OCI layout",
		"docker-archive:" + other:       "only oci: and oci-archive: can be read",
		"dir:" + layout:                 "only oci: and oci-archive: can be read",
		"oci:":                          "not the name of an image",
		"oci:/a:B C":                    "no OCI layout",
		"oci:" + dir:                    "reading image",
		"oci:" + layout + ":v2":         "v2",
		"oci-archive:/nonexistent/file": "nonexistent",
		other:                           "podman save --format oci-archive",
		s.Host() + "/none":              "not found",
	} {
		if img, err := o.Open(t.Context(), name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, error %v; want %q", name, img, err, want)
		} else if errors.Is(err, image.ErrName) != strings.Contains(err.Error(), "not the name") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// What a layout holds is compared with the digests that name it.
func TestDamagedLayout(t *testing.T) {
	img := app(t)
	config, manifest, err := img.Build()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		blob []byte
		new  string
		want error
	}{
		"another configuration": {config, strings.Replace(string(config), "/app", "/bad", 1), blob.ErrCorrupt},
		"longer configuration":  {config, string(config) + " ", blob.ErrCorrupt},
		"no configuration":      {config, "", blob.ErrNotFound},
		"no manifest":           {manifest, "", blob.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := img.WriteLayout(dir, "v1"); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "blobs", "sha256", digest.FromBytes(c.blob).Encoded())
			err := os.Remove(file)
			if c.new != "" {
				err = os.WriteFile(file, []byte(c.new), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := opener(t, start(t)).Open(t.Context(), dir); !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
}

func TestLayout(t *testing.T) {
	blobtest.Run(t, func(t *testing.T, blobs map[digest.Digest][]byte) blob.Source {
		dir, img := t.TempDir(), app(t)
		for d, p := range blobs {
			img.Layers = append(img.Layers, testimage.Layer{Descriptor: v1.Descriptor{Digest: d, Size: int64(len(p))}, DiffID: d, Bytes: p})
		}
		if err := img.WriteLayout(dir, "v1"); err != nil {
			t.Fatal(err)
		}
		got, err := image.Opener{}.Open(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = got.Close() })
		return got.Sources()[0]
	})
}

func TestPlatform(t *testing.T) {
	s, img := start(t), app(t)
	amd, err := img.PushTo(s, "team/app", "amd")
	if err != nil {
		t.Fatal(err)
	}
	img.Entrypoint = []string{"/arm"}
	arm, err := img.PushTo(s, "team/app", "arm")
	if err != nil {
		t.Fatal(err)
	}
	index := v1.Index{MediaType: v1.MediaTypeImageIndex}
	for _, m := range []struct {
		d digest.Digest
		p *v1.Platform
	}{
		{digest.FromString("attestation"), nil},
		{amd, &v1.Platform{OS: "linux", Architecture: "amd64"}},
		{digest.FromString("v6"), &v1.Platform{OS: "linux", Architecture: "arm", Variant: "v6"}},
		{arm, &v1.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}},
	} {
		index.Manifests = append(index.Manifests, v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: m.d, Platform: m.p})
	}
	body, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	s.AddManifest("team/app", "all", v1.MediaTypeImageIndex, body)
	o := opener(t, s)
	for text, want := range map[string]string{
		"linux/amd64": amd.String(), "linux/arm/v7": arm.String(),
		"linux/arm":    digest.FromString("v6").String(), // it is not there
		"linux/arm/v8": "has no manifest for linux/arm/v8", "windows/amd64": "has no manifest for windows/amd64",
		"linux": `platform "linux": want`, "linux/": "want", "/amd64": "want", "a/b/c/d": "want", "": "want", "linux/arm/": "want",
	} {
		got := ""
		p, err := image.ParsePlatform(text)
		if err == nil {
			if p.String() != text {
				t.Errorf("%s has become %s", text, p)
			}
			o.Platform = p
			var img *image.Opened
			if img, err = o.Open(t.Context(), s.Host()+"/team/app:all"); err == nil {
				got = img.Manifest.Digest.String()
			}
		}
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) {
			t.Errorf("%q: %s; want %s", text, got, want)
		}
	}
	if p := image.Machine().String(); !strings.HasPrefix(p, "linux/") {
		t.Error(p)
	}
}
