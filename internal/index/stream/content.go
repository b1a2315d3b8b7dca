// SPDX-License-Identifier: Apache-2.0

package stream

import (
	"archive/tar"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"strings"

	"github.com/holdfast/holdfast/internal/index"
)

// entry adds one tar entry and writes its content to the device. The builder
// decides where that goes before anything is written.
func (s *reader) entry(tr *tar.Reader, h *tar.Header) error {
	e, err := index.FromTar(h)
	if err != nil {
		return err
	}
	if err := s.builder.Add(e); err != nil {
		return err
	}
	if s.entries != nil {
		s.entries.Add(h, s.plain.n)
	}
	at, size := s.builder.Content()
	if s.begin != nil && size > 0 {
		if err := s.begin(at, size); err != nil {
			return &writeError{err}
		}
	}
	step := int64(len(s.buf))
	if isSparse(h) {
		step = sparseBlock
	}
	var whole hash.Hash
	if s.entries != nil && size > 0 && (!s.digests || size > chunkSize) {
		whole = sha256.New()
	}
	if err := s.content(tr, at, size, step, whole); err != nil {
		return fmt.Errorf("content of %.256q: %w", h.Name, err)
	}
	switch {
	case whole != nil:
		s.files = append(s.files, [sha256.Size]byte(whole.Sum(nil)))
	case s.entries != nil && size > 0:
		s.files = append(s.files, s.last) // its only chunk
	}
	return nil
}

// sparseBlock is what the data of a sparse file is aligned to in a tar.
const sparseBlock = 512

func isSparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// content reads a file of size bytes that lies at offset at of the device, in
// steps that lie in the tar as they are, or, in a sparse file, not at all. It goes
// to whole, if that is not nil, as a whole.
func (s *reader) content(tr io.Reader, at, size, step int64, whole hash.Hash) error {
	run := chunk{reader: s, hash: sha256.New()}
	for done := int64(0); done < size; {
		n := min(step, size-done, chunkSize-run.size)
		before := s.plain.n
		if _, err := io.ReadFull(tr, s.buf[:n]); err != nil {
			return unexpected(err)
		}
		if whole != nil {
			whole.Write(s.buf[:n])
		}
		switch s.plain.n - before {
		case n:
			if err := run.add(done, before, s.buf[:n]); err != nil {
				return err
			}
			if _, err := s.device.WriteAt(s.buf[:n], at+done); err != nil {
				return &writeError{err}
			}
		case 0:
			if err := run.flush(); err != nil {
				return err
			}
			if err := s.builder.AddChunk(index.Chunk{Offset: done, Size: n}); err != nil {
				return err
			}
		default:
			return fmt.Errorf("sparse file with data that is not aligned: %w", index.ErrInvalid)
		}
		done += n
		if run.size == chunkSize {
			if err := run.flush(); err != nil {
				return err
			}
		}
	}
	return run.flush()
}

// unexpected turns an end in the middle of a file into an error.
func unexpected(err error) error {
	if err == io.EOF { //nolint:errorlint // from a direct Read
		return io.ErrUnexpectedEOF
	}
	return err
}

// chunk is the chunk that is being read.
type chunk struct {
	*reader
	hash   hash.Hash
	offset int64 // in the file
	inner  int64 // in the tar
	size   int64
}

func (c *chunk) add(offset, inner int64, p []byte) error {
	if c.size > 0 && inner != c.inner+c.size { // data after a hole starts anew, so this is a broken sparse map
		return fmt.Errorf("sparse file out of order: %w", index.ErrInvalid)
	}
	if c.size == 0 {
		c.offset, c.inner = offset, inner
	}
	c.size += int64(len(p))
	if !c.digests {
		return nil
	}
	_, err := c.hash.Write(p)
	return err
}

// flush gives the chunk to the builder.
func (c *chunk) flush() error {
	if c.size == 0 {
		return nil
	}
	out := index.Chunk{Offset: c.offset, Size: c.size, InnerOffset: c.inner}
	if c.digests {
		out.Digest = [sha256.Size]byte(c.hash.Sum(nil))
		c.last = out.Digest
		c.hash.Reset()
	}
	c.size = 0
	if c.compression == index.None {
		out.BlobOffset, out.BlobSize, out.InnerOffset = out.InnerOffset, out.Size, 0
		return c.builder.AddChunk(out)
	}
	return c.builder.AddContent(out)
}
