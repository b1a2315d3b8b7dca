// SPDX-License-Identifier: Apache-2.0

package indexstore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
)

// Media types and annotations of SOCI; see soci/soci_index.go of
// github.com/awslabs/soci-snapshotter.
const (
	sociIndexV1 = "application/vnd.amazon.soci.index.v1+json" // has the image as its subject
	sociIndexV2 = "application/vnd.amazon.soci.index.v2+json" // is named by the image
	sociZTOC    = "application/octet-stream"

	sociLayerDigest    = "com.amazon.soci.image-layer-digest"
	sociLayerMediaType = "com.amazon.soci.image-layer-mediaType"
	sociSpanSize       = "com.amazon.soci.span-size"
	sociBuildTool      = "com.amazon.soci.build-tool-identifier"
)

// What SOCI has no names for. It passes by what has none of its annotations.
const (
	profileType = "application/vnd.holdfast.profile.v1+json"
	digestsType = "application/vnd.holdfast.digests.v1"
	chunksType  = "application/vnd.holdfast.chunks.v1"
	ztocType    = "application/vnd.holdfast.ztoc.v1" // of layers that SOCI does not know

	layerDigest = "io.holdfast.layer-digest"
	buildTool   = "Holdfast"
)

const (
	// maxDocuments bounds the documents of a manifest: images have at most 127
	// layers, with three documents each at most.
	maxDocuments = 1024
	// maxReferrers bounds the manifests that refer to an image.
	maxReferrers = 1 << 15
)

// errMalformed is that a manifest is none, or not of the kind that was looked for.
var errMalformed = errors.New("not a manifest of documents")

// descriptor is what counts of a descriptor. The rest of it takes no memory,
// whatever is in there.
type descriptor struct {
	MediaType    string        `json:"mediaType"`
	ArtifactType string        `json:"artifactType"`
	Digest       digest.Digest `json:"digest"`
	Size         int64         `json:"size"`
	Annotations  struct {
		SOCILayer digest.Digest `json:"com.amazon.soci.image-layer-digest"`
		Layer     digest.Digest `json:"io.holdfast.layer-digest"`
		Created   string        `json:"org.opencontainers.image.created"`
	} `json:"annotations"`
}

// created is when the manifest was, as its annotation says; zero if that does not.
func (d descriptor) created() time.Time {
	t, err := time.Parse(time.RFC3339, d.Annotations.Created)
	if err != nil {
		return time.Time{}
	}
	return t
}

// document returns which document of what this is; the kind is empty if it is none.
func (d descriptor) document() document {
	switch d.MediaType {
	case sociZTOC:
		if d.Annotations.SOCILayer != "" {
			return document{ZTOC, d.Annotations.SOCILayer}
		}
	case ztocType:
		return document{ZTOC, d.Annotations.Layer}
	case digestsType:
		return document{Digests, d.Annotations.Layer}
	case chunksType:
		return document{Chunks, d.Annotations.Layer}
	case profileType:
		return document{Profile, ""}
	}
	return document{}
}

// document is a kind of document, and the layer it is about.
type document struct {
	kind  Kind
	layer digest.Digest
}

// manifest is what a manifest lists.
type manifest struct {
	digest    digest.Digest // if it was read
	is        string        // its kind: an artifact type, or the media type of the config
	subject   digest.Digest // "" if it has none
	documents map[document]blob.Descriptor
}

// decodeManifest decodes a manifest of documents. Of several of the same kind about
// the same layer the first counts.
func decodeManifest(body []byte) (*manifest, error) {
	var doc struct {
		ArtifactType string `json:"artifactType"`
		Config       struct {
			MediaType string `json:"mediaType"`
		} `json:"config"`
		Layers  documents `json:"layers"`
		Subject struct {
			Digest digest.Digest `json:"digest"`
		} `json:"subject"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	m := &manifest{is: doc.Config.MediaType, subject: doc.Subject.Digest, documents: map[document]blob.Descriptor{}}
	if doc.ArtifactType != "" {
		m.is = doc.ArtifactType
	}
	for i, d := range doc.Layers {
		key := d.document()
		if _, ok := m.documents[key]; ok || key.kind == "" {
			continue
		}
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return nil, fmt.Errorf("%w: its layer %d has size %d and digest %q", errMalformed, i, d.Size, shorten(d.Digest))
		}
		m.documents[key] = blob.Descriptor{Digest: d.Digest, Size: d.Size}
	}
	return m, nil
}

// decodeReferrers decodes an index of referrers, and returns those that may be of
// a type that counts here.
func decodeReferrers(body []byte) ([]descriptor, error) {
	var doc struct {
		Manifests referrers `json:"manifests"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return nil, fmt.Errorf("decoding the list of referrers: %w", err)
	}
	return slices.Clip(slices.DeleteFunc(doc.Manifests, func(d descriptor) bool {
		known := d.ArtifactType == "" || d.ArtifactType == sociIndexV1 || d.ArtifactType == profileType
		return !known || d.Digest.Validate() != nil
	})), nil
}

