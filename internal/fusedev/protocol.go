// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// The FUSE protocol as far as this package speaks it. Names and layouts follow
// include/uapi/linux/fuse.h of the kernel; integers are in host byte order.

type opcode uint32

const (
	opLookup      opcode = 1
	opForget      opcode = 2
	opGetattr     opcode = 3
	opOpen        opcode = 14
	opRead        opcode = 15
	opStatfs      opcode = 17
	opRelease     opcode = 18
	opInit        opcode = 26
	opOpendir     opcode = 27
	opReaddir     opcode = 28
	opReleasedir  opcode = 29
	opInterrupt   opcode = 36
	opDestroy     opcode = 38
	opBatchForget opcode = 42
)

const (
	protoMajor    = 7
	protoMinMinor = 31 // Linux 5.4; younger than every kernel with EROFS chunks
	protoMaxMinor = 41 // newest whose INIT layout is known here

	flagAsyncRead     = 1 << 0
	flagAsyncDIO      = 1 << 15
	flagParallelDirop = 1 << 18
	flagMaxPages      = 1 << 22
	flagInitExt       = 1 << 30
	flagHasResend     = 1 << 39

	openDirectIO = 1 << 0

	notifyInvalInode = 2
	notifyResend     = 7

	// uniqueResend marks the id of a request that the kernel hands out again.
	uniqueResend = 1 << 63
)

const (
	inHeaderSize  = 40
	outHeaderSize = 16
	attrSize      = 88
	initInSize    = 16 // up to and including flags; flags2 follows
	initOutSize   = 64
	readInSize    = 40
	direntSize    = 24

	// requestSize is the size of the buffer requests are read into: the least
	// that the kernel accepts, and more than any request served here needs.
	requestSize = 8192
	// maxRead is the largest READ, in bytes. The kernel is told so twice, as
	// max_read and as max_pages.
	maxRead = 1 << 20
	// minWrite is the smallest max_write the kernel takes. Nothing is written.
	minWrite = 4096
)

// request is one decoded request. It holds no reference to the read buffer.
type request struct {
	op     opcode
	unique uint64
	node   uint64

	name   string // LOOKUP
	target uint64 // INTERRUPT: unique of the request meant
	offset uint64 // READ, READDIR
	size   uint32 // READ, READDIR
}

type initRequest struct {
	major, minor, readahead uint32
	flags                   uint64
}

// decodeRequest decodes one request as read from the kernel. If the header can
// be read, the request is returned with the error, so that it can be answered.
func decodeRequest(p []byte) (request, error) {
	if len(p) < inHeaderSize {
		return request{}, fmt.Errorf("decoding request: %d bytes are less than a header", len(p))
	}
	ne := binary.NativeEndian
	r := request{
		op:     opcode(ne.Uint32(p[4:])),
		unique: ne.Uint64(p[8:]),
		node:   ne.Uint64(p[16:]),
	}
	if n := ne.Uint32(p); uint64(n) != uint64(len(p)) {
		return r, fmt.Errorf("decoding request %d: header says %d bytes, got %d", r.unique, n, len(p))
	}
	body := p[inHeaderSize:]
	need := 0
	switch r.op {
	case opInit:
		need = initInSize
	case opRead, opReaddir:
		need = readInSize
	case opInterrupt:
		need = 8
	case opLookup:
		need = 1
	}
	if len(body) < need {
		return r, fmt.Errorf("decoding request %d: operation %d has a body of %d bytes", r.unique, r.op, len(body))
	}
	switch r.op {
	case opRead, opReaddir:
		r.offset, r.size = ne.Uint64(body[8:]), ne.Uint32(body[16:])
	case opInterrupt:
		r.target = ne.Uint64(body)
	case opLookup:
		name, _, _ := bytes.Cut(body, []byte{0})
		r.name = string(name)
	}
	return r, nil
}

// decodeInit decodes the body of an INIT that decodeRequest has accepted.
func decodeInit(p []byte) initRequest {
	ne := binary.NativeEndian
	in := initRequest{
		major:     ne.Uint32(p),
		minor:     ne.Uint32(p[4:]),
		readahead: ne.Uint32(p[8:]),
		flags:     uint64(ne.Uint32(p[12:])),
	}
	if in.flags&flagInitExt != 0 && len(p) >= initInSize+4 {
		in.flags |= uint64(ne.Uint32(p[16:])) << 32
	}
	return in
}

