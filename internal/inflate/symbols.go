// SPDX-License-Identifier: Apache-2.0

package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	maxMatch = 258

	// fastInput is what the fast loop reads in one turn at most, in bytes.
	fastInput = 16

	// maxOverrun is how far the decoder may write beyond where it would stop:
	// literals of one bit, a match, and what its last copy has too much.
	maxOverrun = 64 + maxMatch + 16
)

var errBlockEnds = errors.New("block ends")

// symbols decodes a block's symbols, as many as the input has and the output takes.
func (z *Reader) symbols() error {
	err := z.fast()
	for err == nil && z.end < outputEnd {
		err = z.symbol()
	}
	// Whole bytes go back to the input, so that what is between blocks is the same
	// whoever has decoded the symbols before.
	z.in -= int(z.nbits / 8)
	z.nbits %= 8
	z.bits &= 1<<z.nbits - 1
	if err == errBlockEnds { //nolint:errorlint // ours
		return z.endBlock()
	}
	return err
}

// symbol decodes one symbol, with its distance. It uses no more of the input
// than that has, and nothing if the input ends within.
func (z *Reader) symbol() error {
	for z.nbits < 56 && z.in < len(z.input) {
		z.bits |= uint64(z.input[z.in]) << z.nbits
		z.nbits += 8
		z.in++
	}
	// Above nbits there are zeros. An entry that they are part of has more bits
	// than there are, since the bits of a code are all needed to find its entry.
	bits := z.bits
	e := z.tables.lit[bits&(1<<litBits-1)]
	used := uint(0)
	if e&isFurther != 0 {
		bits >>= litBits
		used = litBits
		e = z.tables.lit[e>>16+uint32(bits)&(1<<(e>>8&15)-1)]
	}
	if used += uint(e & 63); used > z.nbits {
		return errShort
	}
	switch {
	case e&isLiteral != 0:
		z.output[z.end] = byte(e >> 16)
		z.end++
		z.bits >>= used
		z.nbits -= used
		return nil
	case e&isEnd != 0:
		z.bits >>= used
		z.nbits -= used
		return errBlockEnds
	case e&isInvalid != 0:
		return errCode
	}
	length := int(e>>16 + extra(bits, e))
	bits >>= e & 63
	e = z.tables.dist[bits&(1<<distBits-1)]
	if e&isFurther != 0 {
		bits >>= distBits
		used += distBits
		e = z.tables.dist[e>>16+uint32(bits)&(1<<(e>>8&15)-1)]
	}
	if used += uint(e & 63); used > z.nbits {
		return errShort
	}
	if e&isInvalid != 0 {
		return errCode
	}
	dist := int(e>>16 + extra(bits, e))
	if dist > z.end-z.start {
		return errFar
	}
	z.bits >>= used
	z.nbits -= used
	for range length {
		z.output[z.end] = z.output[z.end-dist]
		z.end++
	}
	return nil
}

// extra returns the extra bits of an entry whose code bits begins with.
func extra(bits uint64, e entry) uint32 {
	return uint32(bits&(1<<(e&63)-1)) >> (e >> 8 & 15)
}

var (
	errCode = fmt.Errorf("%w: invalid code", ErrCorrupt)
	errFar  = fmt.Errorf("%w: refers to data before its beginning", ErrCorrupt)
)

// fast decodes symbols as long as there is more input and more room than any of
// them needs, so that nothing of that has to be checked in between.
//
// It is where the time goes. Of nbits only the lowest six bits count: so whole
// entries can be subtracted, whose lowest six bits are how many bits are used.
func (z *Reader) fast() error {
	var (
		in, input   = z.in, z.buffer
		out, output = z.end, z.output
		bits, nbits = z.bits, z.nbits
		lit, dist   = &z.tables.lit, &z.tables.dist
		inEnd       = len(z.input) - fastInput
		err         error
	)
next:
	for in <= inEnd && out < outputEnd {
		// Fill up to 56 bits or more. Above nbits, bits has what comes next, or zeros,
		// and may be given the same again. 63 less nbits is what there is room for.
		bits |= binary.LittleEndian.Uint64(input[in:]) << (nbits & 63)
		in += int(^nbits & 63 >> 3)
		nbits |= 56

		e := lit[bits&(1<<litBits-1)]
		for e&isLiteral != 0 {
			bits, nbits = bits>>(e&63), nbits-uint(e)
			output[out] = byte(e >> 16)
			out++
			if nbits&63 < maxCode+5 { // as much as a length can have
				continue next
			}
			e = lit[bits&(1<<litBits-1)]
		}
		if e&isFurther != 0 {
			bits, nbits = bits>>litBits, nbits-litBits
			e = lit[e>>16+uint32(bits)&(1<<(e>>8&15)-1)]
			if e&isLiteral != 0 {
				bits, nbits = bits>>(e&63), nbits-uint(e)
				output[out] = byte(e >> 16)
				out++
				continue
			}
		}
		if e&(isEnd|isInvalid) != 0 {
			bits, nbits = bits>>(e&63), nbits-uint(e)
			if err = errBlockEnds; e&isInvalid != 0 {
				err = errCode
			}
			break
		}
		length := int(e>>16 + extra(bits, e))
		bits, nbits = bits>>(e&63), nbits-uint(e)

		if nbits&63 < maxCode+13 { // as much as a distance can have
			bits |= binary.LittleEndian.Uint64(input[in:]) << (nbits & 63)
			in += int(^nbits & 63 >> 3)
			nbits |= 56
		}

		e = dist[bits&(1<<distBits-1)]
		if e&isSpecial != 0 {
			if e&isInvalid != 0 {
				err = errCode
				break
			}
			bits, nbits = bits>>distBits, nbits-distBits
			e = dist[e>>16+uint32(bits)&(1<<(e>>8&15)-1)]
		}
		from := int(e>>16 + extra(bits, e))
		bits, nbits = bits>>(e&63), nbits-uint(e)
		if from > out-z.start {
			err = errFar
			break
		}

		end := out + length
		if from >= 16 {
			for ; out < end; out += 16 {
				*(*[16]byte)(output[out:]) = *(*[16]byte)(output[out-from:])
			}
		} else { // what is written last is read next, so each step adds so many bytes
			for step := min(from, 8); out < end; out += step {
				*(*[8]byte)(output[out:]) = *(*[8]byte)(output[out-from:])
			}
		}
		out = end
	}
	z.in, z.end, z.bits, z.nbits = in, out, bits, nbits&63
	return err
}
