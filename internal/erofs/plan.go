// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
)

// The inodes above the layer's own. Inode i of the index is node layerRoot+i.
const (
	rootNode int32 = iota // holds diff, l and the rest
	linkDir               // holds x
	linkNode              // points to the root's name and on to diff
	linkOut               // this and the next two point to files beside the mount
	lowerOut
	layersOut
	emptyDir
	mergedDir // is empty, too
	selfNode  // points to ., under the image's name
	layerRoot // diff, the root of the layer
)

// plan says where everything in an image goes. Besides the index it keeps a few
// bytes an inode, never a second copy of the tree.
type plan struct {
	idx *index.Index
	top [layerRoot]index.Inode

	order   []int32 // nodes in the order of their inodes
	nids    []uint32
	parents []int32 // of directories
	content []int32 // nodes with content outside of their inode, in its order
	blocks  map[int32]int64

	inodeBlocks, contentBlocks, deviceBlocks int64

	scratch []dirent
}

func newPlan(idx *index.Index, name string) (*plan, error) {
	if badName(name) || slices.Contains(reserved(), name) {
		return nil, fmt.Errorf("image name %q: %w", name, index.ErrInvalid)
	}
	if len(idx.Inodes) == 0 || !isDir(&idx.Inodes[0]) || len(idx.Inodes) > math.MaxInt32-int(layerRoot) {
		return nil, fmt.Errorf("index of %d inodes: %w", len(idx.Inodes), index.ErrInvalid)
	}
	if idx.DeviceSize%blockSize != 0 || idx.DeviceSize < 0 || idx.DeviceSize/blockSize > maxBlocks {
		return nil, fmt.Errorf("device of %d bytes: %w", idx.DeviceSize, ErrUnsupported)
	}
	n := len(idx.Inodes) + int(layerRoot)
	p := &plan{
		idx: idx, top: topInodes(name),
		order: make([]int32, 1, n), nids: make([]uint32, n), parents: make([]int32, n),
		blocks:       map[int32]int64{},
		deviceBlocks: idx.DeviceSize / blockSize,
	}
	return p, p.place()
}

// topInodes are the image's own. They have no time but that of the epoch, so
// that images of equal layers are equal.
func topInodes(name string) [layerRoot]index.Inode {
	epoch := time.Unix(0, 0)
	symlink := func(target string) index.Inode {
		return index.Inode{Mode: unix.S_IFLNK | 0o777, Nlink: 1, ModTime: epoch, Target: target}
	}
	top := [layerRoot]index.Inode{
		rootNode: {Mode: unix.S_IFDIR | 0o755, Nlink: 6, ModTime: epoch},
		linkDir: {
			Mode: unix.S_IFDIR | 0o755, Nlink: 2, ModTime: epoch,
			Entries: []index.Dirent{{Name: "x", Inode: linkNode - layerRoot}},
		},
		linkNode:  symlink("../" + name + "/diff"),
		linkOut:   symlink("../link"),
		lowerOut:  symlink("../lower"),
		layersOut: symlink("../lower-layers"),
		emptyDir:  {Mode: unix.S_IFDIR | 0o755, Nlink: 2, ModTime: epoch},
		mergedDir: {Mode: unix.S_IFDIR | 0o755, Nlink: 2, ModTime: epoch},
		selfNode:  symlink("."),
	}
	root := []index.Dirent{{Name: name, Inode: selfNode - layerRoot}}
	for i, node := range []int32{layerRoot, emptyDir, linkDir, linkOut, lowerOut, layersOut, mergedDir} {
		root = append(root, index.Dirent{Name: reserved()[i], Inode: node - layerRoot})
	}
	slices.SortFunc(root, func(a, b index.Dirent) int { return cmp.Compare(a.Name, b.Name) })
	top[rootNode].Entries = root
	return top
}

// reserved are the names in an image's root beside its own.
func reserved() []string {
	return []string{"diff", "empty", "l", "link", "lower", "lower-layers", "merged"}
}

func (p *plan) inode(node int32) *index.Inode {
	if node < layerRoot {
		return &p.top[node]
	}
	return &p.idx.Inodes[node-layerRoot]
}

// place walks the tree breadth first and gives each inode its place when it is
// first met; further names of it are hard links.
func (p *plan) place() error {
	at := int64(blockSize)
	for i := 0; i < len(p.order); i++ {
		node := p.order[i]
		in := p.inode(node)
		s, err := p.shapeOf(node)
		if err != nil {
			return fmt.Errorf("inode %d: %w", node-layerRoot, err)
		}
		at = s.fit(at)
		if at/nidSize >= queued {
			return fmt.Errorf("image of more than %d bytes: %w", at, ErrUnsupported)
		}
		p.nids[node] = uint32(at / nidSize) //nolint:gosec // just checked
		at += s.size()
		if n := s.contentBlocks(); n > 0 {
			p.blocks[node] = p.contentBlocks
			p.content = append(p.content, node)
			p.contentBlocks += n
		}
		if err := p.enqueue(node, in); err != nil {
			return fmt.Errorf("directory %d: %w", node-layerRoot, err)
		}
	}
	p.inodeBlocks = (at+blockSize-1)/blockSize - 1
	if p.deviceStart()+p.deviceBlocks > maxBlocks {
		return fmt.Errorf("image of %d blocks: %w", p.inodeBlocks+p.contentBlocks+1, ErrUnsupported)
	}
	return nil
}

