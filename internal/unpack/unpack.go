// SPDX-License-Identifier: Apache-2.0

// Package unpack makes the directory of a layer, in the form that overlayfs and
// containers/storage expect, and compares one with the layer that it was made of.
//
// The tree is that of the layer's index, which package index has checked: so every
// path is one of directories that were made here, in a directory that nobody else
// writes to, and no link is ever followed. Content goes to numbered files while it
// streams by, and each is renamed to its place when the tree is known.
//
// Nothing that was unpacked may be used before the caller has compared the digests.
package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/stream"
)

// The directories that Layer makes.
const (
	// Diff is the tree.
	Diff    = "diff"
	scratch = "content"
)

// Options says how a layer is unpacked.
type Options struct {
	// Keeps is what the file system keeps.
	Keeps Features
	// TarSplit gets what the tar has besides the content of files, compressed with gzip,
	// as containers/storage keeps it in <id>.tar-split.gz; nil: nobody wants it.
	TarSplit io.Writer
}

// Result is what unpacking a layer yields.
type Result struct {
	// Blob and DiffID are the digests of what was read and of the tar, DiffSize the
	// length of that in bytes.
	Blob, DiffID digest.Digest
	DiffSize     int64
	Compression  index.Compression
	// RootImplied means that the layer does not describe its root directory: see
	// [InheritRoot].
	RootImplied bool
	// UIDs and GIDs own something, sorted.
	UIDs, GIDs []uint32
	// Opaque are directories that hide what the layers below have there, and that the
	// file system cannot mark: see [HideBelow]. Paths in the tree.
	Opaque []string
	// Unsplit means that the tar cannot be put together again from the tree, since some
	// of its content is not there: it names a file twice, say. There is no tar-split then.
	Unsplit bool
}

// Layer unpacks a layer of size bytes into the subdirectory Diff of dir, which is on
// the file system of options.Keeps and belongs to the caller. The error is
// [index.ErrInvalid] or [index.ErrTooLarge] if it is none that a normal pull would
// extract, [ErrNotKept] if the file system would not keep it as it is, that of r or of
// the file system, or that of ctx. Then dir holds anything.
func Layer(ctx context.Context, r io.Reader, size int64, dir string, options Options) (*Result, error) {
	diff, content := filepath.Join(dir, Diff), filepath.Join(dir, scratch)
	for _, d := range []string{diff, content} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return nil, fmt.Errorf("unpacking layer: %w", err)
		}
	}
	plain := io.Discard
	var g errgroup.Group
	end := func(error) {}
	contents := -1
	if options.TarSplit != nil {
		pr, pw := io.Pipe()
		plain, end = pw, func(err error) { pw.CloseWithError(err) }
		g.Go(func() error {
			var err error
			contents, err = split(pr, options.TarSplit)
			pr.CloseWithError(err)
			return err
		})
	}
	files := &files{dir: content}
	read, err := stream.Unpack(ctx, r, size, files, files.begin, plain)
	err = errors.Join(err, files.end())
	end(err)
	if splitting := g.Wait(); err == nil {
		err = splitting
	}
	if err != nil {
		return nil, fmt.Errorf("unpacking layer: %w", err)
	}
	t := &tree{idx: read.Index, files: files, keeps: options.Keeps, made: map[int32]string{}, uids: map[uint32]bool{}, gids: map[uint32]bool{}}
	if err := t.make(diff); err != nil {
		return nil, fmt.Errorf("unpacking layer: %w", err)
	}
	if err := os.RemoveAll(content); err != nil {
		return nil, fmt.Errorf("unpacking layer: %w", err)
	}
	return &Result{
		Blob: read.Blob, DiffID: read.DiffID, DiffSize: read.Size, Compression: read.Index.Compression,
		RootImplied: read.Index.RootImplied, UIDs: sorted(t.uids), GIDs: sorted(t.gids),
		Opaque: t.opaque, Unsplit: files.left() > 0 || contents != len(files.names),
	}, nil
}
