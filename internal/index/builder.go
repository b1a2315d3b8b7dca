// SPDX-License-Identifier: Apache-2.0

package index

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits bounds what an index may hold. Real layers stay far below the
// defaults; beyond them the runtime's normal pull handles the layer.
type Limits struct {
	Entries    int   // files, directories and links
	Chunks     int   // chunks of all files
	ChunkBytes int64 // uncompressed bytes of one chunk
	Text       int64 // bytes of names, link targets and extended attributes
	Depth      int   // directories above a file
	FileBytes  int64 // uncompressed bytes of all files
}

// DefaultLimits returns the limits that every decoder uses.
func DefaultLimits() Limits {
	return Limits{
		Entries:    400_000,
		Chunks:     2_000_000,
		ChunkBytes: 64 << 20,
		Text:       64 << 20,
		Depth:      256,
		FileBytes:  4 << 40,
	}
}

// Errors of a [Builder] and of the decoders, for tests with errors.Is.
var (
	// ErrInvalid means that the description of a layer is not sound.
	ErrInvalid = errors.New("invalid index")
	// ErrTooLarge means that a layer exceeds one of [Limits].
	ErrTooLarge = errors.New("index too large")
	// ErrNoIndex means that a layer carries no index of the kind asked for.
	ErrNoIndex = errors.New("layer carries no index")
)

// Whiteouts as in the OCI image specification, layer.md#whiteouts, and what
// overlayfs understands, Documentation/filesystems/overlayfs.rst.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	opaqueXattr    = "trusted.overlay.opaque"
)

// Builder checks entries and makes an [Index] of them. It is not safe for
// concurrent use. After an error it must be thrown away.
//
// Files get their place in the device in the order in which they are added.
// Decoders add them in the order of the blob: neighbours in one are then
// neighbours in the other, and reading ahead in the device is reading ahead in
// the blob.
type Builder struct {
	limits  Limits
	blob    int64
	entries int
	text    int64
	bytes   int64
	device  int64
	inodes  []node
	chunks  []Chunk
	file    openFile
}

// node is an inode under construction.
type node struct {
	Inode
	children map[string]int32
	depth    int
	implied  bool // a directory nobody has described yet
	whiteout bool
}

// NewBuilder returns a builder for the index of a blob, in which chunks may lie
// in [0, blobSize).
func NewBuilder(blobSize int64, limits Limits) *Builder {
	b := &Builder{limits: limits, blob: blobSize}
	b.inodes = append(b.inodes, impliedDirectory())
	b.inodes[0].Mode = unix.S_IFDIR | 0o555 // containers/storage, drivers/overlay, defaultPerms
	return b
}

// impliedDirectory is what containers/storage makes for a directory that a
// layer uses but does not describe (pkg/archive, Unpack, umask 022).
func impliedDirectory() node {
	return node{
		Inode:    Inode{Mode: unix.S_IFDIR | 0o755, ModTime: time.Unix(0, 0)},
		implied:  true,
		children: map[string]int32{},
	}
}

// Add adds an entry. Entries come in the order of the layer's tar: the target
// of a hard link must have been added before it, as for extraction.
//
// The chunks of a regular file with content are e.Chunks, or, if it has none,
// those that [Builder.AddChunk] gets before the next entry.
func (b *Builder) Add(e Entry) error {
	if err := b.file.checkCovered(); err != nil {
		return err
	}
	b.file = openFile{}
	if err := b.countEntry(); err != nil {
		return err
	}
	b.text += int64(len(e.Name) + len(e.Target))
	for k, v := range e.Xattrs {
		b.text += int64(len(k) + len(v))
	}
	if b.text > b.limits.Text {
		return fmt.Errorf("more than %d bytes of names and attributes: %w", b.limits.Text, ErrTooLarge)
	}
	if err := b.add(e); err != nil {
		return fmt.Errorf("entry %.256q: %w", e.Name, err)
	}
	for _, c := range e.Chunks {
		if b.file.size == 0 && c.Size == 0 {
			continue // of an empty file or a whiteout
		}
		if err := b.AddChunk(c); err != nil {
			return err
		}
	}
	return nil
}

func (b *Builder) countEntry() error {
	if b.entries++; b.entries > b.limits.Entries {
		return fmt.Errorf("more than %d entries: %w", b.limits.Entries, ErrTooLarge)
	}
	return nil
}

