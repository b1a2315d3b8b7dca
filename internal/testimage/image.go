// SPDX-License-Identifier: Apache-2.0

package testimage

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ConvertBytes converts a tar in memory to a layer in memory.
func ConvertBytes(ctx context.Context, tar []byte, f Format, o Options) (Layer, error) {
	var out bytes.Buffer
	l, err := Convert(ctx, io.NewSectionReader(bytes.NewReader(tar), 0, int64(len(tar))), f, o, &out)
	l.Bytes = out.Bytes()
	return l, err
}

// Image is an OCI image for linux/amd64.
type Image struct {
	Layers     []Layer // base first
	Entrypoint []string
	Cmd        []string
	Env        []string
}

// Registry is where images go: package testregistry, for one.
type Registry interface {
	AddBlob(p []byte) digest.Digest
	AddBlobFile(path string, d digest.Digest, size int64) error
	AddManifest(repo, tag, mediaType string, body []byte) digest.Digest
}

// Build returns the image's configuration and its manifest.
func (i Image) Build() (config, manifest []byte, err error) {
	created := time.Unix(1_700_000_000, 0).UTC()
	c := v1.Image{
		Created:  &created,
		Platform: v1.Platform{Architecture: "amd64", OS: "linux"},
		Config:   v1.ImageConfig{Entrypoint: i.Entrypoint, Cmd: i.Cmd, Env: i.Env},
		RootFS:   v1.RootFS{Type: "layers"},
	}
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	for n, l := range i.Layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, l.DiffID)
		c.History = append(c.History, v1.History{Created: &created, CreatedBy: fmt.Sprintf("layer %d", n)})
		m.Layers = append(m.Layers, l.Descriptor)
	}
	if config, err = json.Marshal(c); err != nil {
		return nil, nil, fmt.Errorf("encoding image configuration: %w", err)
	}
	m.Config = v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	if manifest, err = json.Marshal(m); err != nil {
		return nil, nil, fmt.Errorf("encoding image manifest: %w", err)
	}
	return config, manifest, nil
}

// PushTo adds the image to a registry and returns the digest of its manifest.
func (i Image) PushTo(r Registry, repo, tag string) (digest.Digest, error) {
	config, manifest, err := i.Build()
	if err != nil {
		return "", err
	}
	for _, l := range i.Layers {
		if l.Path != "" {
			if err := r.AddBlobFile(l.Path, l.Descriptor.Digest, l.Descriptor.Size); err != nil {
				return "", fmt.Errorf("pushing layer %s to %s: %w", l.Descriptor.Digest, repo, err)
			}
		} else {
			r.AddBlob(l.Bytes)
		}
	}
	r.AddBlob(config)
	return r.AddManifest(repo, tag, v1.MediaTypeImageManifest, manifest), nil
}
