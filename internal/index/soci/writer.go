// SPDX-License-Identifier: Apache-2.0

package soci

import (
	"archive/tar"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/awslabs/soci-snapshotter/ztoc/compression/fbs/zinfo"
	"github.com/awslabs/soci-snapshotter/ztoc/fbs/ztoc"
	flatbuffers "github.com/google/flatbuffers/go"

	"github.com/holdfast/holdfast/internal/index"
)

// ErrNotExpressible means that there is no zTOC for a layer.
var ErrNotExpressible = errors.New("the format cannot describe the layer")

// Writer collects the entries of a layer while the layer is read, and writes its
// zTOC when that is done. It is used by one goroutine.
type Writer struct {
	b       *flatbuffers.Builder
	entries []flatbuffers.UOffsetT
	shared  map[string]flatbuffers.UOffsetT // strings that most entries have
	err     error
}

// NewWriter returns a Writer without entries.
func NewWriter() *Writer {
	w := &Writer{b: flatbuffers.NewBuilder(1 << 16), shared: map[string]flatbuffers.UOffsetT{}}
	// First, that is at the end of the document: the checkpoints are not held in
	// memory, they follow it.
	w.b.StartVector(1, 0, 1)
	if at := w.b.EndVector(0); at != checkpointsAt {
		w.err = fmt.Errorf("checkpoints at %d: %w", at, ErrNotExpressible)
	}
	return w
}

// checkpointsAt is where the vector that was made first lies: its length ends the
// document.
const checkpointsAt = 4

// Add adds the next entry, whose content starts at offset of the decompressed blob.
func (w *Writer) Add(h *tar.Header, offset int64) {
	kind := ""
	for name, flag := range types {
		if flag == h.Typeflag {
			kind = name
		}
	}
	if kind == "" && w.err == nil {
		w.err = fmt.Errorf("%.256q is of tar type %q: %w", h.Name, h.Typeflag, ErrNotExpressible)
	}
	var records []flatbuffers.UOffsetT
	for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
		if strings.HasPrefix(key, sparseRecord) && w.err == nil {
			w.err = fmt.Errorf("%.256q is a sparse file: %w", h.Name, ErrNotExpressible)
		}
		k, v := w.sharedString(key), w.b.CreateString(h.PAXRecords[key])
		ztoc.XattrStart(w.b)
		ztoc.XattrAddKey(w.b, k)
		ztoc.XattrAddValue(w.b, v)
		records = append(records, ztoc.XattrEnd(w.b))
	}
	if w.err != nil {
		return
	}
	name, link := w.b.CreateString(h.Name), w.sharedString(h.Linkname)
	kindAt, user, group := w.sharedString(kind), w.sharedString(h.Uname), w.sharedString(h.Gname)
	when := w.sharedString(formatTime(h.ModTime)) // files of one package have one
	recordsAt := absent
	if len(records) > 0 {
		ztoc.FileMetadataStartXattrsVector(w.b, len(records))
		recordsAt = w.vector(records)
	}
	ztoc.FileMetadataStart(w.b)
	ztoc.FileMetadataAddName(w.b, name)
	ztoc.FileMetadataAddType(w.b, kindAt)
	ztoc.FileMetadataAddUncompressedOffset(w.b, offset)
	ztoc.FileMetadataAddUncompressedSize(w.b, h.Size)
	ztoc.FileMetadataAddLinkname(w.b, link)
	ztoc.FileMetadataAddMode(w.b, h.Mode)
	ztoc.FileMetadataAddUid(w.b, uint32(h.Uid)) //nolint:gosec // index.FromTar has refused what does not fit
	ztoc.FileMetadataAddGid(w.b, uint32(h.Gid)) //nolint:gosec // as above
	ztoc.FileMetadataAddUname(w.b, user)
	ztoc.FileMetadataAddGname(w.b, group)
	ztoc.FileMetadataAddModTime(w.b, when)
	ztoc.FileMetadataAddDevmajor(w.b, h.Devmajor)
	ztoc.FileMetadataAddDevminor(w.b, h.Devminor)
	ztoc.FileMetadataAddXattrs(w.b, recordsAt)
	w.entries = append(w.entries, ztoc.FileMetadataEnd(w.b))
}

// absent is where a field lies that is not written; it reads as an empty one.
const absent flatbuffers.UOffsetT = 0

// sharedString stores a string that was stored before only once, and an empty one
// not at all.
func (w *Writer) sharedString(s string) flatbuffers.UOffsetT {
	const most, longest = 1 << 12, 64
	if s == "" {
		return absent
	}
	if at, ok := w.shared[s]; ok {
		return at
	}
	at := w.b.CreateString(s)
	if len(w.shared) < most && len(s) <= longest {
		w.shared[s] = at
	}
	return at
}

// vector ends a vector that was started with len(items) items.
func (w *Writer) vector(items []flatbuffers.UOffsetT) flatbuffers.UOffsetT {
	for _, at := range slices.Backward(items) {
		w.b.PrependUOffsetT(at)
	}
	return w.b.EndVector(len(items))
}

// Layer is what a zTOC says about a layer beside its entries.
type Layer struct {
	Tool        string // that makes the document
	Compression index.Compression
	BlobSize    int64 // in bytes
	PlainSize   int64 // of the decompressed blob, in bytes
	Spans       []index.Span
	Windows     io.ReaderAt // see index.Index
}

