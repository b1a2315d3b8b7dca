// SPDX-License-Identifier: Apache-2.0

package image

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

// splitPath splits what follows oci: or oci-archive: into a path and a name in the
// layout, which may itself have colons: the longest part that is there is the path.
// The name is "" if there is none.
func splitPath(text string) (path, name string) {
	for path = text; ; {
		if _, err := os.Stat(path); err == nil {
			return path, strings.TrimPrefix(text[len(path):], ":")
		}
		i := strings.LastIndexByte(path, ':')
		if i < 0 {
			break
		}
		path = path[:i]
	}
	path, name, _ = strings.Cut(text, ":")
	return path, name
}

// openFiles opens an image in an OCI layout, or in an archive of one.
func openFiles(ctx context.Context, path, name string, read load) (*Opened, error) {
	l, release, err := openLayout(ctx, path)
	if err != nil {
		return nil, err
	}
	img, err := read(ctx, l, name)
	if err != nil {
		release()
		return nil, err
	}
	return &Opened{Image: img, Asked: name, Layout: l, release: release}, nil
}

// openLayout opens a layout. Of an archive that is compressed as a whole it makes a
// temporary copy without a name.
func openLayout(ctx context.Context, path string) (*ocidir.Layout, func(), error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, nil, err
	}
	l := ocidir.New(path)
	_, err = l.Index(ctx)
	if errors.Is(err, ocidir.ErrCompressed) {
		return uncompressed(ctx, path)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("there is no OCI layout, or archive of one as podman save --format oci-archive makes it: %w", err)
	}
	return l, func() {}, nil
}

// uncompressed makes a layout of an archive that is compressed with gzip.
func uncompressed(ctx context.Context, path string) (_ *ocidir.Layout, _ func(), err error) {
	from, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer from.Close() //nolint:errcheck // read only
	to, err := os.OpenFile(os.TempDir(), os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("creating a temporary file to uncompress %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("uncompressing %s to %s: %w", path, os.TempDir(), err), to.Close())
		}
	}()
	z, err := gzip.NewReader(from)
	if err == nil {
		_, err = io.Copy(to, readerOf(ctx, z)) //nolint:gosec // the disk is the limit
	}
	if err != nil {
		return nil, nil, err
	}
	l := ocidir.New(fmt.Sprintf("/proc/self/fd/%d", to.Fd()))
	if _, err := l.Index(ctx); err != nil {
		return nil, nil, err
	}
	return l, func() { _ = to.Close() }, nil
}

// readerOf ends the reading of r with ctx.
func readerOf(ctx context.Context, r io.Reader) io.Reader { return contextReader{ctx, r} }

type contextReader struct {
	ctx context.Context //nolint:containedctx // of one stream
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
