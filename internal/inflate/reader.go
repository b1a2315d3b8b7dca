// SPDX-License-Identifier: Apache-2.0

// Package inflate decompresses gzip (RFC 1952), from its beginning or from a
// place between two blocks, and tells where such places are. It does not
// compress, and does not know what it decompresses.
//
// What always holds: whatever the input, a Reader uses a fixed amount of memory
// (see [NewReader]), returns no byte that it has not decompressed, and gives
// what it has decompressed before it tells of an error or waits for more input,
// unless it is within the header of a further member.
//
// The parts: this file has the buffers between a source and a reader, member.go
// what gzip puts around compressed data, block.go the blocks of deflate (RFC
// 1951), symbols.go what they consist of, huffman.go the tables that tell how
// that is coded. It is much like libdeflate, which explains why this is fast.
package inflate

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// WindowSize is how far back deflate refers to what is already decompressed, in bytes.
const WindowSize = 32 << 10

const (
	inputSize = 64 << 10 // what is asked of a source at once

	// outputSize is what is decompressed at once: little enough to be in the
	// processor's cache when it is summed and copied, and much more than the
	// window, which moves to the front each time.
	outputSize = 128 << 10
	outputEnd  = WindowSize + outputSize // of the part of the buffer that is to be filled

	// plentyInput is more than the header of a block can have: three bits, 14,
	// 19 lengths of three bits, 316 of at most seven and seven more.
	plentyInput = 640
)

// ErrCorrupt is wrapped by the errors about input that is not gzip.
var ErrCorrupt = errors.New("corrupt gzip stream")

// A Point is a place between two blocks, where decompression can begin.
type Point struct {
	In   int64 // offset in the gzip stream of the first byte of which nothing has been used before the point
	Bits uint8 // how many bits of the byte before In, its highest ones, belong to what follows; 0 to 7
	Out  int64 // bytes decompressed before it, of all members together
}

// A Reader decompresses a gzip stream: one or more members, one after the
// other. It must not be used by several goroutines at the same time.
//
// A stream that is not sound gives an error that wraps [ErrCorrupt], one that
// ends early [io.ErrUnexpectedEOF]; an error of the source is returned as it
// is. All come after the data before them, and again at each further call.
// Data is known to be what was compressed only when io.EOF has been reached.
type Reader struct {
	src    io.Reader
	srcErr error // what src ended with
	err    error // what the reader ends with, once all output is taken

	// The input: what is left of the bytes read is input[in:]. Of those before
	// it, nbits bits are in the lowest ones of bits, the next one lowest. There
	// are less than eight, and zeros above them, except while symbols are decoded.
	buffer *[inputSize]byte
	input  []byte // of buffer, from its beginning
	in     int
	read   int64 // bytes that src has given
	bits   uint64
	nbits  uint

	// The output: output[taken:end] is for the caller. What is before end is
	// the window; matches may reach back to start, where the member begins.
	output     *[outputEnd + maxOverrun]byte
	taken, end int
	start      int
	flushed    int64 // bytes decompressed and no longer in output, less the window's

	state  state
	final  bool   // the block is its member's last
	stored int    // bytes left of a stored block
	summed int    // the place in output up to which sum goes
	sum    uint32 // CRC32 of the member so far
	size   uint32 // length of the member so far
	joined bool   // the member has not been decompressed from its beginning
	bits0  uint8  // what Resume has been told
	tables *tables

	scratch [10]byte // a part of a header; here, since on the stack it would not stay there

	spacing int64 // see Points
	at      func(Point, []byte) error
	last    int64
}

// NewReader returns a Reader of the gzip stream that r begins with; r may be
// nil if Reset or Resume come first. It allocates all that the Reader will ever
// use, about 250 KiB.
func NewReader(r io.Reader) *Reader {
	z := &Reader{
		buffer: new([inputSize]byte),
		output: new([outputEnd + maxOverrun]byte),
		tables: newTables(),
	}
	z.Reset(r)
	return z
}

// Reset makes z read the gzip stream that r begins with, as NewReader does,
// and forget all else, points included.
func (z *Reader) Reset(r io.Reader) {
	z.begin(r, nil)
	z.state = atFirstHeader
}

// Resume makes z decompress from a point on. If bits, the point's, is not 0, r
// begins with the byte before Point.In, else at Point.In. The window is what was
// decompressed before the point, at most WindowSize bytes; of a shorter one,
// input that refers to more is corrupt. The checksum and the size of the member
// that the point is in cannot be compared; further members are read as usual.
//
// Points that are asked for afterwards, the first of which is this one, count
// from the beginning of r.
func (z *Reader) Resume(r io.Reader, bits uint8, window []byte) error {
	if bits > 7 {
		return fmt.Errorf("resuming decompression: %d bits of a byte", bits)
	}
	if len(window) > WindowSize {
		return fmt.Errorf("resuming decompression: a window of %d bytes", len(window))
	}
	z.begin(r, window)
	z.state, z.joined, z.bits0 = atPoint, true, bits
	return nil
}

