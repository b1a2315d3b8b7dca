// SPDX-License-Identifier: Apache-2.0

package testimage_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/testimage"
)

func TestCorpus(t *testing.T) {
	first, second := testimage.Corpus(), testimage.Corpus()
	if len(first) == 0 {
		t.Fatal("the corpus is empty")
	}
	seen := map[string]bool{}
	for i, c := range first {
		if seen[c.Name] || !bytes.Equal(c.Tar, second[i].Tar) || len(c.Formats) == 0 {
			t.Errorf("case %q", c.Name)
		}
		seen[c.Name] = true
	}
}

func TestConvertFile(t *testing.T) {
	dir := t.TempDir()
	in := filepath.Join(dir, "tar")
	if err := os.WriteFile(in, testimage.Corpus()[7].Tar, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range testimage.Formats() {
		t.Run(string(f), func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "layer")
			l, err := testimage.ConvertFile(t.Context(), in, f, testimage.Options{}, out)
			if err != nil {
				t.Fatal(err)
			}
			p, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			if l.Path != out || l.Descriptor.Size != int64(len(p)) || l.Descriptor.Digest != digest.FromBytes(p) || l.DiffID.Validate() != nil {
				t.Errorf("%+v", l)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := testimage.ConvertFile(ctx, in, testimage.Gzip, testimage.Options{}, filepath.Join(dir, "out")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := testimage.ConvertFile(t.Context(), in, "rar", testimage.Options{}, filepath.Join(dir, "out")); err == nil {
		t.Error("an unknown format was accepted")
	}
}

// registry keeps what is pushed.
type registry struct {
	blobs    map[digest.Digest]int64
	manifest []byte
}

func (r *registry) AddBlob(p []byte) digest.Digest {
	r.blobs[digest.FromBytes(p)] = int64(len(p))
	return digest.FromBytes(p)
}

func (r *registry) AddBlobFile(_ string, d digest.Digest, size int64) error {
	r.blobs[d] = size
	return nil
}

func (r *registry) AddManifest(_, _, _ string, body []byte) digest.Digest {
	r.manifest = body
	return digest.FromBytes(body)
}

func TestImage(t *testing.T) {
	corpus := testimage.Corpus()
	var image testimage.Image
	for _, f := range testimage.Formats() {
		l, err := testimage.ConvertBytes(t.Context(), corpus[1].Tar, f, testimage.Options{})
		if err != nil {
			t.Fatal(err)
		}
		image.Layers = append(image.Layers, l)
	}
	onDisk := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(onDisk+".tar", corpus[2].Tar, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := testimage.ConvertFile(t.Context(), onDisk+".tar", testimage.EStargz, testimage.Options{}, onDisk)
	if err != nil {
		t.Fatal(err)
	}
	image.Layers = append(image.Layers, l)
	image.Cmd = []string{"run"}
	r := &registry{blobs: map[digest.Digest]int64{}}
	got, err := image.PushTo(r, "repo", "tag")
	if err != nil || got != digest.FromBytes(r.manifest) {
		t.Fatalf("%s, %v", got, err)
	}
	var m v1.Manifest
	if err := json.Unmarshal(r.manifest, &m); err != nil {
		t.Fatal(err)
	}
	for _, d := range append(m.Layers, m.Config) {
		if size, ok := r.blobs[d.Digest]; !ok || size != d.Size {
			t.Errorf("%s has %d bytes, pushed %t", d.Digest, size, ok)
		}
	}
}