// queued marks a node in plan.nids that is in the order but has no place yet.
const queued = math.MaxUint32

func (p *plan) enqueue(dir int32, in *index.Inode) error {
	for i, e := range in.Entries {
		if i > 0 && cmp.Compare(in.Entries[i-1].Name, e.Name) >= 0 {
			return fmt.Errorf("entry %q is out of order: %w", e.Name, index.ErrInvalid)
		}
		if int(e.Inode) >= len(p.idx.Inodes) || e.Inode < 0 && dir >= layerRoot || badName(e.Name) {
			return fmt.Errorf("entry %q for inode %d: %w", e.Name, e.Inode, index.ErrInvalid)
		}
		node := layerRoot + e.Inode
		isNew := p.nids[node] == 0
		if !isNew && isDir(p.inode(node)) {
			return fmt.Errorf("entry %q is a second name of a directory: %w", e.Name, index.ErrInvalid)
		}
		if isNew {
			p.nids[node] = queued
			p.parents[node] = dir
			p.order = append(p.order, node)
		}
	}
	return nil
}

func badName(name string) bool {
	return name == "" || name == "." || name == ".." || len(name) > unix.NAME_MAX || strings.ContainsAny(name, "/\x00")
}

func isDir(in *index.Inode) bool { return in.Mode&unix.S_IFMT == unix.S_IFDIR }

// shape is what an inode takes up in an image.
type shape struct {
	format uint16 // layout of the data, with the bit of 64-byte inodes
	xattrs int    // bytes of extended attributes after the inode
	data   int64  // bytes of content
	inline int    // of these, bytes that follow the attributes
	device bool   // the content is in the device
}

// The layouts of an inode's data.
const (
	extended   = 1 // 64-byte inode
	flatPlain  = 0<<1 | extended
	flatInline = 2<<1 | extended
	inodeSize  = 64
)

func (p *plan) shapeOf(node int32) (shape, error) {
	in := p.inode(node)
	n, err := xattrSize(in.Xattrs)
	if err != nil {
		return shape{}, err
	}
	s := shape{format: flatPlain, xattrs: n}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if in.Size == 0 {
			return s, nil
		}
		if in.Offset%blockSize != 0 || in.Offset < 0 || in.Size < 0 || in.Offset > p.idx.DeviceSize || in.Size > p.idx.DeviceSize-in.Offset {
			return shape{}, fmt.Errorf("data at %d+%d in a device of %d bytes: %w", in.Offset, in.Size, p.idx.DeviceSize, index.ErrInvalid)
		}
		s.data, s.device = in.Size, true
	case unix.S_IFDIR:
		s.setContent(directorySize(p.entries(node)))
	case unix.S_IFLNK:
		if in.Target == "" || len(in.Target) >= unix.PathMax {
			return shape{}, fmt.Errorf("symbolic link with a target of %d bytes: %w", len(in.Target), index.ErrInvalid)
		}
		s.setContent(int64(len(in.Target)))
	case unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return shape{}, fmt.Errorf("file type %#o: %w", in.Mode&unix.S_IFMT, ErrUnsupported)
	}
	return s, nil
}

// setContent keeps the last, incomplete block of content with the inode if a
// block has room for both: the kernel wants inode, attributes and link target in
// one block (fs/erofs/inode.c, erofs_fill_symlink), and one read brings all.
func (s *shape) setContent(size int64) {
	s.data = size
	tail := int(size % blockSize)
	if tail > 0 && inodeSize+s.xattrs+tail <= blockSize {
		s.format, s.inline = flatInline, tail
	}
}

// fit returns the first place at or after offset where the inode can be.
func (s shape) fit(offset int64) int64 {
	whole := int64(inodeSize) // what must not cross the end of a block
	if s.inline > 0 {
		whole = s.size()
	}
	offset = alignUp(offset, nidSize)
	if offset%blockSize+whole > blockSize {
		offset = alignUp(offset, blockSize)
	}
	return offset
}

// size is the length of the inode with what follows it.
func (s shape) size() int64 {
	return int64(inodeSize + s.xattrs + s.inline)
}

// contentBlocks is the number of blocks that the image has for the content.
func (s shape) contentBlocks() int64 {
	if s.device {
		return 0
	}
	return (s.data - int64(s.inline) + blockSize - 1) / blockSize
}

func alignUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
