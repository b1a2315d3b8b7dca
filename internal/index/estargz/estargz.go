// SPDX-License-Identifier: Apache-2.0

// Package estargz reads the index of an eStargz layer: a gzip layer with a
// member of its own for every chunk and a table of contents at its end.
//
// It fetches the end of the blob, and the rest of the TOC if that is longer than
// guessed. Nothing of the TOC is used before it matched the digest in the
// layer's annotations; a layer without that annotation has no index here.
//
// A normal pull also extracts the TOC, a tar entry that the TOC does not list;
// the index holds it, too. The TOC has times in whole seconds, rounded, so a
// file whose tar entry has a fraction of a second has another time than after a
// normal pull.
package estargz

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/toc"
)

// tocName is the tar entry that the TOC is the content of.
const tocName = "stargz.index.json"

// Open reads the index of the layer desc, whose descriptor in the manifest has
// these annotations.
//
// It returns [index.ErrNoIndex] if the layer is no eStargz, [blob.ErrCorrupt] if
// the TOC does not match its digest (another source may have the right one),
// [index.ErrInvalid] or [index.ErrTooLarge] if the TOC is not sound, or the
// error of src. It holds at most a few MiB besides the index itself.
func Open(ctx context.Context, src blob.Source, desc blob.Descriptor, annotations map[string]string) (*index.Index, error) {
	idx, err := open(ctx, src, desc, annotations)
	if err != nil {
		return nil, fmt.Errorf("reading eStargz index of %s: %w", desc.Digest, err)
	}
	return idx, nil
}

func open(ctx context.Context, src blob.Source, desc blob.Descriptor, annotations map[string]string) (*index.Index, error) {
	text, ok := annotations[index.AnnotationEStargz]
	if !ok {
		return nil, fmt.Errorf("no annotation %s: %w", index.AnnotationEStargz, index.ErrNoIndex)
	}
	want, err := toc.Sum(text)
	if err != nil {
		return nil, fmt.Errorf("annotation %s: %w", index.AnnotationEStargz, err)
	}
	l := layer{src: src, desc: desc}
	if err := l.readTail(ctx); err != nil {
		return nil, err
	}
	if l.tocOffset, l.tocEnd, err = parseFooter(l.tail, desc.Size); err != nil {
		return nil, err
	}
	b := index.NewBuilder(desc.Size, index.DefaultLimits())
	content, facts, err := l.readTOC(ctx, b, want)
	if err != nil {
		return nil, fmt.Errorf("table of contents at %d: %w", l.tocOffset, err)
	}
	if hidden, err := l.tocHidden(ctx, facts); err != nil {
		return nil, fmt.Errorf("looking at what precedes the table of contents at %d: %w", l.tocOffset, err)
	} else if !hidden {
		if err := b.Add(content); err != nil {
			return nil, err
		}
	}
	idx, err := b.Finish(index.EStargz, index.Gzip)
	if err != nil {
		return nil, err
	}
	idx.Landmark = facts.Prefetch
	return idx, nil
}

// layer is a blob whose end has been read.
type layer struct {
	src       blob.Source
	desc      blob.Descriptor
	tail      []byte
	tailStart int64 // where tail starts in the blob
	tocOffset int64
	tocEnd    int64 // where the footer starts
}

// tailSize guesses how much of the end of a blob holds its TOC: up to about 1 in
// 100 bytes with many small files. A line carries a mebibyte in less time than
// the round trip of a second request; a TOC of several is the rarer case.
func tailSize(blobSize int64) int64 {
	const smallest, largest = 1 << 20, 2 << 20
	return min(blobSize, max(smallest, min(blobSize/100, largest)))
}

func (l *layer) readTail(ctx context.Context) error {
	n := tailSize(l.desc.Size)
	l.tailStart = l.desc.Size - n
	r, err := l.src.Open(ctx, l.desc, l.tailStart, n)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // read only
	l.tail = make([]byte, n)
	if _, err := io.ReadFull(r, l.tail); err != nil {
		return fmt.Errorf("reading the last %d bytes: %w", n, err)
	}
	return nil
}

