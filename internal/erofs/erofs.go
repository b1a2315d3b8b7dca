// SPDX-License-Identifier: Apache-2.0

// Package erofs writes the metadata of a layer as an image of EROFS, the
// kernel's read-only file system. It does not write file data: that lies in the
// layer's device, which the image refers to as its one extra device and which is
// given to the kernel when the image is mounted.
//
// The root directory of an image holds
//
//	diff/          the layer's tree
//	<name>         a symbolic link to . , under a name of the caller's choice
//	l/x            a symbolic link to ../<name>/diff
//	link           a symbolic link to ../link
//	lower          a symbolic link to ../lower
//	lower-layers   a symbolic link to ../lower-layers
//	empty/         an empty directory
//	merged/        another one
//
// so that one mount serves as a layer's files, as the link by which older
// versions of containers/storage name them in a mount's options, and, next to
// three files that lie beside the mount, as a layer's whole directory, which
// newer versions clone and id-map: see package imagestore, also for the name.
// Podman 4 mounts a layer on its merged to compare it with another, above empty if
// it is a base.
//
// An image is three runs of blocks: the superblock; the inodes, each followed
// by its extended attributes and, where it fits, its content; and the content
// of directories and links that does not. Inodes lie in breadth-first order, so
// that those of one directory's files are neighbours: listing a tree with all
// attributes reads each block once. The same index always gives the same bytes.
//
// The format is that of Linux, fs/erofs/erofs_fs.h; nothing in an image needs a
// kernel newer than 5.16.
package erofs

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/index"
)

// ErrUnsupported means that EROFS cannot hold what the index describes.
var ErrUnsupported = errors.New("not supported by EROFS")

// The layout on disk.
const (
	blockSize = index.BlockSize
	maxBlocks = math.MaxUint32
	nidSize   = 32 // an inode's number is its place in these units
)

// Name is the name of the image of the layer with this blob, and of the directory
// that it is mounted at. It is short, since the mount options of a container
// name every layer.
func Name(blob digest.Digest) string { return blob.Encoded()[:32] }

// Write writes the image of a layer under a name, starting at offset 0 of w. The superblock
// is written last: an image that was not finished cannot be mounted. The caller
// makes the file durable.
//
// The error is [ErrUnsupported] if the index has something that EROFS lacks.
func Write(w io.WriteSeeker, idx *index.Index, name string) error {
	p, err := newPlan(idx, name)
	if err != nil {
		return fmt.Errorf("laying out EROFS image: %w", err)
	}
	if err := p.write(w); err != nil {
		return fmt.Errorf("writing EROFS image: %w", err)
	}
	return nil
}

func (p *plan) write(w io.WriteSeeker) error {
	if _, err := w.Seek(blockSize, io.SeekStart); err != nil {
		return err
	}
	sum := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, sum), 1<<16)
	if err := p.writeInodes(out); err != nil {
		return err
	}
	if err := p.writeContent(out); err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	if _, err := w.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err := w.Write(p.firstBlock(p.identify(sum)))
	return err
}

// identify derives the UUID of the image. Overlayfs tells its lower layers
// apart by UUID, so layers that differ in nothing but file data need their own.
func (p *plan) identify(sum hash.Hash) []byte {
	for i := range p.idx.Chunks {
		sum.Write(p.idx.Chunks[i].Digest[:])
	}
	id := sum.Sum(nil)[:16]
	id[6] = id[6]&0x0f | 0x80 // RFC 9562, version 8: of our own making
	id[8] = id[8]&0x3f | 0x80
	return id
}
