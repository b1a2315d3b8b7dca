// SPDX-License-Identifier: Apache-2.0

package inflate

import "math/bits"

const (
	maxCode = 15 // bits of the longest code
	maxLit  = 286
	maxDist = 30

	litBits  = 11 // bits of the literal and length table's index
	distBits = 8
	preBits  = 7 // codes of code lengths are not longer

	// A code that is longer than the index continues in a further table, one
	// for each index. In a complete code two symbols or more share such an
	// index, so that there are half as many tables as symbols at most.
	litTable  = 1<<litBits + maxLit/2<<(maxCode-litBits)
	distTable = 1<<distBits + maxDist/2<<(maxCode-distBits)
)

// An entry of a table tells what the bits of its index begin with:
//
//	bits 0 to 5:   how many bits to consume: those of the code, and extra bits
//	bits 8 to 11:  how many of these are the code
//	bits 16 to 30: a literal; the base of a length or distance, to which the
//	               extra bits are added; or where the further table begins
//	others:        flags
//
// In an entry that leads to a further table, bits 8 to 11 have the bits of that
// one's index.
type entry = uint32

const (
	isLiteral entry = 1 << 31
	isSpecial entry = 1 << 15 // further, end or invalid
	isFurther entry = 1 << 14
	isEnd     entry = 1 << 13 // of the block
	isInvalid entry = 1 << 12

	invalid = isSpecial | isInvalid
)

// The bases and extra bits of lengths and distances: RFC 1951, section 3.2.5.
var (
	lengthBase = [...]uint16{
		3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31,
		35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258,
	}
	lengthExtra = [...]uint8{
		0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2,
		3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
	}
	distBase = [...]uint16{
		1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193,
		257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577,
	}
	distExtra = [...]uint8{
		0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6,
		7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13,
	}
)

// tables are those of a block, and what they are made of.
type tables struct {
	lit   [litTable]entry
	dist  [distTable]entry
	fixed bool // they are those of fixed blocks

	// The entries of symbols, less the bits of their codes.
	litSymbols  [288]entry
	distSymbols [32]entry
	preSymbols  [19]entry
}

func newTables() *tables {
	t := new(tables)
	for i := range t.litSymbols {
		switch {
		case i < 256:
			t.litSymbols[i] = isLiteral | entry(i)<<16
		case i == 256:
			t.litSymbols[i] = isSpecial | isEnd
		case i < maxLit:
			t.litSymbols[i] = entry(lengthBase[i-257])<<16 | entry(lengthExtra[i-257])
		default:
			t.litSymbols[i] = invalid
		}
	}
	for i := range t.distSymbols {
		if i < maxDist {
			t.distSymbols[i] = entry(distBase[i])<<16 | entry(distExtra[i])
		} else {
			t.distSymbols[i] = invalid
		}
	}
	for i := range t.preSymbols {
		t.preSymbols[i] = entry(i) << 16
	}
	return t
}

// setFixed makes t the tables of fixed blocks: RFC 1951, section 3.2.6.
func (t *tables) setFixed() {
	if t.fixed {
		return
	}
	var lengths [288]uint8
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		default:
			lengths[i] = 8
		}
	}
	build(t.lit[:], litBits, lengths[:], t.litSymbols[:])
	for i := range 32 {
		lengths[i] = 5
	}
	build(t.dist[:], distBits, lengths[:32], t.distSymbols[:])
	t.fixed = true
}

// build fills the table with the code that has these lengths: RFC 1951, section
// 3.2.2. It reports false for a code that is neither complete, nor empty, nor
// of one symbol with one bit, as compress/flate does. What the latter two do not
// use is invalid.
func build(table []entry, indexBits int, lengths []uint8, symbols []entry) bool {
	var count, next [maxCode + 1]int
	for _, n := range lengths {
		count[n]++
	}
	count[0] = 0
	code, longest := 0, 0
	for n := 1; n <= maxCode; n++ { // next is an index into sorted
		next[n] = next[n-1] + count[n-1]
		code = code<<1 + count[n]
		if count[n] > 0 {
			longest = n
		}
	}
	left := 1<<maxCode - code
	if left != 0 && longest != 0 && !(longest == 1 && count[1] == 1) {
		return false
	}
	var sorted [288]uint16 // symbols in the order of their codes
	for symbol, n := range lengths {
		if n > 0 {
			sorted[next[n]] = uint16(symbol)
			next[n]++
		}
	}
	// Codes are read from their highest bit on, but the index has the first bit
	// lowest: reversed, a code is the index of all that begin with it. So the
	// table of n bits is twice that of n-1 bits, and in it the codes of n bits.
	code = 0
	rest := sorted[:]
	table[0] = invalid
	for n := 1; n <= indexBits; n++ {
		half := 1 << (n - 1)
		copy(table[half:2*half], table[:half])
		code <<= 1
		for _, symbol := range rest[:count[n]] {
			table[reversed(code, n)] = symbols[symbol] + entry(n)*0x101
			code++
		}
		rest = rest[count[n]:]
	}
	further, furtherBits := 1<<indexBits, longest-indexBits
	for n := indexBits + 1; n <= longest; n++ {
		code <<= 1
		for _, symbol := range rest[:count[n]] {
			index := reversed(code, n)
			first, index := index&(1<<indexBits-1), index>>indexBits
			if index == 0 {
				table[first] = isSpecial | isFurther | entry(further)<<16 | entry(furtherBits)<<8 | entry(indexBits)
				further += 1 << furtherBits
			}
			begin := int(table[first] >> 16)
			for ; index < 1<<furtherBits; index += 1 << (n - indexBits) {
				table[begin+index] = symbols[symbol] + entry(n-indexBits)*0x101
			}
			code++
		}
		rest = rest[count[n]:]
	}
	return true
}

// reversed returns the n bits of code in the opposite order.
func reversed(code, n int) int {
	return int(bits.Reverse16(uint16(code)) >> (16 - n))
}
