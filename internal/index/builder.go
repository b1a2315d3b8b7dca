// SPDX-License-Identifier: Apache-2.0

package index

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits bounds what an index may hold. Real layers stay far below the
// defaults; beyond them the runtime's normal pull handles the layer.
type Limits struct {
	Entries   int   // files, directories and links
	Chunks    int   // chunks of all files
	Text      int64 // bytes of names, link targets and extended attributes
	Depth     int   // directories above a file
	FileBytes int64 // uncompressed bytes of all files
}

// DefaultLimits is what [NewBuilder] uses.
var DefaultLimits = Limits{
	Entries:   400_000,
	Chunks:    2_000_000,
	Text:      64 << 20,
	Depth:     256,
	FileBytes: 4 << 40,
}

// Errors of a [Builder], for tests with errors.Is.
var (
	// ErrInvalid means that the description of a layer is not sound.
	ErrInvalid = errors.New("invalid index")
	// ErrTooLarge means that a layer exceeds one of [Limits].
	ErrTooLarge = errors.New("index too large")
)

// Whiteouts as in the OCI image specification, layer.md#whiteouts, and what
// overlayfs understands, Documentation/filesystems/overlayfs.rst.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // AUFS metadata; only the opaque marker has a meaning
	whiteoutOpaque = ".wh..wh..opq"
	opaqueXattr    = "trusted.overlay.opaque"
)

// Entry is one entry of a layer as its decoder read it: names as in a tar.
type Entry struct {
	// Name is the path; "./a", "/a" and "a/" all mean a. Dot-dot is refused.
	Name string
	// Mode is st_mode with its type bits. A hard link has Mode 0 and Target set.
	Mode         uint32
	UID, GID     uint32
	ModTime      time.Time
	Size         int64
	Target       string // of a symbolic link, or the name a hard link refers to
	Major, Minor uint32
	Xattrs       map[string]string
	// Chunks cover [0, Size) of a regular file in order; Offset is relative to
	// the file. A chunk with BlobSize 0 is a hole and reads as zeros.
	Chunks []Chunk
}

// Builder checks entries and makes an [Index] of them. It is not safe for
// concurrent use. After an error it must be thrown away.
type Builder struct {
	limits  Limits
	blob    int64
	entries int
	text    int64
	bytes   int64
	inodes  []node
	chunks  []Chunk // Offset relative to the file until Finish
	links   []link
}

// node is an inode under construction.
type node struct {
	Inode
	children map[string]int32
	chunks   [2]int // range in Builder.chunks
	parent   int32
	depth    int
	implied  bool // a directory nobody has described yet
}

type link struct{ name, target string }

// NewBuilder returns a builder for the index of a blob of blobSize bytes.
func NewBuilder(blobSize int64, limits Limits) *Builder {
	b := &Builder{limits: limits, blob: blobSize}
	b.inodes = append(b.inodes, impliedDirectory(-1, 0))
	return b
}

// impliedDirectory is what c/storage makes for a directory that a layer uses
// but does not describe.
func impliedDirectory(parent int32, depth int) node {
	mode := uint32(0o755)
	if parent < 0 {
		mode = 0o555 // the root of a layer: containers/storage, drivers/overlay, defaultPerms
	}
	return node{
		Inode:  Inode{Mode: unix.S_IFDIR | mode, ModTime: time.Unix(0, 0)},
		parent: parent, depth: depth, implied: true,
		children: map[string]int32{},
	}
}

// Add adds an entry. Entries may come in any order, but for hard links: their
// target must have been added by the time of [Builder.Finish].
func (b *Builder) Add(e Entry) error {
	if b.entries++; b.entries > b.limits.Entries {
		return fmt.Errorf("more than %d entries: %w", b.limits.Entries, ErrTooLarge)
	}
	b.text += int64(len(e.Name) + len(e.Target))
	for k, v := range e.Xattrs {
		b.text += int64(len(k) + len(v))
	}
	if b.text > b.limits.Text {
		return fmt.Errorf("more than %d bytes of names and attributes: %w", b.limits.Text, ErrTooLarge)
	}
	if err := b.add(e); err != nil {
		return fmt.Errorf("entry %q: %w", e.Name, err)
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
		return b.addWhiteout(dir, base)
	}
	if e.Mode == 0 {
		b.links = append(b.links, link{name, e.Target})
		return nil
	}
	n, err := b.newNode(e)
	if err != nil {
		return err
	}
	return b.insert(name, n)
}

// cleanName returns a path relative to the root, "" for the root itself.
func cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", fmt.Errorf("name has a NUL byte: %w", ErrInvalid)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("name leaves its directory: %w", ErrInvalid)
		}
		if len(part) > unix.NAME_MAX {
			return "", fmt.Errorf("name has a part longer than %d bytes: %w", unix.NAME_MAX, ErrInvalid)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// addWhiteout turns a whiteout file into overlayfs's form.
func (b *Builder) addWhiteout(dir, base string) error {
	if base == whiteoutOpaque {
		d, err := b.directory(dir)
		if err != nil {
			return err
		}
		b.setOpaque(d)
		return nil
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil
	}
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("whiteout of nothing: %w", ErrInvalid)
	}
	d, err := b.directory(dir)
	if err != nil {
		return err
	}
	if _, ok := b.inodes[d].children[hidden]; ok {
		return fmt.Errorf("whiteout of a file of the same layer: %w", ErrInvalid)
	}
	b.append(d, hidden, node{Inode: Inode{Mode: unix.S_IFCHR, ModTime: time.Unix(0, 0)}})
	return nil
}

