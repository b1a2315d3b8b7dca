// SPDX-License-Identifier: Apache-2.0

package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// A state is what comes next in the input.
type state uint8

const (
	atFirstHeader state = iota
	atHeader
	atPoint
	atBlock
	inStored
	inHuffman
	atTrailer
)

// errShort is returned for input that ends where there should be more.
var errShort = errors.New("input is short")

// step goes on to the next state, or to where the output is full.
func (z *Reader) step() error {
	switch z.state {
	case atFirstHeader, atHeader:
		if err := z.header(); err != nil {
			return err
		}
		z.state = atBlock
		return z.boundary()
	case atPoint:
		if z.bits0 > 0 {
			b, err := z.byte()
			if err != nil {
				return err
			}
			z.bits, z.nbits = uint64(b>>(8-z.bits0)), uint(z.bits0)
		}
		z.state = atBlock
		return z.boundary()
	case atBlock:
		return z.block()
	case inStored:
		return z.copyStored()
	case inHuffman:
		return z.symbols()
	default:
		return z.trailer()
	}
}

// endBlock is called after the last symbol of a block.
func (z *Reader) endBlock() error {
	if z.final {
		z.state = atTrailer
		return nil
	}
	z.state = atBlock
	return z.boundary()
}

// Flags of a member's header: RFC 1952, section 2.3.1.
const (
	flagHeaderSum = 1 << 1
	flagExtra     = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4
	flagsReserved = 0xe0
)

// maxHeaderString is how long a file's name or a comment may be, with the zero
// at its end: what compress/gzip accepts.
const maxHeaderString = 512

// header reads a member's header. Where compress/gzip and
// klauspost/compress/gzip differ, it is as strict as the stricter one: flags
// that are reserved are refused, and a header must not end early.
func (z *Reader) header() error {
	if z.in == len(z.input) && !z.more() && z.srcErr == io.EOF && z.state == atHeader { //nolint:errorlint // as Read returns it
		return io.EOF
	}
	z.start, z.sum, z.size, z.joined = z.end, 0, 0, false
	h := z.scratch[:]
	if err := z.headerBytes(h); err != nil {
		return err
	}
	if h[0] != 0x1f || h[1] != 0x8b || h[2] != 8 {
		return fmt.Errorf("%w: no gzip header", ErrCorrupt)
	}
	flags := h[3]
	if flags&flagsReserved != 0 {
		return fmt.Errorf("%w: reserved flags in header", ErrCorrupt)
	}
	if flags&flagExtra != 0 {
		if err := z.headerBytes(h[:2]); err != nil {
			return err
		}
		for range binary.LittleEndian.Uint16(h) {
			if err := z.headerBytes(h[:1]); err != nil {
				return err
			}
		}
	}
	for _, flag := range []byte{flagName, flagComment} {
		if flags&flag == 0 {
			continue
		}
		if err := z.headerString(); err != nil {
			return err
		}
	}
	if flags&flagHeaderSum != 0 {
		want := uint16(z.sum)
		if err := z.headerBytes(h[:2]); err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(h) != want {
			return fmt.Errorf("%w: checksum of header does not match", ErrCorrupt)
		}
	}
	z.sum = 0
	return nil
}

// headerBytes reads len(p) bytes, and adds them to sum.
func (z *Reader) headerBytes(p []byte) error {
	for i := range p {
		var err error
		if p[i], err = z.byte(); err != nil {
			return err
		}
	}
	z.sum = crc32.Update(z.sum, crc32.IEEETable, p)
	return nil
}

// headerString reads a string that ends with a zero.
func (z *Reader) headerString() error {
	for range maxHeaderString {
		if err := z.headerBytes(z.scratch[:1]); err != nil {
			return err
		}
		if z.scratch[0] == 0 {
			return nil
		}
	}
	return fmt.Errorf("%w: long string in header", ErrCorrupt)
}

// trailer reads what follows a member's last block, from the next whole byte on.
func (z *Reader) trailer() error {
	z.addUp()
	z.bits, z.nbits = 0, 0
	var t [8]byte
	for i := range t {
		var err error
		if t[i], err = z.byte(); err != nil {
			return err
		}
	}
	z.state = atHeader
	switch {
	case z.joined:
		return nil
	case binary.LittleEndian.Uint32(t[:4]) != z.sum:
		return fmt.Errorf("%w: checksum does not match", ErrCorrupt)
	case binary.LittleEndian.Uint32(t[4:]) != z.size:
		return fmt.Errorf("%w: size does not match", ErrCorrupt)
	}
	return nil
}

// byte reads a byte of input, and waits for it. There are no bits left over.
func (z *Reader) byte() (byte, error) {
	if z.in == len(z.input) && !z.more() {
		return 0, z.ended()
	}
	b := z.input[z.in]
	z.in++
	return b, nil
}
