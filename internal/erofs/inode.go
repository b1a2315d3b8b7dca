// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"bufio"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
)

// writeInodes writes the inodes with what follows each of them, from the second
// block of the image on.
func (p *plan) writeInodes(out *bufio.Writer) error {
	var record []byte
	at := int64(blockSize)
	for i, node := range p.order {
		s, err := p.shapeOf(node)
		if err != nil {
			return err // cannot be: place has seen the same inode
		}
		start := int64(p.nids[node]) * nidSize
		if err := writeZeros(out, start-at); err != nil {
			return err
		}
		at = start + s.size()
		record = p.appendInode(record[:0], node, s, uint32(i)+1) //nolint:gosec // bounded by newPlan
		if _, err := out.Write(record); err != nil {
			return err
		}
	}
	return writeZeros(out, alignUp(at, blockSize)-at)
}

// appendInode appends an inode and all that follows it to b, which is empty.
func (p *plan) appendInode(b []byte, node int32, s shape, serial uint32) []byte {
	in := p.inode(node)
	le := binary.LittleEndian
	b = le.AppendUint16(b, s.format)
	b = le.AppendUint16(b, xattrCount(s.xattrs))
	b = le.AppendUint16(b, uint16(in.Mode)) //nolint:gosec // st_mode has 16 bits
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, uint64(s.data)) //nolint:gosec // not negative
	b = le.AppendUint32(b, p.place32(node, s))
	b = le.AppendUint32(b, serial)
	b = le.AppendUint32(b, in.UID)
	b = le.AppendUint32(b, in.GID)
	b = le.AppendUint64(b, uint64(in.ModTime.Unix()))       //nolint:gosec // two's complement, as the kernel reads it
	b = le.AppendUint32(b, uint32(in.ModTime.Nanosecond())) //nolint:gosec // below 1e9
	b = le.AppendUint32(b, in.Nlink)
	b = padTo(b, inodeSize)
	b = appendXattrs(b, in.Xattrs)
	switch {
	case s.inline > 0 && isDir(in):
		var last []dirent
		for run := range directoryBlocks(p.entries(node)) {
			last = run
		}
		b = p.appendDirents(b, last)
	case s.inline > 0:
		b = append(b, in.Target...)
	}
	return b
}

// xattrCount is the size of attributes as an inode stores it: in units after
// the header, which counts as one.
func xattrCount(size int) uint16 {
	if size == 0 {
		return 0
	}
	return uint16((size-xattrHeader)/xattrAlign + 1) //nolint:gosec // checked by xattrSize
}

// place32 is the field of an inode that says where its data is, or what device
// it is.
func (p *plan) place32(node int32, s shape) uint32 {
	in := p.inode(node)
	switch {
	case s.device:
		return uint32(p.deviceStart() + in.Offset/blockSize) //nolint:gosec // checked by place
	case s.contentBlocks() > 0:
		return uint32(1 + p.inodeBlocks + p.blocks[node]) //nolint:gosec // checked by place
	case in.Mode&unix.S_IFMT == unix.S_IFCHR, in.Mode&unix.S_IFMT == unix.S_IFBLK:
		return in.Minor&0xff | in.Major<<8 | in.Minor&^0xff<<12 // new_encode_dev
	}
	return 0
}

// writeContent writes the content of directories and symbolic links that does
// not lie with their inodes.
func (p *plan) writeContent(out *bufio.Writer) error {
	for _, node := range p.content {
		s, err := p.shapeOf(node)
		if err != nil {
			return err // cannot be: place has seen the same inode
		}
		if err := p.writeBlocks(out, node, p.inode(node), s.contentBlocks()); err != nil {
			return err
		}
	}
	return nil
}

func (p *plan) writeBlocks(out *bufio.Writer, node int32, in *index.Inode, n int64) error {
	if !isDir(in) {
		_, err := out.Write(padTo([]byte(in.Target), blockSize))
		return err
	}
	block := make([]byte, 0, blockSize)
	for run := range directoryBlocks(p.entries(node)) {
		if n--; n < 0 {
			return nil // the last block lies with the inode
		}
		block = padTo(p.appendDirents(block[:0], run), blockSize)
		if _, err := out.Write(block); err != nil {
			return err
		}
	}
	return nil
}

// writeZeros writes less than a block of zeros.
func writeZeros(out *bufio.Writer, n int64) error {
	for range n {
		if err := out.WriteByte(0); err != nil {
			return err
		}
	}
	return nil
}
