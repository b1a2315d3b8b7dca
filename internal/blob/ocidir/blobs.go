// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
)

// Blob reads a small blob whole and verifies it. A blob of more than limit bytes is
// an error, one that is not what its digest says is [blob.ErrCorrupt].
func (l *Layout) Blob(ctx context.Context, desc blob.Descriptor, limit int64) ([]byte, error) {
	if desc.Size > limit {
		return nil, fmt.Errorf("reading blob %s: its %d bytes are more than %d", desc.Digest, desc.Size, limit)
	}
	body, err := l.whole(ctx, desc.Digest, limit)
	if err == nil && int64(len(body)) != desc.Size {
		err = fmt.Errorf("it has %d bytes, not %d: %w", len(body), desc.Size, blob.ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("reading blob %s of %s: %w", desc.Digest, l, err)
	}
	return body, nil
}

// whole reads a small blob and verifies it.
func (l *Layout) whole(ctx context.Context, d digest.Digest, limit int64) ([]byte, error) {
	name, err := blobPath(d)
	if err != nil {
		return nil, err
	}
	body, err := await(ctx, l.calls, func() ([]byte, error) {
		f, err := l.open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // read only
		return f.whole(limit)
	}, nil)
	if err != nil {
		return nil, err
	}
	if got := d.Algorithm().FromBytes(body); got != d {
		return nil, fmt.Errorf("it has digest %s: %w", got, blob.ErrCorrupt)
	}
	return body, nil
}

// Stat returns the size of a blob in bytes: [blob.ErrNotFound] if it is not here.
func (l *Layout) Stat(ctx context.Context, d digest.Digest) (int64, error) {
	name, err := blobPath(d)
	if err != nil {
		return 0, err
	}
	size, err := await(ctx, l.calls, func() (int64, error) {
		f, err := l.open(name)
		if err != nil {
			return 0, err
		}
		return f.id.size, f.Close()
	}, nil)
	if err != nil {
		return 0, fmt.Errorf("looking for blob %s in %s: %w", d, l, err)
	}
	return size, nil
}

// Open returns a range of a blob, as blob.Source tells.
func (l *Layout) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if err := desc.CheckRange(offset, length); err != nil {
		return nil, err
	}
	if length == 0 {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	name, err := blobPath(desc.Digest)
	if err != nil {
		return nil, err
	}
	f, err := await(ctx, l.calls, func() (*file, error) { return l.open(name) }, (*file).drop)
	if err == nil && f.id.size != desc.Size {
		err = errors.Join(fmt.Errorf("it has %d bytes, not %d: %w", f.id.size, desc.Size, blob.ErrCorrupt), f.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("opening blob %s in %s: %w", desc.Digest, l, err)
	}
	return &reader{ctx: ctx, calls: l.calls, file: f, at: offset, end: offset + length}, nil
}

// open opens a blob. What is missing in a layout that is there is not found; if the
// layout itself is not there, that may go away. It may hang.
func (l *Layout) open(name string) (*file, error) {
	files, err := l.files()
	if err != nil {
		return nil, err
	}
	f, err := files.open(name)
	if errors.Is(err, fs.ErrNotExist) {
		there, missing := files.open(v1.ImageIndexFile)
		if missing != nil {
			return nil, blob.Temporary(fmt.Errorf("it is not attached: %w", missing))
		}
		return nil, errors.Join(blob.ErrNotFound, there.Close())
	}
	return f, err
}

// blobPath is where a layout has a blob.
func blobPath(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("digest %q: %w", d, err)
	}
	return path.Join(v1.ImageBlobsDir, d.Algorithm().String(), d.Encoded()), nil
}
