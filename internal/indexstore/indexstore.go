// SPDX-License-Identifier: Apache-2.0

// Package indexstore is where nodes look for what others have found out about
// images, and leave what they have found out themselves: indexes of layers, and
// profiles of images.
//
// A [Place] is one such place: a directory, the registry of the image itself, a
// repository set aside for it. Documents are opaque bytes here, kept by the digest
// of what they describe. Places that are registries verify that bytes are those
// that were published; whether what they say is true, and whom to trust, is for
// the caller to decide.
//
// What a place holds is hostile: manifests are decoded within limits, nothing is
// written outside of a directory, and nothing outside is read through links.
package indexstore

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/opencontainers/go-digest"
)

// Kind is a kind of document.
type Kind string

const (
	// ZTOC is the index of a layer, in the format of SOCI.
	ZTOC Kind = "ztoc"
	// Digests is what belongs to the index of a layer and has no place in it.
	Digests Kind = "digests"
	// Chunks is the chunk list of an artifact's blob.
	Chunks Kind = "chunks"
	// Profile is the profile of an image, by its manifest.
	Profile Kind = "profile"
)

func (k Kind) known() bool { return k == ZTOC || k == Digests || k == Chunks || k == Profile }

// Place is where documents are. Methods may be called by several goroutines at
// once.
type Place interface {
	// Fetch copies the document of that kind about subject, a layer's blob or an
	// image's manifest, to w. If it fails, w may have got some of it, which is to be
	// thrown away. The error wraps fs.ErrNotExist if there is none here, and
	// blob.ErrCorrupt if it is not what was published; more than limit bytes are an
	// error too. Those of registries are otherwise the ones of blob.Source.
	Fetch(ctx context.Context, subject digest.Digest, kind Kind, limit int64, w io.Writer) error

	// Publish stores documents, in place of those of the same kind about the same.
	// If it fails, some may be stored. The error wraps blob.ErrUnauthorized if a
	// registry refuses it.
	Publish(ctx context.Context, p Publication) error

	// String names the place in messages, without credentials.
	String() string
}

// Publication is what is published at once.
type Publication struct {
	// Image is what Profile is about, and what the layers belong to. It may be zero
	// if there is no profile.
	Image Subject
	// Layers are in the order of the image, or those of them that there is something
	// about.
	Layers []LayerDocuments
	// Profile is the profile of the image; nil if there is none.
	Profile []byte
	// Created is noted where there may be several, of which the newest counts. The
	// same documents with the same time are published once, by however many. If it
	// is zero, others go first.
	Created time.Time
}

// Subject is what documents are about.
type Subject struct {
	MediaType string
	Digest    digest.Digest
	Size      int64 // in bytes; not needed of layers
}

// LayerDocuments is what there is about a layer, or about another blob.
type LayerDocuments struct {
	Layer Subject
	// ZTOC, Digests and Chunks may be nil. They are not read after Publish has returned.
	ZTOC, Digests, Chunks Content
	// SpanSize is how many bytes of the layer, uncompressed, are between two points
	// of the ZTOC where reading can begin; 0 if that is not to be told.
	SpanSize int64
	// Extended says that SOCI itself cannot read the ZTOC, as for layers in zstd; it
	// is then not shown to it.
	Extended bool
}

// Content is the bytes of a document: an *io.SectionReader, a *bytes.Reader.
type Content interface {
	io.ReaderAt
	Size() int64
}

// reader reads a document from its start.
func reader(c Content) *io.SectionReader { return io.NewSectionReader(c, 0, c.Size()) }

// encoded returns what names of documents have of a digest: it is safe in the
// names of files and tags.
func encoded(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("digest %q: %w", d, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return "", fmt.Errorf("digest %s: only those by sha256 are supported", d)
	}
	return d.Encoded(), nil
}

// notExist is that a place has no such document. cause may be nil.
func notExist(place Place, subject digest.Digest, kind Kind, cause error) error {
	if cause != nil {
		return fmt.Errorf("%s of %s in %s: %w: %w", kind, subject, place, fs.ErrNotExist, cause)
	}
	return fmt.Errorf("%s of %s in %s: %w", kind, subject, place, fs.ErrNotExist)
}
