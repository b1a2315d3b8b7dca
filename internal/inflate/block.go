// SPDX-License-Identifier: Apache-2.0

package inflate

import (
	"encoding/binary"
	"fmt"
)

// take reads n bits, at most 16, and waits for them.
func (z *Reader) take(n uint) (int, error) {
	for z.nbits < n {
		if err := z.addByte(); err != nil {
			return 0, err
		}
	}
	v := int(z.bits & (1<<n - 1))
	z.bits >>= n
	z.nbits -= n
	return v, nil
}

func (z *Reader) addByte() error {
	b, err := z.byte()
	if err != nil {
		return err
	}
	z.bits |= uint64(b) << z.nbits
	z.nbits += 8
	return nil
}

// block reads the header of a block: RFC 1951, section 3.2.3.
func (z *Reader) block() error {
	h, err := z.take(3)
	if err != nil {
		return err
	}
	z.final = h&1 != 0
	switch h >> 1 {
	case 0:
		return z.storedHeader()
	case 1:
		z.tables.setFixed()
	case 2:
		if err := z.dynamicHeader(); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%w: unknown kind of block", ErrCorrupt)
	}
	z.state = inHuffman
	return nil
}

// storedHeader reads the length of a stored block, twice, from the next whole byte on.
func (z *Reader) storedHeader() error {
	z.bits, z.nbits = 0, 0
	var h [4]byte
	for i := range h {
		var err error
		if h[i], err = z.byte(); err != nil {
			return err
		}
	}
	n := binary.LittleEndian.Uint16(h[:])
	if n != ^binary.LittleEndian.Uint16(h[2:]) {
		return fmt.Errorf("%w: length of stored block", ErrCorrupt)
	}
	z.stored = int(n)
	z.state = inStored
	return nil
}

func (z *Reader) copyStored() error {
	room := min(z.stored, outputEnd-z.end)
	n := copy(z.output[z.end:z.end+room], z.input[z.in:])
	z.in += n
	z.end += n
	z.stored -= n
	if z.stored == 0 {
		return z.endBlock()
	}
	if n < room {
		return errShort
	}
	return nil
}

// dynamicHeader reads the codes of a block: RFC 1951, section 3.2.7.
func (z *Reader) dynamicHeader() error {
	h, err := z.take(14)
	if err != nil {
		return err
	}
	lits, dists, pres := h&31+257, h>>5&31+1, h>>10+4
	if lits > maxLit || dists > maxDist {
		return fmt.Errorf("%w: block with too many codes", ErrCorrupt)
	}
	t := z.tables
	t.fixed = false
	var lengths [maxLit + maxDist]uint8
	order := [...]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
	for _, symbol := range order[:pres] {
		n, err := z.take(3)
		if err != nil {
			return err
		}
		lengths[symbol] = uint8(n)
	}
	pre := t.dist[:1<<preBits] // which is not needed yet
	if !build(pre, preBits, lengths[:19], t.preSymbols[:]) {
		return fmt.Errorf("%w: bad code of code lengths", ErrCorrupt)
	}
	clear(lengths[:])
	if err := z.codeLengths(lengths[:lits+dists], pre); err != nil {
		return err
	}
	if !build(t.lit[:], litBits, lengths[:lits], t.litSymbols[:]) {
		return fmt.Errorf("%w: bad code of literals", ErrCorrupt)
	}
	if !build(t.dist[:], distBits, lengths[lits:lits+dists], t.distSymbols[:]) {
		return fmt.Errorf("%w: bad code of distances", ErrCorrupt)
	}
	return nil
}

// codeLengths reads the lengths of codes, which are coded by those in pre.
func (z *Reader) codeLengths(lengths []uint8, pre []entry) error {
	for i := 0; i < len(lengths); {
		e := pre[z.bits&(1<<preBits-1)]
		for uint(e&63) > z.nbits { // not a byte too much: it may not be there
			if err := z.addByte(); err != nil {
				return err
			}
			e = pre[z.bits&(1<<preBits-1)]
		}
		if e&isInvalid != 0 {
			return fmt.Errorf("%w: invalid code of a code length", ErrCorrupt)
		}
		z.bits >>= e & 63
		z.nbits -= uint(e & 63)
		n := uint8(e >> 16)
		if n < 16 {
			lengths[i] = n
			i++
			continue
		}
		var value uint8
		var least int
		var extra uint
		switch n {
		case 16: // the last one again
			if i == 0 {
				return fmt.Errorf("%w: repeats a code length that there is not", ErrCorrupt)
			}
			value, least, extra = lengths[i-1], 3, 2
		case 17: // zeros
			least, extra = 3, 3
		default:
			least, extra = 11, 7
		}
		repeat, err := z.take(extra)
		if err != nil {
			return err
		}
		repeat += least
		if repeat > len(lengths)-i {
			return fmt.Errorf("%w: too many code lengths", ErrCorrupt)
		}
		for range repeat {
			lengths[i] = value
			i++
		}
	}
	return nil
}
