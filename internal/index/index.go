// SPDX-License-Identifier: Apache-2.0

// Package index is the model of what a layer holds: its file tree, and where
// the bytes of its files lie in the layer's blob.
//
// Decoders (packages estargz, zstdchunked, soci, stream) feed what they read to a
// [Builder]; it is the one place where hostile input is checked, so an [Index]
// that exists is sound: every path lies inside the tree, every chunk inside the
// blob, every file is covered by its chunks without gap or overlap, and
// whiteouts have become what overlayfs expects.
//
// The tree is the one that a normal pull makes of the layer, down to what
// containers/storage does with odd tar entries. Only times that extraction takes
// from the clock (of whiteouts and of directories that are not described) are
// the epoch here.
//
// The tree goes to an EROFS image (package erofs), the chunks to a [Table] on
// disk. An Index is only held while a layer is prepared.
package index

import (
	"crypto/sha256"
	"io"
	"time"
)

// BlockSize is the alignment of files in a device, in bytes: the block size of
// the EROFS image that refers to it.
const BlockSize = 4096

// Kind says what an index was read from.
type Kind string

// The kinds of index.
const (
	EStargz     Kind = "estargz"
	ZstdChunked Kind = "zstd:chunked"
	SOCI        Kind = "soci"
	Stream      Kind = "stream" // built by reading the whole layer
)

// Compression is how the chunks of a blob are compressed.
type Compression uint8

// The compressions of a chunk. The values are stored in a [Table].
const (
	None Compression = 0
	Gzip Compression = 1
	Zstd Compression = 2
)

// Index is a sound description of one layer. It is immutable.
type Index struct {
	Kind        Kind
	Compression Compression
	// Inodes holds every file system object once, however many names it has.
	// Inodes[0] is the root directory; a directory comes before the directories
	// in it.
	Inodes []Inode
	// RootImplied means that the layer does not describe its root directory. What
	// Inodes[0] holds then is right for a base layer; a layer on top of another
	// has the mode and owner of that one's root.
	RootImplied bool
	// Chunks are sorted by Offset; what no chunk covers reads as zeros.
	Chunks []Chunk
	// Spans are sorted; if there are any, each chunk lies in the one that has its
	// BlobOffset, and has no digest.
	Spans []Span
	// Windows holds what gzip spans refer to: see [Span]. It must be read before
	// what the index was made of is closed.
	Windows io.ReaderAt
	// DeviceSize is the length of the device in bytes, a multiple of [BlockSize].
	DeviceSize int64
	// Landmark is the offset in the blob up to which an eStargz image asks for
	// its content to be fetched at once; 0 if it does not ask.
	Landmark int64
}

// Inode is a file system object.
type Inode struct {
	// Mode is st_mode as in stat(2): type and permissions, setuid, setgid, sticky.
	Mode    uint32
	UID     uint32
	GID     uint32
	ModTime time.Time
	// Nlink is the link count as a file system reports it.
	Nlink uint32
	// Major and Minor are the number of a device node.
	Major, Minor uint32
	// Size is the length of a regular file, in bytes.
	Size int64
	// Offset is where a regular file's data starts in the device, a multiple of
	// [BlockSize]. It means nothing if Size is 0.
	Offset int64
	// Target is what a symbolic link points to, verbatim.
	Target string
	// Xattrs are sorted by name.
	Xattrs []Xattr
	// Entries are the names in a directory, sorted bytewise, without "." and "..".
	Entries []Dirent
}

// Dirent is a name in a directory.
type Dirent struct {
	Name  string
	Inode int32 // index into Index.Inodes
}

// Xattr is an extended attribute with its full name ("security.capability").
type Xattr struct {
	Name  string
	Value string
}

// Chunk is the smallest range of a device that can be fetched and verified.
type Chunk struct {
	// Offset and Size place the chunk in the device, uncompressed.
	Offset int64
	Size   int64
	// BlobOffset and BlobSize are the bytes to fetch: a frame that can be
	// decompressed on its own. The frame may hold more than this chunk, and more
	// than any chunk (tar headers). BlobSize is an upper bound: it may reach past
	// the end of the frame.
	BlobOffset int64
	BlobSize   int64
	// InnerOffset is where the chunk starts in the decompressed frame.
	InnerOffset int64
	// Digest is the sha256 of the uncompressed chunk; zero if its [Span] has one.
	Digest [sha256.Size]byte
}

// End is the offset in the device just after the chunk.
func (c Chunk) End() int64 { return c.Offset + c.Size }
