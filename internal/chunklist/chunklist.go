// SPDX-License-Identifier: Apache-2.0

// Package chunklist tells the digests of the parts of a blob that is read as it is,
// such as the weights of a model: with them any part can be verified on its own,
// before the rest is there.
//
// A list is made of the whole blob, once, and kept like the index of a layer.
package chunklist

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/bits"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
)

// A list as a document: a magic number, the digest of the blob, its size and that of
// a chunk in bytes, both u64 and little endian, then the sha256 of each chunk, in
// order. All chunks have the same size but the last.
const (
	magic      = "HFBLOBC1"
	headerSize = len(magic) + sha256.Size + 16
)

const (
	// ChunkSize is that of the lists that are made here, in bytes: a fast line carries
	// it in less than a round trip, and a list is a thirty-thousandth of its blob.
	ChunkSize = 1 << 20
	// minChunk and maxChunk bound what is read: a chunk has to fit in memory some times.
	minChunk, maxChunk = 64 << 10, 4 << 20
	// maxChunks bounds memory.
	maxChunks = 2 << 20
	// MaxBytes is how long a document may be.
	MaxBytes = int64(headerSize) + maxChunks*sha256.Size
)

// ErrTooLarge means that a blob has more chunks than a list may have.
var ErrTooLarge = fmt.Errorf("the blob has more than %d chunks", maxChunks)

// List is the digests of a blob's chunks.
type List struct {
	Blob      digest.Digest
	Size      int64 // of the blob, in bytes
	ChunkSize int64
	Chunks    [][sha256.Size]byte
}

// count is how many chunks of a size a blob has.
func count(size, chunk int64) int64 { return (size + chunk - 1) / chunk }

// Encode writes the document.
func (l *List) Encode(w io.Writer) error {
	blob, err := hex.DecodeString(l.Blob.Encoded())
	if err != nil || len(blob) != sha256.Size {
		return fmt.Errorf("writing chunk list of %q: only sha256 is supported", l.Blob)
	}
	head := append([]byte(magic), blob...)
	head = binary.LittleEndian.AppendUint64(head, uint64(l.Size))      //nolint:gosec // not negative
	head = binary.LittleEndian.AppendUint64(head, uint64(l.ChunkSize)) //nolint:gosec // not negative
	buf := bufio.NewWriter(w)
	_, err = buf.Write(head)
	for _, c := range l.Chunks {
		if err == nil {
			_, err = buf.Write(c[:])
		}
	}
	if err = errors.Join(err, buf.Flush()); err != nil {
		return fmt.Errorf("writing chunk list of %s: %w", l.Blob, err)
	}
	return nil
}

// Decode reads the document about a blob. What is not sound, or about another one, is
// [index.ErrInvalid].
func Decode(p []byte, blob digest.Digest, size int64) (*List, error) {
	l, err := decode(p, blob, size)
	if err != nil {
		return nil, fmt.Errorf("chunk list of %s: %w: %w", blob, err, index.ErrInvalid)
	}
	return l, nil
}

func decode(p []byte, blob digest.Digest, size int64) (*List, error) {
	if int64(len(p)) > MaxBytes || len(p) < headerSize || !bytes.HasPrefix(p, []byte(magic)) {
		return nil, fmt.Errorf("%d bytes that are none", len(p))
	}
	l := &List{
		Blob:      digest.NewDigestFromBytes(digest.SHA256, p[len(magic):][:sha256.Size]),
		Size:      int64(binary.LittleEndian.Uint64(p[headerSize-16:])), //nolint:gosec // compared below
		ChunkSize: int64(binary.LittleEndian.Uint64(p[headerSize-8:])),  //nolint:gosec // checked below
	}
	switch {
	case l.Blob != blob || l.Size != size:
		return nil, fmt.Errorf("it is about %s of %d bytes", l.Blob, l.Size)
	case l.Size < 0 || l.ChunkSize < minChunk || l.ChunkSize > maxChunk || bits.OnesCount64(uint64(l.ChunkSize)) != 1:
		return nil, fmt.Errorf("chunks of %d bytes", l.ChunkSize)
	case int64(len(p)-headerSize) != count(size, l.ChunkSize)*sha256.Size:
		return nil, fmt.Errorf("%d bytes of digests for %d chunks", len(p)-headerSize, count(size, l.ChunkSize))
	}
	for rest := p[headerSize:]; len(rest) > 0; rest = rest[sha256.Size:] {
		l.Chunks = append(l.Chunks, [sha256.Size]byte(rest))
	}
	return l, nil
}

// Index describes the blob as a layer that has one file, blob, of everybody's. Its
// table is for a device as long as the blob, which need not end on a block.
func (l *List) Index() *index.Index {
	idx := Tree(l.Size)
	idx.DeviceSize = l.Size
	for i, sum := range l.Chunks {
		at := int64(i) * l.ChunkSize
		n := min(l.ChunkSize, l.Size-at)
		idx.Chunks = append(idx.Chunks, index.Chunk{Offset: at, Size: n, BlobOffset: at, BlobSize: n, Digest: sum})
	}
	return idx
}

// FileName is what the file of [Tree] is called.
const FileName = "blob"

// Tree is the file tree of a blob of so many bytes: one file that everybody may read.
func Tree(size int64) *index.Index {
	return &index.Index{
		Kind: index.Stream, Compression: index.None,
		Inodes: []index.Inode{
			{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Entries: []index.Dirent{{Name: FileName, Inode: 1}}},
			{Mode: unix.S_IFREG | 0o444, Nlink: 1, Size: size},
		},
		DeviceSize: (size + index.BlockSize - 1) / index.BlockSize * index.BlockSize,
	}
}

// Builder makes a list of what is written to it, all of a blob, in order.
type Builder struct {
	whole, chunk hash.Hash
	size         int64
	chunks       [][sha256.Size]byte
}

// NewBuilder returns a builder.
func NewBuilder() *Builder { return &Builder{whole: sha256.New(), chunk: sha256.New()} }

// Write takes the next bytes of the blob.
func (b *Builder) Write(p []byte) (int, error) {
	written := len(p)
	_, _ = b.whole.Write(p) // never fails
	for len(p) > 0 {
		n := min(int64(len(p)), ChunkSize-b.size%ChunkSize)
		_, _ = b.chunk.Write(p[:n])
		p, b.size = p[n:], b.size+n
		if b.size%ChunkSize == 0 {
			if err := b.end(); err != nil {
				return 0, err
			}
		}
	}
	return written, nil
}

// end ends a chunk.
func (b *Builder) end() error {
	if len(b.chunks) >= maxChunks {
		return ErrTooLarge
	}
	b.chunks = append(b.chunks, [sha256.Size]byte(b.chunk.Sum(nil)))
	b.chunk.Reset()
	return nil
}

// Finish returns the list, with the digest that the whole has.
func (b *Builder) Finish() (*List, error) {
	if b.size%ChunkSize != 0 {
		if err := b.end(); err != nil {
			return nil, err
		}
	}
	return &List{
		Blob: digest.NewDigestFromBytes(digest.SHA256, b.whole.Sum(nil)), Size: b.size,
		ChunkSize: ChunkSize, Chunks: b.chunks,
	}, nil
}
