// SPDX-License-Identifier: Apache-2.0

// Package image reads what an image says about itself: the manifest of one
// platform, and its configuration. [Opener] finds images by the names that people
// give them: in a registry, in an OCI layout, in an archive of one.
//
// It reads no layers; their bytes come from blob sources and are verified by
// whoever reads them. Manifests and configurations are verified here, and an
// [Image] that exists names each layer by two sound digests.
package image

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/blob/registry"
)

const maxConfig = 4 << 20 // bytes of an image configuration

// sociAnnotation is how the manifest of an image names its SOCI index of version 2:
// github.com/awslabs/soci-snapshotter, soci/soci_index.go.
const sociAnnotation = "com.amazon.soci.index-digest"

// Image is an image of one platform. It is immutable.
type Image struct {
	Manifest v1.Descriptor // media type, digest and size of the platform's manifest
	// Bound is the SOCI index that the manifest names, "" if it names none.
	Bound  digest.Digest
	Config Config
	Layers []Layer // base first
}

// Layer is a layer as manifest and configuration have it.
type Layer struct {
	v1.Descriptor
	DiffID digest.Digest
}

// Blob is the layer's blob.
func (l Layer) Blob() blob.Descriptor { return blob.Descriptor{Digest: l.Digest, Size: l.Size} }

// Config is the part of an image's configuration that is looked at.
type Config struct {
	Config struct {
		Entrypoint []string `json:"Entrypoint"`
		Cmd        []string `json:"Cmd"`
		Env        []string `json:"Env"`
		WorkingDir string   `json:"WorkingDir"`
	} `json:"config"`
	RootFS struct {
		DiffIDs []digest.Digest `json:"diff_ids"`
	} `json:"rootfs"`
}

// NoCommand reports whether the image says nothing about what to run.
func (c Config) NoCommand() bool { return len(c.Config.Entrypoint) == 0 && len(c.Config.Cmd) == 0 }

// Reader is what manifests and configurations are read from: a repository, or an
// OCI layout. Both methods verify digests that they are asked for.
type Reader interface {
	ManifestReader
	Blob(ctx context.Context, desc blob.Descriptor, limit int64) ([]byte, error)
}

// ManifestReader reads manifests, and verifies those that it is asked for by digest.
type ManifestReader interface {
	Manifest(ctx context.Context, tagOrDigest string) (blob.Manifest, error)
}

var (
	_ Reader = (*registry.Repository)(nil)
	_ Reader = (*ocidir.Layout)(nil)
)

// Manifest reads the manifest of a platform: the one that is asked for, or the one that
// an index has for the platform.
func Manifest(ctx context.Context, from ManifestReader, tagOrDigest string, p Platform) (blob.Manifest, error) {
	m, err := from.Manifest(ctx, tagOrDigest)
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("fetching manifest: %w", err)
	}
	if !types.MediaType(m.MediaType).IsIndex() {
		return m, nil
	}
	d, err := p.Choose(m.Body)
	if err != nil {
		return blob.Manifest{}, err
	}
	if m, err = from.Manifest(ctx, d.String()); err != nil {
		return blob.Manifest{}, fmt.Errorf("fetching manifest %s: %w", d, err)
	}
	return m, nil
}

// Load reads the image of a platform.
func Load(ctx context.Context, from Reader, tagOrDigest string, p Platform) (*Image, error) {
	m, err := Manifest(ctx, from, tagOrDigest, p)
	if err != nil {
		return nil, err
	}
	if !types.MediaType(m.MediaType).IsImage() {
		return nil, fmt.Errorf("manifest of type %q is not an image's", m.MediaType)
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(m.Body, &manifest); err != nil {
		return nil, fmt.Errorf("parsing manifest %s: %w", m.Digest, err)
	}
	config, err := from.Blob(ctx, blob.Descriptor{Digest: manifest.Config.Digest, Size: manifest.Config.Size}, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("fetching configuration: %w", err)
	}
	img := &Image{
		Manifest: v1.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Body))},
		Bound:    digest.Digest(manifest.Annotations[sociAnnotation]),
	}
	if err := json.Unmarshal(config, &img.Config); err != nil {
		return nil, fmt.Errorf("parsing configuration %s: %w", manifest.Config.Digest, err)
	}
	return img, img.setLayers(manifest.Layers)
}

// setLayers refuses layers that nothing could be made of.
func (i *Image) setLayers(layers []v1.Descriptor) error {
	if len(layers) != len(i.Config.RootFS.DiffIDs) {
		return fmt.Errorf("image has %d layers and %d diff IDs", len(layers), len(i.Config.RootFS.DiffIDs))
	}
	for n, l := range layers {
		diffID := i.Config.RootFS.DiffIDs[n]
		for _, d := range []digest.Digest{l.Digest, diffID} {
			if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
				return fmt.Errorf("layer %d has digest %q: only sha256 is supported", n, d)
			}
		}
		if l.Size < 0 {
			return fmt.Errorf("layer %d has %d bytes", n, l.Size)
		}
		i.Layers = append(i.Layers, Layer{l, diffID})
	}
	return nil
}

// Platform is what an image is for.
type Platform struct {
	OS, Architecture string
	Variant          string // "" is any
}

// Machine is the platform of this machine.
func Machine() Platform { return Platform{OS: "linux", Architecture: runtime.GOARCH} }

// ParsePlatform reads a platform such as linux/arm64 or linux/arm/v7.
func ParsePlatform(text string) (Platform, error) {
	parts := strings.Split(text, "/")
	for _, p := range parts {
		if p == "" || len(parts) == 1 || len(parts) > 3 {
			return Platform{}, fmt.Errorf("platform %q: want OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, such as linux/arm64", text)
		}
	}
	p := Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p, nil
}

func (p Platform) String() string {
	return strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
}

// Choose finds the platform's manifest in an image index: the first that matches,
// as runtimes do.
func (p Platform) Choose(body []byte) (digest.Digest, error) {
	var idx v1.Index
	if err := json.Unmarshal(body, &idx); err != nil {
		return "", fmt.Errorf("parsing image index: %w", err)
	}
	for _, m := range idx.Manifests {
		if o := m.Platform; o != nil && o.OS == p.OS && o.Architecture == p.Architecture && (p.Variant == "" || p.Variant == o.Variant) {
			return m.Digest, nil
		}
	}
	return "", fmt.Errorf("image index has no manifest for %s", p)
}
