// SPDX-License-Identifier: Apache-2.0

// Package blob reads blobs: bytes named by a digest, as a registry stores them.
//
// A [Source] is one place blobs are read from. Sources do not verify what they
// return; whoever asked does, because only the reader knows which digest covers
// the range it asked for. Package blobtest holds the conformance suite that
// every Source passes.
package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
)

// Descriptor names a blob and its size in bytes.
type Descriptor struct {
	Digest digest.Digest
	Size   int64
}

// Manifest is a manifest or an index: a document that names blobs.
type Manifest struct {
	MediaType string // without parameters; "" if whoever has it does not say
	Digest    digest.Digest
	Body      []byte
}

// Range is bytes of a blob.
type Range struct{ Offset, Length int64 }

// End is the offset just after the range.
func (r Range) End() int64 { return r.Offset + r.Length }

// Source is a place blobs are read from: a registry, a mirror, an OCI layout.
//
// Methods may be called by several goroutines at once. A Source keeps no
// position between calls, and an error leaves it usable: the next call starts
// afresh.
type Source interface {
	// Open returns the length bytes of the blob that start at offset.
	//
	// The range must lie within [0, desc.Size]; a range of length 0 yields an
	// empty reader without I/O. The reader yields exactly length bytes and then
	// io.EOF, or fails: a source that has fewer bytes answers with an error
	// (io.ErrUnexpectedEOF within a [TemporaryError] if a connection broke), never
	// with a short stream. The bytes are not verified.
	//
	// Cancelling ctx ends the call and fails pending reads. The caller closes
	// the reader; closing it early is not an error.
	//
	// The error is one of [ErrNotFound], [ErrUnauthorized], [ErrNoRange], a
	// [TemporaryError], or something that will not go away by asking again.
	Open(ctx context.Context, desc Descriptor, offset, length int64) (io.ReadCloser, error)

	// String names the source in messages, without credentials.
	String() string
}

// Errors a [Source] distinguishes. All but temporary ones are permanent: the
// same source will answer the same way again until something changes.
var (
	// ErrNotFound means that the source does not have the blob.
	ErrNotFound = errors.New("blob not found")
	// ErrUnauthorized means that the credentials are missing, wrong or expired.
	ErrUnauthorized = errors.New("not authorized")
	// ErrNoRange means that the source can only send a blob from its start.
	ErrNoRange = errors.New("range requests are not supported")
	// ErrCorrupt means that bytes do not match their digest. It is returned by
	// those who verify, never by a Source.
	ErrCorrupt = errors.New("content does not match its digest")
)

// TemporaryError marks an error that may go away when the same source is asked
// again: a broken connection, a server error, too many requests.
type TemporaryError struct {
	Err error
	// RetryAfter is how long the source asked to be left alone; 0 if it did not say.
	RetryAfter time.Duration
}

func (e *TemporaryError) Error() string { return e.Err.Error() }
func (e *TemporaryError) Unwrap() error { return e.Err }

// Temporary wraps err in a [TemporaryError], unless it is nil.
func Temporary(err error) error {
	if err == nil {
		return nil
	}
	return &TemporaryError{Err: err}
}

// IsTemporary reports whether asking the same source again may help.
func IsTemporary(err error) bool {
	var t *TemporaryError
	return errors.As(err, &t)
}

// CheckRange reports whether [offset, offset+length) lies within the blob.
func (d Descriptor) CheckRange(offset, length int64) error {
	if offset < 0 || length < 0 || offset > d.Size || length > d.Size-offset {
		return fmt.Errorf("range %d+%d is outside of blob %s of %d bytes", offset, length, d.Digest, d.Size)
	}
	return nil
}
