// SPDX-License-Identifier: Apache-2.0

package soci

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/awslabs/soci-snapshotter/ztoc/compression/fbs/zinfo"
	"github.com/awslabs/soci-snapshotter/ztoc/fbs/ztoc"

	"github.com/holdfast/holdfast/internal/index"
)

// The checkpoints of a gzip layer: a header, then one record a span. The integers
// are little endian. Source: ztoc/compression/gzip_zinfo.h and zinfo_to_blob.
//
//	header: spans i32, span size i64
//	record: offset in the blob, offset in the decompressed blob i64, bits u8, window
//
// The first version of the format leaves out the record of the first span, and one
// tells them apart by the length. Those of a zstd layer have no bits and no window.
const (
	checkpointHeader = 4 + 8
	checkpointSize   = 8 + 8 + 1 + index.WindowSize
	frameSize        = 8 + 8
	// gzipHeader is where the first version takes the first span to start.
	gzipHeader = 10
)

// spans is what a zTOC says about the compression of its layer.
type spans struct {
	compression index.Compression
	spans       []index.Span
	windows     io.ReaderAt
}

// readSpans reads where decompression can begin in a blob of size bytes.
func readSpans(info *ztoc.CompressionInfo, size int64, letGo func()) (*spans, error) {
	var s *spans
	var err error
	switch a := info.CompressionAlgorithm(); a {
	case ztoc.CompressionAlgorithmGzip:
		s, err = gzipSpans(info.CheckpointsBytes(), letGo)
	case algorithmZstd:
		s, err = zstdSpans(info.CheckpointsBytes())
	case ztoc.CompressionAlgorithmUncompressed:
		s, err = plainSpans(info.CheckpointsBytes(), size)
	default:
		return nil, fmt.Errorf("compression algorithm %d: %w", a, index.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	if n := info.SpanDigestsLength(); n != len(s.spans) || int64(info.MaxSpanId()) != int64(len(s.spans))-1 {
		return nil, fmt.Errorf("%d span digests for %d spans, the last of which is %d: %w", n, len(s.spans), info.MaxSpanId(), index.ErrInvalid)
	}
	for i := range s.spans {
		if s.spans[i].Digest, err = sum(info.SpanDigests(i)); err != nil {
			return nil, fmt.Errorf("span %d: %w", i, err)
		}
		end := size
		if i+1 < len(s.spans) {
			next := s.spans[i+1]
			if end = next.BlobOffset; next.Bits > 0 {
				end++ // the byte they share
			}
		}
		s.spans[i].BlobSize = end - s.spans[i].BlobOffset
	}
	return s, nil
}

// sum parses a digest.
func sum(text []byte) (d [sha256.Size]byte, err error) {
	encoded, ok := strings.CutPrefix(string(text), "sha256:")
	if ok && len(encoded) == 2*sha256.Size {
		_, err = hex.Decode(d[:], []byte(encoded))
	}
	if !ok || len(encoded) != 2*sha256.Size || err != nil {
		return d, fmt.Errorf("digest %.128q: %w", text, index.ErrInvalid)
	}
	return d, nil
}

// count reads the number of records, of which there are as many as fit, or, with
// missing, one more.
func count(b []byte, record int) (n int, missing bool, err error) {
	if len(b) < checkpointHeader {
		return 0, false, fmt.Errorf("checkpoints of %d bytes: %w", len(b), index.ErrInvalid)
	}
	n, fit := int(int32(binary.LittleEndian.Uint32(b))), (len(b)-checkpointHeader)/record //nolint:gosec // it has a sign
	if (len(b)-checkpointHeader)%record != 0 || n != fit && n != fit+1 {
		return 0, false, fmt.Errorf("%d checkpoints in %d bytes: %w", n, len(b), index.ErrInvalid)
	}
	return n, n == fit+1, nil
}

func gzipSpans(b []byte, letGo func()) (*spans, error) {
	n, missing, err := count(b, checkpointSize)
	if err != nil {
		return nil, err
	}
	s := &spans{compression: index.Gzip, windows: bytes.NewReader(b), spans: make([]index.Span, 0, n)}
	if missing {
		s.spans = append(s.spans, index.Span{BlobOffset: gzipHeader, Window: -1})
	}
	for at := checkpointHeader; at < len(b); at += checkpointSize {
		in, out, err := offsets(b[at:])
		if err != nil {
			return nil, err
		}
		span := index.Span{BlobOffset: in, Start: out, Bits: b[at+16], Window: int64(at + 17)}
		if span.Bits > 0 {
			span.BlobOffset--
		}
		if out == 0 {
			span.Window = -1
		}
		s.spans = append(s.spans, span)
		if len(s.spans)%letGoAfter == 0 {
			letGo()
		}
	}
	return s, nil
}

// letGoAfter is so many gzip spans, whose checkpoints lie in 2 MiB of the document.
const letGoAfter = 64

func zstdSpans(b []byte) (*spans, error) {
	n, missing, err := count(b, frameSize)
	if err != nil || missing {
		return nil, fmt.Errorf("%d frames in %d bytes: %w", n, len(b), index.ErrInvalid)
	}
	s := &spans{compression: index.Zstd, spans: make([]index.Span, 0, n)}
	for at := checkpointHeader; at < len(b); at += frameSize {
		in, out, err := offsets(b[at:])
		if err != nil {
			return nil, err
		}
		s.spans = append(s.spans, index.Span{BlobOffset: in, Start: out, Window: -1})
	}
	return s, nil
}

// offsets reads those that a record starts with.
func offsets(b []byte) (in, out int64, err error) {
	i, o := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	if i > math.MaxInt64 || o > math.MaxInt64 {
		return 0, 0, fmt.Errorf("checkpoint at %d for %d: %w", i, o, index.ErrInvalid)
	}
	return int64(i), int64(o), nil
}

// plainSpans reads how an uncompressed blob is cut.
func plainSpans(b []byte, size int64) (*spans, error) {
	if len(b) < 8 {
		return nil, fmt.Errorf("checkpoints of %d bytes: %w", len(b), index.ErrInvalid)
	}
	z := zinfo.GetRootAsTarZinfo(b, 0)
	step := z.SpanSize()
	if z.Size() != size || step <= 0 || size/step >= int64(index.DefaultLimits().Chunks) {
		return nil, fmt.Errorf("spans of %d bytes in a layer of %d, not %d: %w", step, z.Size(), size, index.ErrInvalid)
	}
	s := &spans{compression: index.None}
	for at := int64(0); at < size; at += step {
		s.spans = append(s.spans, index.Span{BlobOffset: at, Start: at, Window: -1})
	}
	return s, nil
}