func (b *Builder) setOpaque(dir int32) {
	n := &b.inodes[dir]
	has := slices.ContainsFunc(n.Xattrs, func(x Xattr) bool { return x.Name == opaqueXattr })
	if !has {
		n.Xattrs = append(n.Xattrs, Xattr{opaqueXattr, "y"})
	}
}

func (b *Builder) newNode(e Entry) (node, error) {
	n := node{Inode: Inode{
		Mode: e.Mode, UID: e.UID, GID: e.GID, ModTime: e.ModTime,
		Major: e.Major, Minor: e.Minor, Target: e.Target,
	}}
	for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
		if err := checkXattr(name, e.Xattrs[name]); err != nil {
			return node{}, err
		}
		n.Xattrs = append(n.Xattrs, Xattr{name, e.Xattrs[name]})
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return b.newFile(n, e)
	case unix.S_IFDIR:
		n.children = map[string]int32{}
	case unix.S_IFLNK:
		if e.Target == "" || len(e.Target) >= unix.PathMax || strings.IndexByte(e.Target, 0) >= 0 {
			return node{}, fmt.Errorf("symbolic link with a target of %d bytes: %w", len(e.Target), ErrInvalid)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		// Numbers as the kernel's MKDEV keeps them: 12 bits and 20 bits.
		if e.Major >= 1<<12 || e.Minor >= 1<<20 {
			return node{}, fmt.Errorf("device %d:%d: %w", e.Major, e.Minor, ErrInvalid)
		}
	case unix.S_IFIFO:
	default:
		return node{}, fmt.Errorf("file type %#o: %w", e.Mode&unix.S_IFMT, ErrInvalid)
	}
	return n, nil
}

// newFile checks a regular file's chunks and keeps them.
func (b *Builder) newFile(n node, e Entry) (node, error) {
	if e.Size < 0 || e.Size > b.limits.FileBytes-b.bytes {
		return node{}, fmt.Errorf("file of %d bytes, %d in all files: %w", e.Size, b.limits.FileBytes, ErrTooLarge)
	}
	b.bytes += e.Size
	n.Target, n.Size = "", e.Size
	n.chunks[0] = len(b.chunks)
	var at int64
	for _, c := range e.Chunks {
		if c.Offset != at || c.Size <= 0 || c.Size > e.Size-at {
			return node{}, fmt.Errorf("chunk %d+%d does not follow %d in a file of %d bytes: %w", c.Offset, c.Size, at, e.Size, ErrInvalid)
		}
		at += c.Size
		if c.BlobSize == 0 {
			continue // a hole
		}
		if c.BlobOffset < 0 || c.BlobSize < 0 || c.BlobOffset > b.blob || c.BlobSize > b.blob-c.BlobOffset {
			return node{}, fmt.Errorf("chunk at %d+%d of a blob of %d bytes: %w", c.BlobOffset, c.BlobSize, b.blob, ErrInvalid)
		}
		if c.InnerOffset < 0 || c.InnerOffset > math.MaxInt64-c.Size {
			return node{}, fmt.Errorf("chunk at %d inside its frame: %w", c.InnerOffset, ErrInvalid)
		}
		if len(b.chunks) >= b.limits.Chunks {
			return node{}, fmt.Errorf("more than %d chunks: %w", b.limits.Chunks, ErrTooLarge)
		}
		b.chunks = append(b.chunks, c)
	}
	if at != e.Size {
		return node{}, fmt.Errorf("chunks cover %d of %d bytes: %w", at, e.Size, ErrInvalid)
	}
	n.chunks[1] = len(b.chunks)
	return n, nil
}

// checkXattr refuses attributes that a layer must not carry: overlayfs's own
// would let one layer redirect names into others.
func checkXattr(name, value string) error {
	prefix, rest, _ := strings.Cut(name, ".")
	switch {
	case rest == "" || len(name) > unix.NAME_MAX || len(value) > math.MaxUint16:
		return fmt.Errorf("extended attribute %.64q of %d bytes: %w", name, len(value), ErrInvalid)
	case strings.HasPrefix(name, "trusted.overlay."), strings.HasPrefix(name, "user.overlay."):
		return fmt.Errorf("extended attribute %q belongs to overlayfs: %w", name, ErrInvalid)
	case !slices.Contains([]string{"user", "trusted", "security", "system"}, prefix):
		return fmt.Errorf("extended attribute %q: %w", name, ErrInvalid)
	}
	return nil
}

