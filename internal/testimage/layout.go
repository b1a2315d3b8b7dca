// SPDX-License-Identifier: Apache-2.0

package testimage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// WriteLayout writes the image to a new OCI layout in dir, under a tag.
func (i Image) WriteLayout(dir, tag string) error {
	config, manifest, err := i.Build()
	if err != nil {
		return err
	}
	w := layout{dir: dir}
	w.write(v1.ImageLayoutFile, []byte(`{"imageLayoutVersion": "`+v1.ImageLayoutVersion+`"}`))
	for _, l := range i.Layers {
		w.layer(l)
	}
	w.blob(config)
	w.blob(manifest)
	index, err := json.Marshal(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{{
			MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest)),
			Annotations: map[string]string{v1.AnnotationRefName: tag},
		}},
	})
	w.write(v1.ImageIndexFile, index)
	if err := errors.Join(err, w.err); err != nil {
		return fmt.Errorf("writing an OCI layout: %w", err)
	}
	return nil
}

// layout writes the files of an OCI layout, until the first error.
type layout struct {
	dir string
	err error
}

func (w *layout) create(name string, write func(io.Writer) error) {
	if w.err != nil {
		return
	}
	path := filepath.Join(w.dir, name)
	if w.err = os.MkdirAll(filepath.Dir(path), 0o755); w.err != nil {
		return
	}
	f, err := os.Create(path)
	if err != nil {
		w.err = err
		return
	}
	w.err = errors.Join(write(f), f.Close())
}

func (w *layout) write(name string, p []byte) {
	w.create(name, func(out io.Writer) error { _, err := out.Write(p); return err })
}

func blobName(d digest.Digest) string {
	return filepath.Join("blobs", d.Algorithm().String(), d.Encoded())
}

func (w *layout) blob(p []byte) { w.write(blobName(digest.FromBytes(p)), p) }

func (w *layout) layer(l Layer) {
	if l.Path == "" {
		w.write(blobName(l.Descriptor.Digest), l.Bytes)
		return
	}
	w.create(blobName(l.Descriptor.Digest), func(out io.Writer) error {
		in, err := os.Open(l.Path)
		if err != nil {
			return err
		}
		defer in.Close() //nolint:errcheck // read only
		_, err = io.Copy(out, in)
		return err
	})
}