func (b *Builder) add(e Entry) error {
	name, err := cleanName(e.Name)
	if err != nil {
		return err
	}
	dir, base := path.Split(name)
	if strings.HasPrefix(base, whiteoutPrefix) {
		return b.addWhiteout(dir, base, e)
	}
	for k, v := range e.Xattrs {
		if err := checkXattr(k, v); err != nil {
			return err
		}
	}
	if e.Mode&unix.S_IFMT == 0 {
		return b.addLink(dir, base, e)
	}
	n, err := newNode(e)
	if err != nil {
		return err
	}
	if e.Mode&unix.S_IFMT == unix.S_IFREG {
		if err := b.place(&n, e.Name); err != nil {
			return err
		}
	}
	return b.insert(name, n)
}

// addWhiteout turns a whiteout file into overlayfs's form.
func (b *Builder) addWhiteout(dir, base string, e Entry) error {
	d, err := b.directory(dir)
	if errors.Is(err, errInWhiteout) {
		return nil // the directory is whited out already; extraction skips it too
	}
	if err != nil {
		return err
	}
	if base == whiteoutOpaque {
		b.inodes[d].Xattrs = setXattr(b.inodes[d].Xattrs, opaqueXattr, "y")
		return nil
	}
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("whiteout of nothing: %w", ErrInvalid)
	}
	if _, ok := b.inodes[d].children[hidden]; ok {
		return fmt.Errorf("whiteout of a file of the same layer: %w", ErrInvalid)
	}
	return b.append(d, hidden, node{
		Inode:    Inode{Mode: unix.S_IFCHR, UID: e.UID, GID: e.GID, ModTime: time.Unix(0, 0)},
		whiteout: true,
	})
}

// addLink gives an inode one more name. The entry's attributes replace the
// inode's, because extraction applies them to the new name.
func (b *Builder) addLink(dir, base string, e Entry) error {
	target, err := cleanName(e.Target)
	if err != nil {
		return err
	}
	id, ok := b.lookup(target)
	if !ok || b.inodes[id].children != nil {
		return fmt.Errorf("hard link to %.256q, which is no file before it: %w", e.Target, ErrInvalid)
	}
	parent, err := b.directory(dir)
	if err != nil {
		return err
	}
	if _, ok := b.inodes[parent].children[base]; ok || base == "" {
		return fmt.Errorf("name occurs twice: %w", ErrInvalid)
	}
	b.inodes[parent].children[base] = id
	n := &b.inodes[id]
	n.Nlink++
	if n.UID != e.UID || n.GID != e.GID {
		n.UID, n.GID = e.UID, e.GID
		// Another owner takes a file's capabilities away: chown(2).
		n.Xattrs = slices.DeleteFunc(n.Xattrs, func(x Xattr) bool { return x.Name == capability })
	}
	if n.Mode&unix.S_IFMT != unix.S_IFLNK {
		n.Mode = n.Mode&unix.S_IFMT | e.Mode&permissions
		n.ModTime = extractedTime(e.ModTime, n.Mode)
	}
	for k, v := range e.Xattrs {
		n.Xattrs = setXattr(n.Xattrs, k, v)
	}
	return nil
}

func newNode(e Entry) (node, error) {
	n := node{Inode: Inode{Mode: e.Mode, UID: e.UID, GID: e.GID, ModTime: extractedTime(e.ModTime, e.Mode)}}
	for k, v := range e.Xattrs {
		n.Xattrs = setXattr(n.Xattrs, k, v)
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Size = e.Size
	case unix.S_IFDIR:
		n.children = map[string]int32{}
	case unix.S_IFLNK:
		if e.Target == "" || len(e.Target) >= unix.PathMax || strings.IndexByte(e.Target, 0) >= 0 {
			return node{}, fmt.Errorf("symbolic link with a target of %d bytes: %w", len(e.Target), ErrInvalid)
		}
		n.Mode, n.Target = unix.S_IFLNK|0o777, e.Target
	case unix.S_IFCHR, unix.S_IFBLK:
		// Numbers as the kernel's MKDEV keeps them: 12 bits and 20 bits.
		if e.Major >= 1<<12 || e.Minor >= 1<<20 {
			return node{}, fmt.Errorf("device %d:%d: %w", e.Major, e.Minor, ErrInvalid)
		}
		n.Major, n.Minor = e.Major, e.Minor
	case unix.S_IFIFO:
	default:
		return node{}, fmt.Errorf("file type %#o: %w", e.Mode&unix.S_IFMT, ErrInvalid)
	}
	return n, nil
}