// WriteTo ends the Writer and writes the document. It returns [ErrNotExpressible]
// for a layer that has sparse files.
func (w *Writer) WriteTo(out io.Writer, l Layer) error {
	if w.err != nil {
		return w.err
	}
	algorithm, checkpoints, length := checkpointsOf(l)
	digests := make([]flatbuffers.UOffsetT, len(l.Spans))
	for i, s := range l.Spans {
		digests[i] = w.b.CreateString("sha256:" + hex.EncodeToString(s.Digest[:]))
	}
	ztoc.CompressionInfoStartSpanDigestsVector(w.b, len(digests))
	digestsAt := w.vector(digests)
	ztoc.CompressionInfoStart(w.b)
	ztoc.CompressionInfoAddMaxSpanId(w.b, int32(len(l.Spans)-1)) //nolint:gosec // bounded by index.Limits
	ztoc.CompressionInfoAddSpanDigests(w.b, digestsAt)
	ztoc.CompressionInfoAddCheckpoints(w.b, checkpointsAt)
	ztoc.CompressionInfoAddCompressionAlgorithm(w.b, algorithm)
	info := ztoc.CompressionInfoEnd(w.b)
	ztoc.TOCStartMetadataVector(w.b, len(w.entries))
	entries := w.vector(w.entries)
	ztoc.TOCStart(w.b)
	ztoc.TOCAddMetadata(w.b, entries)
	toc := ztoc.TOCEnd(w.b)
	version, tool := w.b.CreateString(Version), w.b.CreateString(l.Tool)
	ztoc.ZtocStart(w.b)
	ztoc.ZtocAddVersion(w.b, version)
	ztoc.ZtocAddBuildToolIdentifier(w.b, tool)
	ztoc.ZtocAddToc(w.b, toc)
	ztoc.ZtocAddCompressedArchiveSize(w.b, l.BlobSize)
	ztoc.ZtocAddUncompressedArchiveSize(w.b, l.PlainSize)
	ztoc.ZtocAddCompressionInfo(w.b, info)
	w.b.Finish(ztoc.ZtocEnd(w.b))

	head := w.b.FinishedBytes()
	binary.LittleEndian.PutUint32(head[len(head)-checkpointsAt:], uint32(length)) //nolint:gosec // spans are bounded
	if _, err := out.Write(head); err != nil {
		return fmt.Errorf("writing zTOC: %w", err)
	}
	if n, err := io.Copy(out, checkpoints); err != nil || n != length {
		return fmt.Errorf("writing checkpoints of zTOC, %d of %d bytes: %w", n, length, err)
	}
	return nil
}

// checkpointsOf returns a layer's checkpoints and how long they are.
func checkpointsOf(l Layer) (ztoc.CompressionAlgorithm, io.Reader, int64) {
	switch l.Compression {
	case index.Gzip:
		return ztoc.CompressionAlgorithmGzip, &checkpoints{layer: l, record: checkpointSize},
			checkpointHeader + int64(len(l.Spans))*checkpointSize
	case index.Zstd:
		return algorithmZstd, &checkpoints{layer: l, record: frameSize}, checkpointHeader + int64(len(l.Spans))*frameSize
	default:
		b := flatbuffers.NewBuilder(64)
		zinfo.TarZinfoStart(b)
		zinfo.TarZinfoAddVersion(b, 2) // zinfoVersion in ztoc/compression/tar_zinfo.go
		zinfo.TarZinfoAddSpanSize(b, SpanSize)
		zinfo.TarZinfoAddSize(b, l.BlobSize)
		b.Finish(zinfo.TarZinfoEnd(b))
		return ztoc.CompressionAlgorithmUncompressed, strings.NewReader(string(b.FinishedBytes())), int64(len(b.FinishedBytes()))
	}
}

// checkpoints reads as the checkpoints of a layer.
type checkpoints struct {
	layer  Layer
	record int
	next   int // span; one more than that has been made
	buf    []byte
	begun  bool
}

func (c *checkpoints) Read(p []byte) (int, error) {
	if len(c.buf) == 0 {
		if err := c.make(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.buf)
	c.buf = c.buf[n:]
	return n, nil
}

// make makes the next record.
func (c *checkpoints) make() error {
	if !c.begun {
		c.begun = true
		c.buf = binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32(nil, uint32(len(c.layer.Spans))), SpanSize) //nolint:gosec // bounded
		return nil
	}
	if c.next == len(c.layer.Spans) {
		return io.EOF
	}
	s := c.layer.Spans[c.next]
	c.next++
	in := s.BlobOffset
	if s.Bits > 0 {
		in++
	}
	rec := make([]byte, c.record)
	binary.LittleEndian.PutUint64(rec, uint64(in))          //nolint:gosec // not negative
	binary.LittleEndian.PutUint64(rec[8:], uint64(s.Start)) //nolint:gosec // not negative
	if c.record == checkpointSize {
		rec[16] = s.Bits
		if s.Window >= 0 {
			if _, err := io.ReadFull(io.NewSectionReader(c.layer.Windows, s.Window, index.WindowSize), rec[17:]); err != nil {
				return fmt.Errorf("reading window of span %d: %w", c.next-1, err)
			}
		}
	}
	c.buf = rec
	return nil
}