// newest returns the referrers to try for an artifact type: those of it, the
// newest first, and then those whose type is not told.
func newest(all []descriptor, artifactType string) []descriptor {
	var list []descriptor
	for _, d := range all {
		if d.ArtifactType == artifactType || d.ArtifactType == "" {
			list = append(list, d)
		}
	}
	slices.SortStableFunc(list, func(a, b descriptor) int {
		switch {
		case a.ArtifactType == b.ArtifactType:
			return b.created().Compare(a.created())
		case a.ArtifactType == "":
			return 1
		default:
			return -1
		}
	})
	return list[:min(len(list), maxTried)]
}

// documents and referrers are lists of descriptors of bounded length.
type (
	documents []descriptor
	referrers []descriptor
)

// UnmarshalJSON decodes at most maxDocuments.
func (l *documents) UnmarshalJSON(b []byte) (err error) {
	*l, err = decodeList(b, maxDocuments)
	return err
}

// UnmarshalJSON decodes at most maxReferrers.
func (l *referrers) UnmarshalJSON(b []byte) (err error) {
	*l, err = decodeList(b, maxReferrers)
	return err
}

// decodeList decodes an array element by element: the shortest ones take a
// hundred times more memory decoded.
func decodeList(b []byte, limit int) ([]descriptor, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	switch start, err := dec.Token(); {
	case err != nil:
		return nil, err
	case start == nil:
		return nil, nil // null
	case start != json.Delim('['):
		return nil, errors.New("a list of descriptors is not an array")
	}
	var list []descriptor
	for dec.More() {
		if len(list) == limit {
			return nil, fmt.Errorf("a list has more than %d descriptors", limit)
		}
		var d descriptor
		if err := dec.Decode(&d); err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	return list, nil
}

// shorten bounds what errors quote.
func shorten(d digest.Digest) digest.Digest { return d[:min(len(d), 100)] }

// encodeIndex encodes what SOCI calls an index, as soci.MarshalIndex does; subject
// may be nil.
func encodeIndex(layers []v1.Descriptor, subject *v1.Descriptor, created time.Time) ([]byte, error) {
	m := v1.Manifest{
		MediaType:   v1.MediaTypeImageManifest,
		Config:      v1.Descriptor{MediaType: sociIndexV1, Digest: v1.DescriptorEmptyJSON.Digest, Size: v1.DescriptorEmptyJSON.Size},
		Layers:      layers,
		Subject:     subject,
		Annotations: annotations(created, sociBuildTool, buildTool),
	}
	m.SchemaVersion = 2
	return json.Marshal(m)
}

// encodeProfile encodes the manifest of a profile.
func encodeProfile(profile v1.Descriptor, subject *v1.Descriptor, created time.Time) ([]byte, error) {
	m := v1.Manifest{
		MediaType:    v1.MediaTypeImageManifest,
		ArtifactType: profileType,
		Config:       v1.DescriptorEmptyJSON,
		Layers:       []v1.Descriptor{profile},
		Subject:      subject,
		Annotations:  annotations(created),
	}
	m.SchemaVersion = 2
	return json.Marshal(m)
}

// annotations are those of a manifest, with more names and values.
func annotations(created time.Time, more ...string) map[string]string {
	m := map[string]string{}
	if !created.IsZero() {
		m[v1.AnnotationCreated] = created.UTC().Format(time.RFC3339)
	}
	for i := 0; i < len(more); i += 2 {
		m[more[i]] = more[i+1]
	}
	return m
}

// ztocDescriptor tells a manifest of the ZTOC of a layer, as SOCI does if it can
// read it.
func ztocDescriptor(l LayerDocuments, b blob.Descriptor) v1.Descriptor {
	d := v1.Descriptor{MediaType: ztocType, Digest: b.Digest, Size: b.Size}
	if l.Extended {
		d.Annotations = map[string]string{layerDigest: l.Layer.Digest.String()}
		return d
	}
	d.MediaType = sociZTOC
	d.Annotations = map[string]string{
		sociLayerDigest:    l.Layer.Digest.String(),
		sociLayerMediaType: l.Layer.MediaType,
	}
	if l.SpanSize > 0 {
		d.Annotations[sociSpanSize] = strconv.FormatInt(l.SpanSize, 10)
	}
	return d
}

// besideDescriptor tells a manifest of what SOCI has no names for, about a layer.
func besideDescriptor(mediaType string, l LayerDocuments, b blob.Descriptor) v1.Descriptor {
	return v1.Descriptor{
		MediaType: mediaType, Digest: b.Digest, Size: b.Size,
		Annotations: map[string]string{layerDigest: l.Layer.Digest.String()},
	}
}