func (z *Reader) begin(r io.Reader, window []byte) {
	*z = Reader{src: r, buffer: z.buffer, output: z.output, tables: z.tables}
	z.start = WindowSize - len(window)
	clear(z.output[:z.start]) // points have zeros in front
	copy(z.output[z.start:], window)
	z.taken, z.end, z.summed = WindowSize, WindowSize, WindowSize
}

// Points asks for points, after Reset or Resume and before the first Read. At is
// called at the first boundary between blocks, which is after the header of the
// first member, and then at each that is more than spacing bytes of output after
// the last point; as long as there is no output, at each. The end of a member
// is none, but the end of the next one's header is. These are the points that
// zran.c, an example of zlib, has (build_index), and with it the zTOC of SOCI
// (generate_zinfo_from_fp).
//
// At is called during Read and WriteTo, ahead of the data that they return. It
// is given the WindowSize bytes before the point, with zeros in front if there
// are less, which are valid until it returns. Its error ends the Reader.
func (z *Reader) Points(spacing int64, at func(p Point, window []byte) error) {
	z.spacing, z.at = spacing, at
}

// InputOffset returns how many bytes of the source have been used for what has
// been decompressed, those that are used in part included. More may have been
// read ahead.
func (z *Reader) InputOffset() int64 {
	return z.read - int64(len(z.input)-z.in) - int64(z.nbits/8)
}

// Read implements [io.Reader]. It returns what there is rather than wait for
// more input.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := z.fill(); err != nil {
		return 0, err
	}
	n := copy(p, z.output[z.taken:z.end])
	z.taken += n
	return n, nil
}

// WriteTo implements [io.WriterTo]: it writes all that is left to w.
func (z *Reader) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		if err := z.fill(); err == io.EOF { //nolint:errorlint // as Read returns it
			return written, nil
		} else if err != nil {
			return written, err
		}
		n, err := w.Write(z.output[z.taken:z.end])
		written += int64(n)
		z.taken += n
		if err != nil {
			return written, err
		}
		if z.taken < z.end {
			return written, io.ErrShortWrite
		}
	}
}

// fill sees to it that there is output to take, or returns why there will be none.
func (z *Reader) fill() error {
	for z.taken == z.end {
		if z.err != nil {
			return z.err
		}
		if z.end >= outputEnd {
			z.slide()
		}
		z.err = z.decompress()
		z.addUp()
	}
	return nil
}

// slide moves the window to the front of output, all of which is taken.
func (z *Reader) slide() {
	by := z.end - WindowSize
	copy(z.output[:], z.output[by:z.end])
	z.flushed += int64(by)
	z.start = max(0, z.start-by)
	z.taken, z.end, z.summed = WindowSize, WindowSize, WindowSize
}

// addUp brings sum and size up to date.
func (z *Reader) addUp() {
	fresh := z.output[z.summed:z.end]
	z.sum = crc32.Update(z.sum, crc32.IEEETable, fresh)
	z.size += uint32(len(fresh))
	z.summed = z.end
}

// decompress fills output. It returns early, without an error, rather than
// wait for input while there is some output.
func (z *Reader) decompress() error {
	for z.end < outputEnd {
		if len(z.input)-z.in < plentyInput && z.srcErr == nil && z.end > z.taken {
			return nil
		}
		if err := z.step(); err == errShort { //nolint:errorlint // ours
			if z.end > z.taken {
				return nil
			}
			if !z.more() {
				return z.ended()
			}
		} else if err != nil {
			return err
		}
	}
	return nil
}

// more reads from the source, once if that gives something, and reports whether
// there is more input now.
func (z *Reader) more() bool {
	kept := copy(z.buffer[:], z.input[z.in:])
	z.input, z.in = z.buffer[:kept], 0
	for range 100 { // as often as bufio tries
		if z.srcErr != nil {
			return false
		}
		var n int
		n, z.srcErr = z.src.Read(z.buffer[kept:])
		if n > 0 {
			z.input = z.buffer[:kept+n]
			z.read += int64(n)
			return true
		}
	}
	if z.srcErr == nil {
		z.srcErr = io.ErrNoProgress
	}
	return false
}

// ended is the error of input that ends where it must not.
func (z *Reader) ended() error {
	if z.srcErr == io.EOF { //nolint:errorlint // as Read returns it
		return io.ErrUnexpectedEOF
	}
	return z.srcErr
}

// boundary tells of a point, if it is time for one.
func (z *Reader) boundary() error {
	if z.at == nil {
		return nil
	}
	out := z.flushed + int64(z.end-WindowSize)
	if out != 0 && out-z.last <= z.spacing {
		return nil
	}
	z.last = out
	p := Point{In: z.InputOffset(), Bits: uint8(z.nbits % 8), Out: out}
	return z.at(p, z.output[z.end-WindowSize:z.end:z.end])
}