// insert puts a node at a name.
func (b *Builder) insert(name string, n node) error {
	isDir := n.children != nil
	if name == "" {
		if !isDir {
			return fmt.Errorf("the root is not a directory: %w", ErrInvalid)
		}
		b.describe(0, n)
		return nil
	}
	dir, base := path.Split(name)
	parent, err := b.directory(dir)
	if err != nil {
		return err
	}
	old, ok := b.inodes[parent].children[base]
	switch {
	case !ok:
		return b.append(parent, base, n)
	case isDir && b.inodes[old].children != nil: // tars may repeat a directory
		b.describe(old, n)
	case b.inodes[old].whiteout && b.inodes[old].Nlink == 0: // the file that is there hides the lower one as well
		n.depth = b.inodes[old].depth
		b.inodes[old] = n
	default:
		return fmt.Errorf("name occurs twice: %w", ErrInvalid)
	}
	return nil
}

// describe gives a directory that exists already the attributes of n. Extended
// attributes that it had before stay, as in extraction.
func (b *Builder) describe(dir int32, n node) {
	d := &b.inodes[dir]
	for _, x := range d.Xattrs {
		if !slices.ContainsFunc(n.Xattrs, func(y Xattr) bool { return x.Name == y.Name }) {
			n.Xattrs = setXattr(n.Xattrs, x.Name, x.Value)
		}
	}
	d.Inode, d.implied = n.Inode, false
}

// errInWhiteout means that a path leads through a whiteout.
var errInWhiteout = fmt.Errorf("directory is whited out: %w", ErrInvalid)

// directory returns the directory of that name, made if need be.
func (b *Builder) directory(name string) (int32, error) {
	at := int32(0)
	for part := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if part == "" {
			continue
		}
		next, ok := b.inodes[at].children[part]
		if !ok {
			if err := b.countEntry(); err != nil {
				return 0, err
			}
			if err := b.append(at, part, impliedDirectory()); err != nil {
				return 0, err
			}
			next = b.inodes[at].children[part]
		}
		if b.inodes[next].whiteout {
			return 0, errInWhiteout
		}
		if b.inodes[next].children == nil {
			return 0, fmt.Errorf("%q is not a directory: %w", part, ErrInvalid)
		}
		at = next
	}
	return at, nil
}

func (b *Builder) append(parent int32, name string, n node) error {
	if n.depth = b.inodes[parent].depth + 1; n.depth > b.limits.Depth {
		return fmt.Errorf("more than %d directories deep: %w", b.limits.Depth, ErrTooLarge)
	}
	id := int32(len(b.inodes)) //nolint:gosec // bounded by Limits.Entries
	b.inodes = append(b.inodes, n)
	b.inodes[parent].children[name] = id
	return nil
}

// lookup returns the inode of a clean name without following symbolic links.
func (b *Builder) lookup(name string) (int32, bool) {
	at := int32(0)
	for part := range strings.SplitSeq(name, "/") {
		next, ok := b.inodes[at].children[part]
		if !ok {
			return 0, false
		}
		at = next
	}
	return at, true
}

// Finish checks what can only be checked at the end and returns the index.
func (b *Builder) Finish(kind Kind, c Compression) (*Index, error) {
	if err := b.file.checkCovered(); err != nil {
		return nil, err
	}
	if err := b.resolveSizes(); err != nil {
		return nil, err
	}
	idx := &Index{
		Kind: kind, Compression: c, RootImplied: b.inodes[0].implied,
		Inodes: make([]Inode, len(b.inodes)), Chunks: b.chunks, DeviceSize: b.device,
	}
	for i := range b.inodes {
		n := &b.inodes[i]
		n.Nlink++
		if n.children != nil {
			n.Nlink = 2
			n.Entries = make([]Dirent, 0, len(n.children))
			for name, id := range n.children {
				n.Entries = append(n.Entries, Dirent{name, id})
				if b.inodes[id].children != nil {
					n.Nlink++
				}
			}
			slices.SortFunc(n.Entries, func(x, y Dirent) int { return strings.Compare(x.Name, y.Name) })
			n.children = map[string]int32{} // still marks a directory, holds nothing
		}
		idx.Inodes[i] = n.Inode
	}
	return idx, nil
}