// insert puts a node at a name.
func (b *Builder) insert(name string, n node) error {
	isDir := n.Mode&unix.S_IFMT == unix.S_IFDIR
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
	if old, ok := b.inodes[parent].children[base]; ok {
		// Tars may repeat a directory; any other repetition has no one meaning.
		if !isDir || b.inodes[old].children == nil {
			return fmt.Errorf("name occurs twice: %w", ErrInvalid)
		}
		b.describe(old, n)
		return nil
	}
	b.append(parent, base, n)
	return nil
}

// describe gives a directory that exists already the attributes of n.
func (b *Builder) describe(dir int32, n node) {
	d := &b.inodes[dir]
	opaque := slices.ContainsFunc(d.Xattrs, func(x Xattr) bool { return x.Name == opaqueXattr })
	d.Inode, d.implied = n.Inode, false
	if opaque {
		b.setOpaque(dir)
	}
}

// directory returns the directory of that name, made if need be.
func (b *Builder) directory(name string) (int32, error) {
	at := int32(0)
	for part := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if part == "" {
			continue
		}
		next, ok := b.inodes[at].children[part]
		if !ok {
			if b.inodes[at].depth >= b.limits.Depth {
				return 0, fmt.Errorf("more than %d directories deep: %w", b.limits.Depth, ErrTooLarge)
			}
			if b.entries++; b.entries > b.limits.Entries {
				return 0, fmt.Errorf("more than %d entries: %w", b.limits.Entries, ErrTooLarge)
			}
			next = b.append(at, part, impliedDirectory(at, b.inodes[at].depth+1))
		}
		if b.inodes[next].children == nil {
			return 0, fmt.Errorf("%q is not a directory: %w", part, ErrInvalid)
		}
		at = next
	}
	return at, nil
}

func (b *Builder) append(parent int32, name string, n node) int32 {
	n.parent, n.depth = parent, b.inodes[parent].depth+1
	id := int32(len(b.inodes)) //nolint:gosec // bounded by Limits.Entries
	b.inodes = append(b.inodes, n)
	b.inodes[parent].children[name] = id
	return id
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

// resolveLinks gives hard links the inode they refer to. A link may refer to
// another link, so unresolved ones are tried again while that helps.
func (b *Builder) resolveLinks() error {
	pending := b.links
	for len(pending) > 0 {
		var again []link
		for _, l := range pending {
			done, err := b.resolveLink(l)
			if err != nil {
				return fmt.Errorf("hard link %q: %w", l.name, err)
			}
			if !done {
				again = append(again, l)
			}
		}
		if len(again) == len(pending) {
			return fmt.Errorf("hard link %q to %q, which is not in the layer: %w", again[0].name, again[0].target, ErrInvalid)
		}
		pending = again
	}
	return nil
}

func (b *Builder) resolveLink(l link) (bool, error) {
	target, err := cleanName(l.target)
	if err != nil {
		return false, err
	}
	id, ok := b.lookup(target)
	if !ok {
		return false, nil
	}
	if b.inodes[id].children != nil {
		return false, fmt.Errorf("target %q is a directory: %w", l.target, ErrInvalid)
	}
	dir, base := path.Split(l.name)
	parent, err := b.directory(dir)
	if err != nil {
		return false, err
	}
	if _, ok := b.inodes[parent].children[base]; ok {
		return false, fmt.Errorf("name occurs twice: %w", ErrInvalid)
	}
	b.inodes[parent].children[base] = id
	b.inodes[id].Nlink++
	return true, nil
}

// Finish checks what can only be checked at the end and returns the index.
func (b *Builder) Finish(kind Kind, c Compression) (*Index, error) {
	if err := b.resolveLinks(); err != nil {
		return nil, err
	}
	idx := &Index{Kind: kind, Compression: c, Inodes: make([]Inode, len(b.inodes))}
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
			slices.SortFunc(n.Xattrs, func(x, y Xattr) int { return strings.Compare(x.Name, y.Name) })
		}
	}
	b.layout(idx)
	for i := range b.inodes {
		idx.Inodes[i] = b.inodes[i].Inode
	}
	return idx, nil
}

// layout places the files in the device, in the order of the blob: files that
// are neighbours in one are neighbours in the other, so that reading ahead in
// the device is reading ahead in the blob.
func (b *Builder) layout(idx *Index) {
	var files []int32
	for i := range b.inodes {
		if b.inodes[i].Size > 0 {
			files = append(files, int32(i)) //nolint:gosec // bounded by Limits.Entries
		}
	}
	start := func(i int32) int64 {
		if n := b.inodes[i]; n.chunks[0] < n.chunks[1] {
			return b.chunks[n.chunks[0]].BlobOffset
		}
		return math.MaxInt64 // nothing but holes
	}
	sort.SliceStable(files, func(x, y int) bool { return start(files[x]) < start(files[y]) })
	idx.Chunks = make([]Chunk, 0, len(b.chunks))
	for _, i := range files {
		n := &b.inodes[i]
		n.Offset = idx.DeviceSize
		for _, c := range b.chunks[n.chunks[0]:n.chunks[1]] {
			c.Offset += n.Offset
			idx.Chunks = append(idx.Chunks, c)
		}
		idx.DeviceSize += (n.Size + BlockSize - 1) / BlockSize * BlockSize
	}
}
