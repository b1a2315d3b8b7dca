// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/holdfast/holdfast/internal/index"
)

// The superblock: fs/erofs/erofs_fs.h. Everything in the first block is fixed
// but for the device table's one slot.
const (
	superOffset  = 1024
	superSize    = 128
	slotSize     = 128 // of a device in the device table
	superMagic   = 0xE0F5E1E2
	blockBits    = 12
	compatSum    = 0x1 // the superblock has a checksum
	compatMtime  = 0x2
	needsDevices = 0x8
	rootNid      = blockSize / nidSize // inodes start in the second block
)

// firstBlock is the block that holds the superblock and the device table.
func (p *plan) firstBlock(uuid []byte) []byte {
	le := binary.LittleEndian
	block := make([]byte, blockSize)
	sb := block[superOffset:]
	le.PutUint32(sb[0:], superMagic)
	le.PutUint32(sb[8:], compatSum|compatMtime)
	sb[12] = blockBits
	le.PutUint16(sb[14:], rootNid)
	le.PutUint64(sb[16:], uint64(len(p.order)))
	le.PutUint32(sb[36:], uint32(p.deviceStart())) //nolint:gosec // checked by place
	copy(sb[48:64], uuid)
	if p.deviceBlocks > 0 {
		le.PutUint32(sb[80:], needsDevices)
		le.PutUint16(sb[86:], 1)                                 // extra devices
		le.PutUint16(sb[88:], (superOffset+superSize)/slotSize)  // where the table starts
		le.PutUint32(sb[superSize+64:], uint32(p.deviceBlocks))  //nolint:gosec // checked by newPlan
		le.PutUint32(sb[superSize+68:], uint32(p.deviceStart())) //nolint:gosec // checked by place
	}
	le.PutUint32(sb[4:], checksum(sb))
	return block
}

// checksum of a superblock and the rest of its block, with the field for the
// checksum zero. The kernel's crc32c does not end with an inversion.
func checksum(sb []byte) uint32 {
	return ^crc32.Checksum(sb, crc32.MakeTable(crc32.Castagnoli))
}

// deviceStart is the block address of the device: behind the image. Files then
// need no index of where their data is: 64 bytes an inode, not 96.
func (p *plan) deviceStart() int64 { return 1 + p.inodeBlocks + p.contentBlocks }

// Device returns where in the addresses of an image its device starts, and the
// size that it needs, both in bytes; 0 if it needs none. The kernel insists
// neither on a device nor on its size: without one, Linux 6.18 takes blocks of
// the image for file data; past the end of one, files fail when they are read.
// The error is [index.ErrInvalid] if r does not begin with a superblock that
// [Write] wrote.
func Device(r io.ReaderAt) (start, size int64, err error) {
	le := binary.LittleEndian
	block := make([]byte, blockSize)
	if _, err := r.ReadAt(block, 0); err != nil && !errors.Is(err, io.EOF) {
		return 0, 0, fmt.Errorf("reading superblock: %w", err)
	}
	sb := block[superOffset:]
	want := le.Uint32(sb[4:])
	le.PutUint32(sb[4:], 0)
	if le.Uint32(sb) != superMagic || checksum(sb) != want {
		return 0, 0, fmt.Errorf("reading superblock: not an image, or damaged: %w", index.ErrInvalid)
	}
	if le.Uint16(sb[86:]) == 0 {
		return 0, 0, nil
	}
	slot := sb[superSize:]
	return int64(le.Uint32(slot[68:])) * blockSize, int64(le.Uint32(slot[64:])) * blockSize, nil
}
