// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/holdfast/holdfast/internal/blob"
)

// Copy copies a blob to w, which is [blob.ErrCorrupt] if it turns out not to be
// what its digest and its size say. It reads and hashes while it writes.
func Copy(ctx context.Context, w io.Writer, desc blob.Descriptor, content io.Reader) error {
	const pieces, pieceSize = 4, 1 << 20
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", desc.Digest, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	free, full := make(chan []byte, pieces), make(chan []byte, pieces)
	for range pieces {
		free <- make([]byte, pieceSize)
	}
	written := make(chan error, 1)
	go func() {
		var failed error
		for p := range full {
			if failed == nil {
				if _, failed = w.Write(p); failed != nil {
					cancel(failed)
				}
			}
			free <- p[:pieceSize]
		}
		written <- failed
	}()
	verifier := desc.Digest.Algorithm().Hash()
	var size int64
	var err error
	for err == nil && ctx.Err() == nil {
		p := <-free
		var n int
		n, err = io.ReadFull(content, p)
		_, _ = verifier.Write(p[:n]) // never fails
		size += int64(n)
		if size > desc.Size {
			break
		}
		full <- p[:n]
	}
	close(full)
	failed := <-written
	switch {
	case failed != nil:
		return failed
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil && err != io.EOF && err != io.ErrUnexpectedEOF: // as io.ReadFull has them
		return err
	case size != desc.Size:
		return fmt.Errorf("it does not have %d bytes: %w", desc.Size, blob.ErrCorrupt)
	}
	if got := fmt.Sprintf("%x", verifier.Sum(nil)); got != desc.Digest.Encoded() {
		return fmt.Errorf("it has digest %s:%s: %w", desc.Digest.Algorithm(), got, blob.ErrCorrupt)
	}
	return nil
}

// Check reads a blob from a source, and compares it with its digest: the error is
// [blob.ErrCorrupt] if it is another, or that of reading it.
func Check(ctx context.Context, src blob.Source, desc blob.Descriptor, progress func(done int64)) error {
	rc, err := src.Open(ctx, desc, 0, desc.Size)
	if err != nil {
		return err
	}
	defer rc.Close() //nolint:errcheck // read only
	verifier := desc.Digest.Verifier()
	buf := make([]byte, 1<<20)
	for done := int64(0); ; {
		n, err := rc.Read(buf)
		_, _ = verifier.Write(buf[:n]) // never fails
		if done += int64(n); n > 0 {
			progress(done)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if !verifier.Verified() {
		return fmt.Errorf("its content does not have this digest: %w", blob.ErrCorrupt)
	}
	return nil
}
