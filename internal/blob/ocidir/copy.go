// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
)

// How much of a blob is on its way from its source to its end, in pieces of bytes.
const pieces, pieceSize = 6, 1 << 20

// Copy copies a blob to w, which is [blob.ErrCorrupt] if it turns out not to be what its
// digest and its size say. Reading, hashing and writing go on side by side. When it
// returns it uses content and w no more.
func Copy(ctx context.Context, w io.Writer, desc blob.Descriptor, content io.Reader) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", desc.Digest, err)
	}
	g, ctx := errgroup.WithContext(ctx)
	free, read, hashed := make(chan []byte, pieces), make(chan []byte, pieces), make(chan []byte, pieces)
	for range pieces {
		free <- make([]byte, pieceSize)
	}
	var failed error // of reading; it is there when read is closed
	g.Go(func() error {
		defer close(read)
		failed = readPieces(ctx, content, free, read)
		return failed
	})
	g.Go(func() error {
		defer close(hashed)
		return hashPieces(desc, read, &failed, hashed)
	})
	g.Go(func() error {
		for p := range hashed {
			if _, err := w.Write(p); err != nil {
				return err
			}
			free <- p[:pieceSize] // there is room for all
		}
		return nil
	})
	return g.Wait()
}

// readPieces reads to the end.
func readPieces(ctx context.Context, content io.Reader, free <-chan []byte, to chan<- []byte) error {
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case p := <-free:
			n, err := io.ReadFull(content, p)
			to <- p[:n] // there is room for all
			switch {
			case err == io.EOF, err == io.ErrUnexpectedEOF: // as io.ReadFull has them: the last piece
				return nil
			case err != nil:
				return err
			}
		}
	}
}

// hashPieces passes pieces on until they turn out not to be the blob's. What the reading
// came to is there when it has ended.
func hashPieces(desc blob.Descriptor, from <-chan []byte, reading *error, to chan<- []byte) error {
	verifier := desc.Digest.Algorithm().Hash()
	var size int64
	for p := range from {
		_, _ = verifier.Write(p) // never fails
		if size += int64(len(p)); size > desc.Size {
			return fmt.Errorf("it has more than %d bytes: %w", desc.Size, blob.ErrCorrupt)
		}
		to <- p // there is room for all
	}
	switch got := fmt.Sprintf("%x", verifier.Sum(nil)); {
	case *reading != nil:
		return *reading
	case size != desc.Size:
		return fmt.Errorf("it does not have %d bytes: %w", desc.Size, blob.ErrCorrupt)
	case got != desc.Digest.Encoded():
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
	return errors.Join(Copy(ctx, io.Discard, desc, &counting{rc, 0, progress}), rc.Close())
}

// counting tells how much has been read.
type counting struct {
	r        io.Reader
	done     int64
	progress func(int64)
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.done += int64(n)
	c.progress(c.done)
	return n, err
}
