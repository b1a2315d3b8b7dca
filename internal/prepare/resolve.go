// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/blob/retry"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/indexstore"
)

const maxConfig = 4 << 20 // bytes of an image configuration

// patience is how often one of so many sources is asked again. A reader waits
// meanwhile; where there are others they are the better choice.
func patience(sources int) retry.Policy {
	p := retry.Policy{Attempts: 6, Base: 200 * time.Millisecond, Max: 10 * time.Second}
	if sources > 1 {
		p.Attempts, p.Max = 3, time.Second
	}
	return p
}

// sociAnnotation is how the manifest of an image names its SOCI index of version 2:
// github.com/awslabs/soci-snapshotter, soci/soci_index.go.
const sociAnnotation = "com.amazon.soci.index-digest"

// resolved is an image of this platform, and where it can be read from.
type resolved struct {
	ref       reference.Named
	digest    digest.Digest // of the platform's manifest
	manifest  indexstore.Subject
	bound     digest.Digest // the SOCI index that the manifest names, "" if it names none
	indexes   *indexes.Image
	layers    []v1.Descriptor
	config    imageConfig
	endpoints []*registry.Repository // the one that had the manifest first
	private   bool                   // the registry wanted credentials
	profile   *found                 // what to fetch first
}

// imageConfig is the part of an image's configuration that is looked at.
type imageConfig struct {
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

func (c imageConfig) noCommand() bool { return len(c.Config.Entrypoint) == 0 && len(c.Config.Cmd) == 0 }

// sources are the places a blob of the image is read from, best first.
func (r *resolved) sources() []blob.Source { return sources(r.endpoints) }

func sources(endpoints []*registry.Repository) []blob.Source {
	all := make([]blob.Source, len(endpoints))
	for i, e := range endpoints {
		all[i] = retry.New(e, patience(len(endpoints)))
	}
	return all
}

// resolve asks the endpoints of a reference, mirrors first, for its manifest and
// its configuration.
func (p *Preparer) resolve(ctx context.Context, ref reference.Named, creds *registry.Credentials) (*resolved, error) {
	endpoints, err := p.registry.Endpoints(ref, creds)
	if err != nil {
		return nil, fmt.Errorf("finding registries: %w", err)
	}
	var failed error
	for i, e := range endpoints {
		img := &resolved{ref: ref}
		img.endpoints = append(append(img.endpoints, endpoints[i:]...), endpoints[:i]...)
		err := img.load(ctx, e)
		if err == nil {
			img.private = e.Authenticated()
			img.indexes = p.indexes.Image(e, img.manifest, img.bound)
			return img, nil
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", e, err))
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return nil, failed
}

func (r *resolved) load(ctx context.Context, repo *registry.Repository) error {
	m, err := repo.Manifest(ctx, tagOrDigest(r.ref))
	if err != nil {
		return fmt.Errorf("fetching manifest: %w", err)
	}
	if types.MediaType(m.MediaType).IsIndex() {
		d, err := selectPlatform(m.Body)
		if err != nil {
			return err
		}
		if m, err = repo.Manifest(ctx, d.String()); err != nil {
			return fmt.Errorf("fetching manifest %s: %w", d, err)
		}
	}
	if !types.MediaType(m.MediaType).IsImage() {
		return fmt.Errorf("manifest of type %q is not an image's", m.MediaType)
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(m.Body, &manifest); err != nil {
		return fmt.Errorf("parsing manifest %s: %w", m.Digest, err)
	}
	config, err := repo.Blob(ctx, blob.Descriptor{Digest: manifest.Config.Digest, Size: manifest.Config.Size}, maxConfig)
	if err != nil {
		return fmt.Errorf("fetching configuration: %w", err)
	}
	if err := json.Unmarshal(config, &r.config); err != nil {
		return fmt.Errorf("parsing configuration %s: %w", manifest.Config.Digest, err)
	}
	r.digest, r.layers = m.Digest, manifest.Layers
	r.manifest = indexstore.Subject{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Body))}
	r.bound = digest.Digest(manifest.Annotations[sociAnnotation])
	return r.check()
}

// check refuses what records could not be made of.
func (r *resolved) check() error {
	if len(r.layers) != len(r.config.RootFS.DiffIDs) {
		return fmt.Errorf("image has %d layers and %d diff IDs", len(r.layers), len(r.config.RootFS.DiffIDs))
	}
	for i, l := range r.layers {
		diffID := r.config.RootFS.DiffIDs[i]
		for _, d := range []digest.Digest{l.Digest, diffID} {
			if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
				return fmt.Errorf("layer %d has digest %q: only sha256 is supported", i, d)
			}
		}
		if l.Size < 0 {
			return fmt.Errorf("layer %d has %d bytes", i, l.Size)
		}
	}
	return nil
}

func tagOrDigest(ref reference.Named) string {
	if d, ok := ref.(reference.Digested); ok {
		return d.Digest().String()
	}
	if t, ok := ref.(reference.Tagged); ok {
		return t.Tag()
	}
	return "latest"
}

// selectPlatform finds this machine's manifest in an image index: the first
// that matches, as runtimes do.
func selectPlatform(body []byte) (digest.Digest, error) {
	var idx v1.Index
	if err := json.Unmarshal(body, &idx); err != nil {
		return "", fmt.Errorf("parsing image index: %w", err)
	}
	for _, m := range idx.Manifests {
		if m.Platform != nil && m.Platform.OS == "linux" && m.Platform.Architecture == runtime.GOARCH {
			return m.Digest, nil
		}
	}
	return "", fmt.Errorf("image index has no manifest for linux/%s", runtime.GOARCH)
}
