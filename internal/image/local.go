// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/types"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
)

// local reads an image that lies in files.
type local struct {
	name string
	src  types.ImageSource
	mu   sync.Mutex // src takes one call at a time; what it has opened is read concurrently
}

var (
	_ Reader      = (*local)(nil)
	_ blob.Source = (*local)(nil)
)

func (l *local) String() string { return l.name }

// Manifest reads the image's manifest or index, "", or another one by its digest.
func (l *local) Manifest(ctx context.Context, name string) (registry.Manifest, error) {
	var instance *digest.Digest
	if name != "" {
		d := digest.Digest(name)
		if err := d.Validate(); err != nil {
			return registry.Manifest{}, fmt.Errorf("digest %q: %w", name, err)
		}
		instance = &d
	}
	l.mu.Lock()
	body, mediaType, err := l.src.GetManifest(ctx, instance)
	l.mu.Unlock()
	if err != nil {
		return registry.Manifest{}, missing(err)
	}
	m := registry.Manifest{MediaType: mediaType, Digest: digest.FromBytes(body), Body: body}
	if instance != nil {
		if m.Digest = instance.Algorithm().FromBytes(body); m.Digest != *instance {
			return registry.Manifest{}, fmt.Errorf("manifest %s has digest %s: %w", *instance, m.Digest, blob.ErrCorrupt)
		}
	}
	return m, nil
}

// Blob reads a small blob whole.
func (l *local) Blob(ctx context.Context, desc blob.Descriptor, limit int64) ([]byte, error) {
	if desc.Size > limit {
		return nil, fmt.Errorf("reading blob %s: its %d bytes are more than %d", desc.Digest, desc.Size, limit)
	}
	rc, err := l.Open(ctx, desc, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	defer rc.Close() //nolint:errcheck // read only
	body, err := io.ReadAll(rc)
	if err != nil {
		return nil, err
	}
	if got := desc.Digest.Algorithm().FromBytes(body); got != desc.Digest {
		return nil, fmt.Errorf("blob %s has digest %s: %w", desc.Digest, got, blob.ErrCorrupt)
	}
	return body, nil
}

// Open returns a range of a blob, as blob.Source tells.
func (l *local) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if err := desc.CheckRange(offset, length); err != nil {
		return nil, err
	}
	if length == 0 {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	if err := errors.Join(desc.Digest.Validate(), ctx.Err()); err != nil {
		return nil, fmt.Errorf("opening blob %q in %s: %w", desc.Digest, l, err)
	}
	l.mu.Lock()
	// Without URLs: nothing is fetched from elsewhere.
	rc, size, err := l.src.GetBlob(ctx, types.BlobInfo{Digest: desc.Digest, Size: desc.Size}, nil)
	l.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("opening blob %s in %s: %w", desc.Digest, l, missing(err))
	}
	if size != desc.Size {
		err = fmt.Errorf("it has %d bytes, not %d: %w", size, desc.Size, blob.ErrCorrupt)
	} else {
		err = skip(rc, offset)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening blob %s in %s: %w", desc.Digest, l, err), rc.Close())
	}
	return &part{ctx: ctx, ReadCloser: rc, left: length}, nil
}

// skip goes to an offset in a stream.
func skip(r io.Reader, offset int64) error {
	var err error
	if s, ok := r.(io.Seeker); ok {
		_, err = s.Seek(offset, io.SeekStart)
	} else {
		_, err = io.CopyN(io.Discard, r, offset)
	}
	return err
}

// part is the next bytes of a stream.
type part struct {
	io.ReadCloser
	ctx  context.Context //nolint:containedctx // of one stream
	left int64
}

func (p *part) Read(b []byte) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	if p.left == 0 {
		return 0, io.EOF
	}
	n, err := p.ReadCloser.Read(b[:min(int64(len(b)), p.left)])
	p.left -= int64(n)
	if errors.Is(err, io.EOF) {
		err = nil
		if p.left > 0 {
			err = io.ErrUnexpectedEOF
		}
	}
	return n, err
}

// missing says in the words of package blob that something is not there.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, blob.ErrNotFound)
	}
	return err
}
