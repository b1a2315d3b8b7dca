// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
)

// maxNamed bounds what is reachable from a list.
const maxNamed = 1 << 20

// Children returns what a manifest or an index names, in its order.
func Children(m blob.Manifest) (manifests, blobs []v1.Descriptor, err error) {
	var doc struct {
		Manifests []v1.Descriptor `json:"manifests"`
		Config    *v1.Descriptor  `json:"config"`
		Layers    []v1.Descriptor `json:"layers"`
		Blobs     []v1.Descriptor `json:"blobs"` // of artifacts as OCI 1.1 had them before its release
	}
	if err := json.Unmarshal(m.Body, &doc); err != nil {
		return nil, nil, fmt.Errorf("parsing manifest %s: %w", m.Digest, err)
	}
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	blobs = append(append(blobs, doc.Layers...), doc.Blobs...)
	for _, d := range append(append([]v1.Descriptor(nil), doc.Manifests...), blobs...) {
		if d.Digest.Validate() != nil || d.Size < 0 {
			return nil, nil, fmt.Errorf("manifest %s names a blob %q of %d bytes", m.Digest, d.Digest, d.Size)
		}
	}
	return doc.Manifests, blobs, nil
}

// IsManifest reports whether a media type is that of a manifest or an index, which
// names other blobs.
func IsManifest(mediaType string) bool {
	switch mediaType {
	case v1.MediaTypeImageManifest, v1.MediaTypeImageIndex,
		"application/vnd.docker.distribution.manifest.v2+json",
		"application/vnd.docker.distribution.manifest.list.v2+json",
		"application/vnd.oci.artifact.manifest.v1+json":
		return true
	}
	return false
}

// Reachable returns everything that the entries of index.json for which start is true
// lead to. A manifest within an index may be missing, since not every layout has all
// platforms; any other one that cannot be read is an error.
func (l *Layout) Reachable(ctx context.Context, start func(v1.Descriptor) bool) (map[digest.Digest]bool, error) {
	idx, err := l.Index(ctx)
	if err != nil {
		return nil, err
	}
	seen := map[digest.Digest]bool{}
	type step struct {
		v1.Descriptor
		listed bool
	}
	var todo []step
	for _, m := range idx.Manifests {
		if start(m) {
			todo = append(todo, step{m, true})
		}
	}
	for len(todo) > 0 {
		next := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[next.Digest] {
			continue
		}
		m, err := l.Manifest(ctx, next.Digest.String())
		if errors.Is(err, blob.ErrNotFound) && !next.listed {
			continue
		}
		if err != nil {
			return nil, err
		}
		seen[next.Digest] = true
		manifests, blobs, err := Children(m)
		if err != nil {
			return nil, err
		}
		for _, d := range manifests {
			todo = append(todo, step{d, false})
		}
		for _, d := range blobs {
			seen[d.Digest] = true
		}
		if len(seen)+len(todo) > maxNamed {
			return nil, fmt.Errorf("%s lists more than %d blobs", l, maxNamed)
		}
	}
	return seen, nil
}

// Sweep removes the blobs that index.json does not lead to, and returns how many
// bytes they had. If anything listed cannot be read, all stay.
func (w *Writer) Sweep(ctx context.Context) (freed int64, err error) {
	keep, err := w.Reachable(ctx, func(v1.Descriptor) bool { return true })
	if err != nil {
		return 0, fmt.Errorf("removing what is not needed in %s: %w", w, err)
	}
	blobs := filepath.Join(w.path, v1.ImageBlobsDir)
	algorithms, err := os.ReadDir(blobs)
	if err != nil {
		return 0, fmt.Errorf("removing what is not needed in %s: %w", w, err)
	}
	for _, a := range algorithms {
		dir := filepath.Join(blobs, a.Name())
		entries, err := os.ReadDir(dir)
		if err != nil {
			return freed, fmt.Errorf("removing what is not needed in %s: %w", w, err)
		}
		for _, e := range entries {
			d := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), e.Name())
			if d.Validate() != nil || keep[d] {
				continue // not ours, or needed
			}
			if info, err := e.Info(); err == nil {
				freed += info.Size()
			}
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return freed, fmt.Errorf("removing blob %s: %w", d, err)
			}
		}
		if err := atomicfile.SyncDir(dir); err != nil {
			return freed, err
		}
	}
	return freed, nil
}
