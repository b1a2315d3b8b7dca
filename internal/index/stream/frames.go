// SPDX-License-Identifier: Apache-2.0

package stream

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/inflate"
)

// zstdReader decompresses a zstd blob frame by frame, and makes spans of frames
// that follow each other. See RFC 8878, section 3.1, for frames and blocks.
type zstdReader struct {
	src    *bufio.Reader
	z      *zstd.Decoder
	in     int64 // offset in the blob of src
	out    int64
	open   bool // a frame is being decompressed
	frame  frame
	hash   hash.Hash
	spans  []index.Span
	target int64                             // bytes that a span decompresses to at least
	points func(inflate.Point, []byte) error // told where frames begin; may be nil
}

// newZstdReader returns a reader of the blob that src reads.
func newZstdReader(src *bufio.Reader, spanSize int64) (*zstdReader, error) {
	z, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	return &zstdReader{src: src, z: z, hash: sha256.New(), target: spanSize}, nil
}

func (r *zstdReader) Read(p []byte) (int, error) {
	for {
		if !r.open {
			if err := r.next(); err != nil {
				return 0, err
			}
		}
		n, err := r.z.Read(p)
		r.out += int64(n)
		if err == io.EOF { //nolint:errorlint // from a direct Read
			if r.open, err = false, nil; !r.frame.ended {
				err = io.ErrUnexpectedEOF
			}
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// next begins the next frame.
func (r *zstdReader) next() error {
	if _, err := r.src.Peek(1); err != nil {
		if errors.Is(err, io.EOF) {
			r.endSpan()
		}
		return err
	}
	if r.points != nil {
		if err := r.points(inflate.Point{In: r.in, Out: r.out}, nil); err != nil {
			return err
		}
	}
	if n := len(r.spans); n == 0 || r.out-r.spans[n-1].Start >= r.target {
		r.endSpan()
		r.spans = append(r.spans, index.Span{BlobOffset: r.in, Start: r.out, Window: -1})
	}
	r.frame = frame{r: r}
	r.open = true
	return r.z.Reset(&r.frame)
}

// endSpan gives the last span its digest.
func (r *zstdReader) endSpan() {
	if len(r.spans) == 0 {
		return
	}
	s := &r.spans[len(r.spans)-1]
	s.BlobSize = r.in - s.BlobOffset
	r.hash.Sum(s.Digest[:0])
	r.hash.Reset()
}

func (r *zstdReader) close() { r.z.Close() }

// frame reads the bytes of one frame, and io.EOF where it ends.
type frame struct {
	r        *zstdReader
	begun    bool
	checksum bool
	left     int // bytes of the part that has been begun
	last     bool
	ended    bool
	err      error
}

func (f *frame) Read(p []byte) (int, error) {
	for f.left == 0 {
		if f.err == nil {
			f.err = f.part()
		}
		if f.err != nil {
			return 0, f.err
		}
	}
	n, err := f.r.src.Read(p[:min(len(p), f.left)])
	f.r.hash.Write(p[:n])
	f.r.in += int64(n)
	f.left -= n
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// part finds out how long the next part of the frame is: its header, a block with
// its header, or the checksum.
func (f *frame) part() error {
	switch {
	case f.ended:
		return io.EOF
	case !f.begun:
		f.begun = true
		return f.header()
	case f.last && f.checksum:
		f.checksum, f.left = false, 4
		return nil
	case f.last:
		f.ended = true
		return io.EOF
	}
	head, err := f.r.src.Peek(3)
	if err != nil {
		return unexpected(err)
	}
	block := int(head[0]) | int(head[1])<<8 | int(head[2])<<16
	f.last = block&1 != 0
	f.left = 3 + block>>3
	if block>>1&3 == 1 { // a byte that is repeated
		f.left = 3 + 1
	}
	return nil
}

func (f *frame) header() error {
	head, err := f.r.src.Peek(8)
	if err != nil && len(head) < 5 {
		return unexpected(err)
	}
	magic := binary.LittleEndian.Uint32(head)
	switch {
	case magic>>4 == 0x184d2a5 && len(head) == 8: // skippable
		size := binary.LittleEndian.Uint32(head[4:])
		f.left, f.last = 8+int(size), true
		return nil
	case magic != 0xfd2fb528:
		return fmt.Errorf("zstd frame starts with %#x: %w", magic, index.ErrInvalid)
	}
	d := head[4] // frame header descriptor
	single := d&(1<<5) != 0
	f.checksum = d&(1<<2) != 0
	f.left = 5
	if !single {
		f.left++ // window descriptor
	}
	f.left += []int{0, 1, 2, 4}[d&3] // dictionary
	switch size := d >> 6; {
	case size > 0:
		f.left += 1 << size
	case single:
		f.left++
	}
	return nil
}
