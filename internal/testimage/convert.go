// SPDX-License-Identifier: Apache-2.0

package testimage

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	stargzchunked "github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage/pkg/chunked/compressor"
)

// Format is how a layer is stored.
type Format string

// The formats of a layer. ZstdChunked is the dialect of containers/storage,
// ZstdChunkedStargz that of stargz-snapshotter.
const (
	Uncompressed      Format = "tar"
	Gzip              Format = "gzip"
	Zstd              Format = "zstd"
	EStargz           Format = "estargz"
	ZstdChunked       Format = "zstd:chunked"
	ZstdChunkedStargz Format = "zstd:chunked (stargz)"
)

// Formats returns all formats.
func Formats() []Format {
	return []Format{Uncompressed, Gzip, Zstd, EStargz, ZstdChunked, ZstdChunkedStargz}
}

// Layer is a layer as a registry stores it: with its content in the file Path, in
// Bytes, or wherever [Convert] was told to write it.
type Layer struct {
	Descriptor v1.Descriptor
	DiffID     digest.Digest
	Path       string
	Bytes      []byte
}

// Options of [Convert]; the zero value is fine.
type Options struct {
	// ChunkSize is the largest chunk of an eStargz, in bytes; 0 means 4 MiB.
	ChunkSize int
	// MinChunkSize lets several small files share a frame of an eStargz.
	MinChunkSize int
	// Prioritized are the files that an eStargz starts with, for prefetching.
	Prioritized []string
}

// Convert writes the tar to w in a format, as fast as that compresses. It needs
// little memory; for the eStargz family it needs space for the result in the
// directory for temporary files.
func Convert(ctx context.Context, tar *io.SectionReader, f Format, o Options, w io.Writer) (Layer, error) {
	out := &output{w: w, hash: sha256.New()}
	l, err := convert(ctx, tar, f, o, out)
	if err != nil {
		return Layer{}, fmt.Errorf("converting layer to %s: %w", f, err)
	}
	l.Descriptor.Digest = digest.NewDigest(digest.SHA256, out.hash)
	l.Descriptor.Size = out.n
	return l, nil
}

// ConvertFile converts the tar in one file to a layer in another.
func ConvertFile(ctx context.Context, tarPath string, f Format, o Options, path string) (_ Layer, err error) {
	in, err := os.Open(tarPath)
	if err != nil {
		return Layer{}, fmt.Errorf("converting layer: %w", err)
	}
	defer in.Close() //nolint:errcheck // read only
	info, err := in.Stat()
	if err != nil {
		return Layer{}, fmt.Errorf("converting layer: %w", err)
	}
	out, err := os.Create(path)
	if err != nil {
		return Layer{}, fmt.Errorf("converting layer: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	l, err := Convert(ctx, io.NewSectionReader(in, 0, info.Size()), f, o, out)
	l.Path = path
	return l, err
}

// output counts and hashes a layer.
type output struct {
	w    io.Writer
	hash hash.Hash
	n    int64
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	o.hash.Write(p[:n])
	o.n += int64(n)
	return n, err
}

func convert(ctx context.Context, tar *io.SectionReader, f Format, o Options, w io.Writer) (Layer, error) {
	annotations := map[string]string{}
	switch f {
	case Uncompressed:
		return stream(ctx, tar, nopCloser{w}, v1.MediaTypeImageLayer, nil)
	case Gzip:
		z, err := pgzip.NewWriterLevel(w, gzip.BestSpeed)
		if err != nil {
			return Layer{}, err
		}
		return stream(ctx, tar, z, v1.MediaTypeImageLayerGzip, nil)
	case Zstd:
		z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
		if err != nil {
			return Layer{}, err
		}
		return stream(ctx, tar, z, v1.MediaTypeImageLayerZstd, nil)
	case ZstdChunked:
		level := 1
		z, err := compressor.ZstdCompressor(w, annotations, &level)
		if err != nil {
			return Layer{}, err
		}
		return stream(ctx, tar, z, v1.MediaTypeImageLayerZstd, annotations)
	case EStargz:
		return build(ctx, tar, w, o, v1.MediaTypeImageLayerGzip, annotations, estargz.WithCompressionLevel(gzip.BestSpeed))
	case ZstdChunkedStargz:
		z := stargzCompression{&stargzchunked.Compressor{CompressionLevel: zstd.SpeedFastest, Metadata: annotations}, &stargzchunked.Decompressor{}}
		return build(ctx, tar, w, o, v1.MediaTypeImageLayerZstd, annotations, estargz.WithCompression(z))
	}
	return Layer{}, fmt.Errorf("unknown format %q", f)
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

type stargzCompression struct {
	*stargzchunked.Compressor
	*stargzchunked.Decompressor
}

// stream sends the tar as it is through a compressor, which fills annotations when
// it is closed.
func stream(ctx context.Context, tar io.Reader, z io.WriteCloser, mediaType string, annotations map[string]string) (Layer, error) {
	diff := sha256.New()
	_, err := io.Copy(io.MultiWriter(z, diff), contextReader{ctx, tar})
	if err = errors.Join(err, z.Close()); err != nil {
		return Layer{}, err
	}
	l := Layer{DiffID: digest.NewDigest(digest.SHA256, diff)}
	l.Descriptor.MediaType = mediaType
	l.Descriptor.Annotations = annotations
	return l, nil
}

type contextReader struct {
	ctx context.Context //nolint:containedctx // of one call
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// build makes a layer with stargz-snapshotter's library, which uses all processors.
func build(ctx context.Context, tar *io.SectionReader, w io.Writer, o Options, mediaType string, annotations map[string]string, compression estargz.Option) (_ Layer, err error) {
	blob, err := estargz.Build(tar, compression,
		estargz.WithChunkSize(o.ChunkSize), estargz.WithMinChunkSize(o.MinChunkSize), estargz.WithPrioritizedFiles(o.Prioritized))
	if err != nil {
		return Layer{}, err
	}
	defer func() { err = errors.Join(err, blob.Close()) }()
	if _, err := io.Copy(w, contextReader{ctx, blob}); err != nil {
		return Layer{}, err
	}
	size, err := blob.UncompressedSize()
	if err != nil {
		return Layer{}, err
	}
	l := Layer{DiffID: blob.DiffID()}
	l.Descriptor.MediaType = mediaType
	l.Descriptor.Annotations = map[string]string{
		estargz.TOCJSONDigestAnnotation:         blob.TOCDigest().String(),
		estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(size, 10),
	}
	maps.Copy(l.Descriptor.Annotations, annotations)
	return l, nil
}
