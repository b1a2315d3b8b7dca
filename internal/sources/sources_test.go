// SPDX-License-Identifier: Apache-2.0

package sources_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/sources"
	"github.com/holdfast/holdfast/internal/testimage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPlaces(t *testing.T) {
	for text, ok := range map[string]bool{
		"registry": true, "/mnt/usb": true, "oci:/mnt/usb": true, "oci-archive:/mnt/usb/bundle.tar": true,
		"docker://cache.example.com": true, "docker://127.0.0.1:5000/mirror/of": true,
		"": false, "usb": false, "./usb": false, "/mnt/../usb": false, "/mnt/usb/": false, "oci:usb": false, "oci:": false,
		"docker://": false, "docker://cache.example.com/Upper": false, "docker://cache.example.com/a:tag": false,
		"https://cache.example.com": false, "registries": false,
	} {
		var p sources.Place
		if err := p.UnmarshalText([]byte(text)); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
}

const name = "registry.example.com/team/app"

func layout(t *testing.T, tag, command string) (dir string, d digest.Digest) {
	t.Helper()
	l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(testimage.File{Content: []byte(command)}), testimage.Gzip, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	img := testimage.Image{Layers: []testimage.Layer{l}, Cmd: []string{command}}
	dir = filepath.Join(t.TempDir(), "layout")
	if err := img.WriteLayout(dir, name+":"+tag); err != nil {
		t.Fatal(err)
	}
	_, manifest, err := img.Build()
	if err != nil {
		t.Fatal(err)
	}
	return dir, digest.FromBytes(manifest)
}

func parse(t *testing.T, text string) reference.Named {
	t.Helper()
	ref, err := reference.ParseNamed(text)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func TestOrigins(t *testing.T) {
	client := registry.New(registry.Config{RegistriesConf: os.DevNull, RegistriesConfDir: t.TempDir()})
	defer client.Close()
	c := sources.Config{
		Places:  []sources.Place{"/mnt/a", "docker://cache.example.com/x", "registry", "oci-archive:/mnt/b.tar"},
		Trusted: []sources.Place{"/mnt/a"}, Registry: client,
	}
	describe := func(s *sources.Set, offline bool) (all []string) {
		origins, err := s.Origins(parse(t, name+":v1"), nil, offline)
		if err != nil {
			return []string{err.Error()}
		}
		for _, o := range origins {
			text := o.String()
			if o.Trusted {
				text += " trusted"
			}
			all = append(all, text)
		}
		return all
	}
	if got, want := describe(sources.New(c), false), []string{"/mnt/a trusted", "cache.example.com/x/team/app", name, "/mnt/b.tar"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	attached := []string{"/mnt/a trusted", "/mnt/b.tar"}
	if got := describe(sources.New(c), true); !slices.Equal(got, attached) {
		t.Errorf("got %q", got)
	}
	c.Offline = true
	if got := describe(sources.New(c), false); !slices.Equal(got, attached) {
		t.Errorf("got %q", got)
	}
	// What the node itself serves is no source of the node.
	c = sources.Config{Places: []sources.Place{"registry"}, Registry: client, Loopback: "127.0.0.1:5117"}
	if got := func() []sources.Origin {
		all, err := sources.New(c).Origins(parse(t, "127.0.0.1:5117/registry.example.com/app:v1"), nil, false)
		if !errors.Is(err, sources.ErrOffline) {
			t.Error(err)
		}
		return all
	}(); len(got) > 0 {
		t.Errorf("got %v", got)
	}
}

// What runtimes can get out of the attached layouts is whole.
func TestAttached(t *testing.T) {
	first, d1 := layout(t, "v1", "/first")
	second, d2 := layout(t, "v1", "/second")
	third, d3 := layout(t, "v2", "/third")
	s := sources.New(sources.Config{Places: []sources.Place{
		"/not/there", sources.Place(first), "registry", sources.Place(second), sources.Place(third),
	}})
	ctx := t.Context()
	if got := s.Repositories(ctx); !slices.Equal(got, []sources.Attached{{Name: name}}) {
		t.Errorf("repositories %v", got)
	}
	tags, err := s.Tags(ctx, name)
	if err != nil || !slices.Equal(tags, []string{"v1", "v2"}) {
		t.Errorf("tags %q, %v", tags, err)
	}
	manifest := func(tag string) digest.Digest {
		m, err := s.Manifest(ctx, name, tag)
		if err != nil && !errors.Is(err, blob.ErrNotFound) {
			t.Error(err)
		}
		return m.Digest
	}
	for tag, want := range map[string]digest.Digest{"v1": d1, "v2": d3, "v3": "", d2.String(): d2, "no:tag": ""} {
		if got := manifest(tag); got != want {
			t.Errorf("%s: %s, want %s", tag, got, want)
		}
	}
	// The first has lost its layer: the second has the name, too.
	m, err := s.Manifest(ctx, name, "v1")
	if err != nil {
		t.Fatal(err)
	}
	var doc v1.Manifest
	if err := json.Unmarshal(m.Body, &doc); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(first, "blobs", "sha256", doc.Layers[0].Digest.Encoded())); err != nil {
		t.Fatal(err)
	}
	if got := manifest("v1"); got != d2 {
		t.Errorf("got %s, want %s", got, d2)
	}
	desc, src, err := s.Blob(ctx, name, d3)
	if err != nil || desc.Digest != d3 || src.String() != third {
		t.Errorf("%+v from %v, %v", desc, src, err)
	}
}