// open reads [start, end), which ends in the tail, fetching what precedes it.
func (l *layer) open(ctx context.Context, start, end int64) (io.ReadCloser, error) {
	if start >= l.tailStart {
		return io.NopCloser(bytes.NewReader(l.tail[start-l.tailStart : end-l.tailStart])), nil
	}
	fetched := min(end, l.tailStart)
	r, err := l.src.Open(ctx, l.desc, start, fetched-start)
	if err != nil {
		return nil, err
	}
	rest := l.tail[:max(0, end-l.tailStart)]
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(r, bytes.NewReader(rest)), r}, nil
}

// readTOC adds the entries of the TOC to b, checks its digest, and returns the
// entry of the TOC itself.
func (l *layer) readTOC(ctx context.Context, b *index.Builder, want [32]byte) (index.Entry, toc.Facts, error) {
	r, err := l.open(ctx, l.tocOffset, l.tocEnd)
	if err != nil {
		return index.Entry{}, toc.Facts{}, err
	}
	defer r.Close() //nolint:errcheck // read only
	plain, err := newMember(r)
	if err != nil {
		return index.Entry{}, toc.Facts{}, err
	}
	tr := tar.NewReader(plain)
	h, err := tr.Next()
	if err != nil {
		return index.Entry{}, toc.Facts{}, plain.explain(err)
	}
	// The header is not covered by the digest, so it must be the one that every
	// writer makes. Checking here means that the index can state it.
	if h.Name != tocName || h.Typeflag != tar.TypeReg || h.Mode != 0 || h.Uid != 0 || h.Gid != 0 ||
		h.ModTime.Unix() != 0 || len(h.PAXRecords) > 0 || h.Size > toc.MaxBytes {
		return index.Entry{}, toc.Facts{}, fmt.Errorf("tar header %.64q of %d bytes: %w", h.Name, h.Size, index.ErrInvalid)
	}
	content := newTOCContent(plain.read, l.tocOffset, l.tocEnd)
	body := io.TeeReader(tr, content)
	facts, err := toc.Decode(body, b)
	if err != nil {
		// Bytes that are not what the digest names explain any other complaint.
		if _, err := io.Copy(io.Discard, body); err != nil {
			return index.Entry{}, toc.Facts{}, plain.explain(err)
		}
	}
	if got := content.sum(); got != want {
		return index.Entry{}, toc.Facts{}, fmt.Errorf("digest is %x, not %x: %w", got, want, blob.ErrCorrupt)
	}
	if err != nil {
		return index.Entry{}, toc.Facts{}, err
	}
	return index.Entry{Name: tocName, Mode: unix.S_IFREG, ModTime: h.ModTime, Size: content.size, Chunks: content.chunks()}, facts, nil
}

// member reads one gzip member and counts what it yields.
type member struct {
	gz   *gzip.Reader
	src  *stickyReader
	read int64
}

// stickyReader keeps the error of a source apart from those of a decoder.
type stickyReader struct {
	r   io.Reader
	err error
}

func (s *stickyReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// newMember reads the gzip member that r starts with.
func newMember(r io.Reader) (*member, error) {
	m := &member{src: &stickyReader{r: r}}
	gz, err := gzip.NewReader(m.src)
	if err != nil {
		return nil, m.explain(err)
	}
	gz.Multistream(false)
	m.gz = gz
	return m, nil
}

func (m *member) Read(p []byte) (int, error) {
	n, err := m.gz.Read(p)
	m.read += int64(n)
	return n, err
}

// explain returns the source's error if it has failed; otherwise, what the
// source sent is not what the layer holds.
func (m *member) explain(err error) error {
	if m.src.err != nil {
		return m.src.err
	}
	var damaged flate.CorruptInputError
	if errors.As(err, &damaged) || errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) ||
		errors.Is(err, tar.ErrHeader) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %w", blob.ErrCorrupt, err)
	}
	return err
}
