// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"encoding/binary"
	"iter"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// direntSize is the fixed part of a directory entry. A block of a directory has
// all fixed parts first, then the names; a name ends where the next begins.
const direntSize = 12

// dirent is a name in a directory, with the node it names.
type dirent struct {
	name string
	node int32
}

// entries returns what a directory holds, "." and ".." included, in the order
// of bytes that the kernel searches by. The result is valid until the next call.
func (p *plan) entries(dir int32) []dirent {
	all := p.scratch[:0]
	for _, e := range p.inode(dir).Entries {
		all = append(all, dirent{e.Name, layerRoot + e.Inode})
	}
	for _, e := range []dirent{{".", dir}, {"..", p.parents[dir]}} {
		at, _ := slices.BinarySearchFunc(all, e, func(x, y dirent) int { return strings.Compare(x.name, y.name) })
		all = slices.Insert(all, at, e)
	}
	p.scratch = all
	return all
}

// directoryBlocks yields runs of entries that fill a block each, with the bytes
// they take.
func directoryBlocks(all []dirent) iter.Seq2[[]dirent, int] {
	return func(yield func([]dirent, int) bool) {
		for len(all) > 0 {
			n, used := 0, 0
			for n < len(all) && used+direntSize+len(all[n].name) <= blockSize {
				used += direntSize + len(all[n].name)
				n++
			}
			if !yield(all[:n], used) {
				return
			}
			all = all[n:]
		}
	}
}

// directorySize is the length of a directory that holds the entries.
func directorySize(all []dirent) int64 {
	var size int64
	for _, used := range directoryBlocks(all) {
		size = alignUp(size, blockSize) + int64(used)
	}
	return size
}

// appendDirents appends one block of a directory, without padding.
func (p *plan) appendDirents(b []byte, run []dirent) []byte {
	nameOffset := len(run) * direntSize
	for _, e := range run {
		b = binary.LittleEndian.AppendUint64(b, uint64(p.nids[e.node]))
		b = binary.LittleEndian.AppendUint16(b, uint16(nameOffset)) //nolint:gosec // within a block
		b = append(b, fileType(p.inode(e.node).Mode), 0)
		nameOffset += len(e.name)
	}
	for _, e := range run {
		b = append(b, e.name...)
	}
	return b
}

// fileType is the kernel's FT_* for a mode: include/linux/fs_types.h.
func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	}
	return 0
}
