// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"context"
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
	case err != nil && err != io.EOF && err != io.ErrUnexpectedEOF: //nolint:errorlint // as io.ReadFull has them
		return err
	case size != desc.Size:
		return fmt.Errorf("it does not have %d bytes: %w", desc.Size, blob.ErrCorrupt)
	}
	if got := fmt.Sprintf("%x", verifier.Sum(nil)); got != desc.Digest.Encoded() {
		return fmt.Errorf("it has digest %s:%s: %w", desc.Digest.Algorithm(), got, blob.ErrCorrupt)
	}
	return nil
}
