// SPDX-License-Identifier: Apache-2.0

package artifactstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/manifest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

// Errors about what artifact stores do not hold.
var (
	// ErrImage means that something is an image.
	ErrImage = errors.New("it is an image, not an artifact")
	// ErrUnreadable means that readers of artifact stores could not read a manifest, and
	// then nothing else in the store either.
	ErrUnreadable = errors.New("readers of artifact stores cannot read it")
)

// The annotations of a manifest that was made since a digest has several names: the
// digest of the manifest that it stands for, and its name.
const (
	SameAsAnnotation = "dev.holdfast.artifact.same-as"
	NameAnnotation   = "dev.holdfast.artifact.name"
)

// maxFiles bounds the files of an artifact.
const maxFiles = 10_000

// Artifact is a manifest that readers of artifact stores understand.
type Artifact struct {
	v1.Manifest
	// Original is the digest that the manifest had before it was made for another name.
	Original digest.Digest
}

// Parse reads the manifest of an artifact: [ErrImage] or [ErrUnreadable] if it is none that
// a store may hold. Its files have names that lead nowhere else.
func Parse(m blob.Manifest) (*Artifact, error) {
	if types.MediaType(m.MediaType).IsIndex() || m.MediaType != v1.MediaTypeImageManifest && m.MediaType != "" {
		return nil, fmt.Errorf("manifest %s of type %q: %w", m.Digest, m.MediaType, ErrUnreadable)
	}
	if len(m.Body) > ocidir.MaxManifest {
		return nil, fmt.Errorf("manifest %s of %d bytes, more than %d: %w", m.Digest, len(m.Body), ocidir.MaxManifest, ErrUnreadable)
	}
	// The very function that CRI-O and Podman read it with.
	if _, err := manifest.OCI1FromManifest(m.Body); err != nil {
		return nil, fmt.Errorf("manifest %s: %w: %w", m.Digest, ErrUnreadable, err)
	}
	if guessed := manifest.GuessMIMEType(m.Body); guessed != v1.MediaTypeImageManifest {
		return nil, fmt.Errorf("manifest %s of type %q: %w", m.Digest, guessed, ErrUnreadable)
	}
	a := &Artifact{Original: m.Digest}
	if err := json.Unmarshal(m.Body, &a.Manifest); err != nil {
		return nil, fmt.Errorf("manifest %s: %w: %w", m.Digest, ErrUnreadable, err)
	}
	// As CRI-O tells them apart (internal/ociartifact/store.go, EnsureNotContainerImage).
	if types.MediaType(a.Config.MediaType).IsConfig() && a.ArtifactType == "" {
		return nil, fmt.Errorf("manifest %s: %w", m.Digest, ErrImage)
	}
	if len(a.Layers) > maxFiles {
		return nil, fmt.Errorf("manifest %s: %d files are more than %d: %w", m.Digest, len(a.Layers), maxFiles, ErrUnreadable)
	}
	var total int64
	for _, d := range append([]v1.Descriptor{a.Config}, a.Layers...) {
		if total += d.Size; total < 0 {
			return nil, fmt.Errorf("manifest %s: its files are larger than any disk: %w", m.Digest, ErrUnreadable)
		}
		if d.Digest.Validate() != nil || d.Digest.Algorithm() != digest.SHA256 || d.Size < 0 {
			return nil, fmt.Errorf("manifest %s names a blob %q of %d bytes: %w", m.Digest, d.Digest, d.Size, ErrUnreadable)
		}
		if title := FileName(d); title != "" && !isLocal(title) {
			return nil, fmt.Errorf("manifest %s: the file %q leads out of its directory: %w", m.Digest, title, ErrUnreadable)
		}
	}
	if same, err := digest.Parse(a.Annotations[SameAsAnnotation]); err == nil {
		a.Original = same
	}
	return a, nil
}

// modelFilepath is the name of a file in a model: the annotation of
// github.com/modelpack/model-spec that CRI-O looks at after the title.
const modelFilepath = "org.cncf.model.filepath"

// FileName is the name under which a file of an artifact is mounted; "" if it has none.
func FileName(d v1.Descriptor) string {
	if title, ok := d.Annotations[v1.AnnotationTitle]; ok {
		return title
	}
	return d.Annotations[modelFilepath]
}

func isLocal(name string) bool {
	clean := path.Clean(name)
	return !path.IsAbs(name) && clean != ".." && !strings.HasPrefix(clean, "../") && !strings.ContainsRune(name, 0)
}

// Type is the type of an artifact: what it says itself, or that of its configuration.
func (a *Artifact) Type() string {
	if a.ArtifactType != "" {
		return a.ArtifactType
	}
	return a.Config.MediaType
}

// Size is how many bytes its files have.
func (a *Artifact) Size() int64 {
	var n int64
	for _, d := range a.Layers {
		n += d.Size
	}
	return n
}

// Blobs are what it consists of beside its manifest, each once.
func (a *Artifact) Blobs() []blob.Descriptor {
	var all []blob.Descriptor
	seen := map[digest.Digest]bool{}
	for _, d := range append([]v1.Descriptor{a.Config}, a.Layers...) {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			all = append(all, blob.Descriptor{Digest: d.Digest, Size: d.Size})
		}
	}
	return all
}

// Alias makes a manifest for another name of an artifact. Readers find artifacts by the
// digests of their manifests, too, and fail if two entries of a store have the same:
// so the second name gets a manifest of its own, with the same files.
func Alias(m blob.Manifest, name string) (blob.Manifest, error) {
	a, err := Parse(m)
	if err != nil {
		return blob.Manifest{}, err
	}
	annotations := map[string]string{}
	for k, v := range a.Annotations {
		annotations[k] = v
	}
	annotations[SameAsAnnotation], annotations[NameAnnotation] = a.Original.String(), name
	a.Annotations, a.MediaType = annotations, v1.MediaTypeImageManifest
	body, err := json.Marshal(a.Manifest)
	if err == nil && len(body) > ocidir.MaxManifest {
		err = fmt.Errorf("%d bytes are more than %d: %w", len(body), ocidir.MaxManifest, ErrUnreadable)
	}
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("making a manifest for %s: %w", name, err)
	}
	return blob.Manifest{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Body: body}, nil
}

// ErrName means that a name is none by which readers find an artifact.
var ErrName = errors.New("want a full name with a registry and a tag, such as quay.io/models/llama:8b (--as gives one)")

// checkDigest checks that a name with a digest has that of the manifest, by which readers
// compare: an index, or an artifact that was made here, has another.
func checkDigest(name string, d digest.Digest) error {
	ref, err := CheckName(name)
	if err != nil {
		return err
	}
	if named, ok := ref.(reference.Digested); ok && named.Digest() != d {
		return fmt.Errorf("artifact %s would be found neither by that digest, since its manifest has %s, nor by a tag: give it one with --as", name, d)
	}
	return nil
}

// CheckName checks the name of an artifact in a store.
func CheckName(name string) (reference.Named, error) {
	ref, err := reference.ParseNamed(name)
	if err != nil {
		return nil, fmt.Errorf("artifact %q: %w: %w", name, err, ErrName)
	}
	_, tagged := ref.(reference.Tagged)
	_, digested := ref.(reference.Digested)
	if tagged == digested { // both is as bad as none
		return nil, fmt.Errorf("artifact %q: %w", name, ErrName)
	}
	return ref, nil
}