// appendHeader appends the header of a reply whose length is patched in by
// [finish]. errno is 0 or positive.
func appendHeader(b []byte, unique uint64, errno unix.Errno) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint32(b, 0)
	b = ne.AppendUint32(b, uint32(-int32(errno)))
	return ne.AppendUint64(b, unique)
}

// finish sets the length of the message that b holds.
func finish(b []byte) []byte {
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

// appendNotify appends the header of a notification, which has the code in the
// place of the error and 0 as its unique.
func appendNotify(b []byte, code uint32) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint32(b, 0)
	b = ne.AppendUint32(b, code)
	return ne.AppendUint64(b, 0)
}

func appendInit(b []byte, in initRequest, flags uint64) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint32(b, protoMajor)
	b = ne.AppendUint32(b, min(in.minor, protoMaxMinor))
	b = ne.AppendUint32(b, in.readahead)
	b = ne.AppendUint32(b, uint32(flags))
	b = ne.AppendUint16(b, maxBackground)
	b = ne.AppendUint16(b, maxBackground*3/4) // congestion threshold, as the kernel's default ratio
	b = ne.AppendUint32(b, minWrite)
	b = ne.AppendUint32(b, 1) // time granularity, nanoseconds
	b = ne.AppendUint16(b, uint16(max(1, maxRead/unix.Getpagesize())))
	b = ne.AppendUint16(b, 0) // map alignment
	b = ne.AppendUint32(b, uint32(flags>>32))
	return append(b, make([]byte, initOutSize-36)...)
}

// attributes is what GETATTR tells about a node.
type attributes struct {
	ino  uint64
	size int64
	mode uint32
}

func appendAttr(b []byte, a attributes) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint64(b, a.ino)
	b = ne.AppendUint64(b, uint64(a.size))
	b = ne.AppendUint64(b, (uint64(a.size)+511)/512)
	b = append(b, make([]byte, 3*8+3*4)...) // times
	b = ne.AppendUint32(b, a.mode)
	b = ne.AppendUint32(b, 1)            // links
	b = append(b, make([]byte, 3*4)...)  // uid, gid, rdev
	b = ne.AppendUint32(b, blockSize)    // preferred I/O size
	return append(b, make([]byte, 4)...) // flags
}

// appendAttrOut and appendEntryOut let the kernel keep what they say for good:
// the attributes of a device never change, and its removal invalidates them.
func appendAttrOut(b []byte, a attributes) []byte {
	b = binary.NativeEndian.AppendUint64(b, validSeconds)
	b = append(b, make([]byte, 8)...)
	return appendAttr(b, a)
}

func appendEntryOut(b []byte, a attributes) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint64(b, a.ino)
	b = ne.AppendUint64(b, 0) // generation
	b = ne.AppendUint64(b, validSeconds)
	b = ne.AppendUint64(b, validSeconds)
	b = append(b, make([]byte, 8)...)
	return appendAttr(b, a)
}

func appendOpenOut(b []byte, flags uint32) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint64(b, 0) // fh: there is no state per open file
	b = ne.AppendUint32(b, flags)
	return ne.AppendUint32(b, 0)
}

func appendStatfsOut(b []byte, files int) []byte {
	ne := binary.NativeEndian
	b = append(b, make([]byte, 3*8)...) // blocks: none used, none free
	b = ne.AppendUint64(b, uint64(files))
	b = ne.AppendUint64(b, 0)
	b = ne.AppendUint32(b, blockSize)
	b = ne.AppendUint32(b, 255) // name length
	b = ne.AppendUint32(b, blockSize)
	return append(b, make([]byte, 4+6*4)...)
}

// appendDirent appends one directory entry. Its offset is the node id, so a
// listing that goes on later, even in another process, needs no memory.
func appendDirent(b []byte, ino uint64, name string) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint64(b, ino)
	b = ne.AppendUint64(b, ino)
	b = ne.AppendUint32(b, uint32(len(name)))
	b = ne.AppendUint32(b, unix.S_IFREG>>12)
	b = append(b, name...)
	return append(b, make([]byte, direntLen(name)-direntSize-len(name))...)
}

// direntLen is the size of a directory entry, which is padded to 8 bytes.
func direntLen(name string) int { return (direntSize + len(name) + 7) &^ 7 }
