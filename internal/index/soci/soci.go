// SPDX-License-Identifier: Apache-2.0

// Package soci reads and writes zTOCs, the indexes that SOCI keeps beside layers
// which were not made to be read in parts: which files a layer holds, where their
// content lies in the decompressed layer, and the places where decompression can
// begin, each with the digest of the compressed bytes up to the next one.
//
// The format is that of github.com/awslabs/soci-snapshotter, ztoc/fbs/ztoc.fbs and
// ztoc/compression. It knows gzip and uncompressed layers. For zstd layers of
// several frames this package uses the same document with a compression algorithm
// of its own, which others do not understand.
//
// A zTOC says nothing about the digest of the decompressed bytes: what it is worth
// as a whole is for the caller to know.
package soci

import (
	"archive/tar"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/awslabs/soci-snapshotter/ztoc/fbs/ztoc"

	"github.com/holdfast/holdfast/internal/index"
)

const (
	// Version is that of the format.
	Version = "0.9"
	// SpanSize is the least that a gzip span decompresses to, in bytes, and what an
	// uncompressed one has; that of the soci command.
	SpanSize = 4 << 20
	// MaxBytes is how long a zTOC may be: a layer of 16 GiB has one of some 140 MB.
	MaxBytes = 1 << 30

	maxRecords = 1_000_000 // PAX records of all entries

	// algorithmZstd is our own: see above.
	algorithmZstd ztoc.CompressionAlgorithm = 3
)

// Decode reads the zTOC of a blob of blobSize bytes. The index refers to the
// document until its windows have been read.
//
// It returns [index.ErrInvalid] or [index.ErrTooLarge] if the document is not
// sound, of another version, or that of a blob of another size.
func Decode(document []byte, blobSize int64) (idx *index.Index, err error) {
	return decode(document, blobSize, func() {})
}

// decode is Decode for a document that may be let go of, from time to time, what has
// been read of it: the checkpoints are far apart in it.
func decode(document []byte, blobSize int64, letGo func()) (idx *index.Index, err error) {
	defer func() {
		if r := recover(); r != nil { // flatbuffers index past the end of what they read
			idx, err = nil, fmt.Errorf("damaged: %v: %w", r, index.ErrInvalid)
		}
		if err != nil {
			err = fmt.Errorf("reading zTOC of %d bytes: %w", len(document), err)
		}
	}()
	if len(document) < 8 {
		return nil, fmt.Errorf("it is too short: %w", index.ErrInvalid)
	}
	document = slices.Clip(document) // flatbuffers may slice up to the capacity
	z := ztoc.GetRootAsZtoc(document, 0)
	if v := z.Version(); string(v) != Version {
		return nil, fmt.Errorf("it has version %.32q, and only %s is understood: %w", v, Version, index.ErrInvalid)
	}
	if size := z.CompressedArchiveSize(); size != blobSize {
		return nil, fmt.Errorf("it is that of a layer of %d bytes, not %d: %w", size, blobSize, index.ErrInvalid)
	}
	info := z.CompressionInfo(nil)
	toc := z.Toc(nil)
	if info == nil || toc == nil {
		return nil, fmt.Errorf("half of it is missing: %w", index.ErrInvalid)
	}
	s, err := readSpans(info, blobSize, letGo)
	if err != nil {
		return nil, err
	}
	plain := max(z.UncompressedArchiveSize(), 0)
	if n := len(s.spans); n > 0 {
		plain = max(plain, s.spans[n-1].Start) // it does not count what follows the last entry
	}
	b := index.NewBuilder(blobSize, index.DefaultLimits())
	if err := addEntries(b, toc); err != nil {
		return nil, err
	}
	if idx, err = b.FinishSpans(index.SOCI, s.compression, s.spans, plain); err != nil {
		return nil, err
	}
	idx.Windows = s.windows
	return idx, nil
}

// addEntries adds the files of a TOC.
func addEntries(b *index.Builder, toc *ztoc.TOC) error {
	var m ztoc.FileMetadata
	records := 0
	end := int64(0)
	for i := range toc.MetadataLength() {
		if !toc.Metadata(&m, i) {
			return fmt.Errorf("entry %d is missing: %w", i, index.ErrInvalid)
		}
		if records += m.XattrsLength(); records > maxRecords {
			return fmt.Errorf("more than %d attributes: %w", maxRecords, index.ErrTooLarge)
		}
		h, err := header(&m)
		if err != nil {
			return fmt.Errorf("entry %.256q: %w", m.Name(), err)
		}
		e, err := index.FromTar(h)
		if err != nil {
			return err
		}
		if err := b.Add(e); err != nil {
			return err
		}
		at := m.UncompressedOffset()
		if at < end {
			return fmt.Errorf("entry %.256q at %d lies before %d: %w", h.Name, at, end, index.ErrInvalid)
		}
		if _, size := b.Content(); size > 0 {
			if at > math.MaxInt64-size {
				return fmt.Errorf("entry %.256q at %d: %w", h.Name, at, index.ErrInvalid)
			}
			if err := b.AddContent(index.Chunk{Size: size, InnerOffset: at}); err != nil {
				return err
			}
			end = at + size
		}
	}
	return nil
}

// types are the names of tar entries.
var types = map[string]byte{
	"hardlink": tar.TypeLink, "symlink": tar.TypeSymlink, "dir": tar.TypeDir, "reg": tar.TypeReg,
	"char": tar.TypeChar, "block": tar.TypeBlock, "fifo": tar.TypeFifo,
}

// header returns the tar header that an entry was made of.
func header(m *ztoc.FileMetadata) (*tar.Header, error) {
	typeflag, ok := types[string(m.Type())]
	if !ok {
		return nil, fmt.Errorf("type %.32q: %w", m.Type(), index.ErrInvalid)
	}
	h := &tar.Header{
		Typeflag: typeflag, Name: string(m.Name()), Linkname: string(m.Linkname()), Mode: m.Mode(),
		Uid: int(m.Uid()), Gid: int(m.Gid()), Devmajor: m.Devmajor(), Devminor: m.Devminor(),
	}
	if typeflag == tar.TypeReg {
		h.Size = m.UncompressedSize()
	}
	if err := h.ModTime.UnmarshalText(m.ModTime()); err != nil {
		return nil, fmt.Errorf("time %.64q: %w", m.ModTime(), index.ErrInvalid)
	}
	var x ztoc.Xattr
	for i := range m.XattrsLength() {
		if !m.Xattrs(&x, i) {
			return nil, fmt.Errorf("attribute %d is missing: %w", i, index.ErrInvalid)
		}
		key := string(x.Key())
		if strings.HasPrefix(key, sparseRecord) {
			return nil, fmt.Errorf("a sparse file, of which the format does not tell where its data is: %w", index.ErrInvalid)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[key] = string(x.Value())
	}
	return h, nil
}

// sparseRecord is how the PAX records of a sparse file start.
const sparseRecord = "GNU.sparse."

// formatTime is how a zTOC has times.
func formatTime(t time.Time) string { return t.Format(time.RFC3339Nano) }
