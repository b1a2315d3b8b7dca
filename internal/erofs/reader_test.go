// SPDX-License-Identifier: Apache-2.0

package erofs_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/index"
)

// memory is a file in memory, which may run full.
type memory struct {
	data    []byte
	at      int
	room    int
	limited bool
}

func (m *memory) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekStart {
		return 0, errors.ErrUnsupported
	}
	m.at = int(offset)
	return offset, nil
}

func (m *memory) Write(p []byte) (int, error) {
	if m.limited && m.at+len(p) > m.room {
		return 0, unix.ENOSPC
	}
	if grow := m.at + len(p) - len(m.data); grow > 0 {
		m.data = append(m.data, make([]byte, grow)...)
	}
	m.at += copy(m.data[m.at:], p)
	return len(p), nil
}

// image reads images as fs/erofs does, and panics where one is not sound.
type image []byte

func (m image) u16(at uint64) uint64 { return uint64(binary.LittleEndian.Uint16(m[at:])) }
func (m image) u32(at uint64) uint64 { return uint64(binary.LittleEndian.Uint32(m[at:])) }
func (m image) u64(at uint64) uint64 { return binary.LittleEndian.Uint64(m[at:]) }

func (m image) check() error {
	sb := slices.Clone(m[1024:4096])
	copy(sb[4:8], []byte{0, 0, 0, 0})
	if sum := ^crc32.Checksum(sb, crc32.MakeTable(crc32.Castagnoli)); uint64(sum) != m.u32(1028) {
		return errors.New("checksum differs")
	}
	if len(m)%4096 != 0 || m.u32(1024+36)*4096 != uint64(len(m)) {
		return fmt.Errorf("image of %d bytes says %d blocks", len(m), m.u32(1024+36))
	}
	return nil
}

// inode decodes an inode. The Inode of an Entry is the nid.
func (m image) inode(nid uint64) (in index.Inode) {
	at := nid * 32
	if at%4096+64 > 4096 {
		panic("inode crosses a block")
	}
	layout := m.u16(at) >> 1
	in = index.Inode{
		Mode: uint32(m.u16(at + 4)), UID: uint32(m.u32(at + 24)), GID: uint32(m.u32(at + 28)), Nlink: uint32(m.u32(at + 44)),
		ModTime: time.Unix(int64(m.u64(at+32)), int64(m.u32(at+40))),
	}
	size, place, end := m.u64(at+8), m.u32(at+16), at+64
	if n := m.u16(at + 2); n > 0 {
		end += 12 + 4*(n-1)
		in.Xattrs = m.xattrs(at+64+12, end)
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		in.Size = int64(size)
		if size > 0 {
			start, blocks := m.u32(1024+128+68), m.u32(1024+128+64)
			if layout != 0 || place < start || place-start+(size+4095)/4096 > blocks {
				panic("bad place in the device")
			}
			in.Offset = int64(place-start) * 4096
		}
	case unix.S_IFLNK:
		in.Target = string(m.data(layout, size, place, end))
	case unix.S_IFDIR:
		in.Entries = m.directory(nid, m.data(layout, size, place, end))
	case unix.S_IFCHR, unix.S_IFBLK:
		in.Major, in.Minor = uint32(place>>8&0xfff), uint32(place&0xff|place>>12&0xfff00)
	}
	return in
}

func (m image) data(layout, size, place, inline uint64) []byte {
	tail := uint64(0)
	switch layout {
	case 2:
		if tail = size % 4096; tail == 0 || inline%4096+tail > 4096 || (inline-1)/4096 != (inline+tail-1)/4096 {
			panic("bad inline data")
		}
	case 0:
	default:
		panic("bad layout")
	}
	data := slices.Clone(m[place*4096:][:size-tail])
	return append(data, m[inline:][:tail]...)
}

func (m image) xattrs(at, end uint64) (all []index.Xattr) {
	prefixes := map[byte]string{1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}
	for at < end {
		n, size := uint64(m[at]), m.u16(at+2)
		name := prefixes[m[at+1]] + string(m[at+4:][:n])
		all = append(all, index.Xattr{Name: name, Value: string(m[at+4+n:][:size])})
		at = (at + 4 + n + size + 3) / 4 * 4
	}
	if at != end {
		panic("attributes end elsewhere")
	}
	return all
}

func (m image) directory(nid uint64, data []byte) (all []index.Dirent) {
	last, dots := "", 0
	for ; len(data) > 0; data = data[min(4096, len(data)):] {
		block := image(data[:min(4096, len(data))])
		n := block.u16(8) / 12
		for i := range n {
			start, end := block.u16(12*i+8), uint64(len(block))
			if i+1 < n {
				end = block.u16(12*i + 20)
			}
			name := strings.TrimRight(string(block[start:end]), "\x00")
			if name <= last {
				panic("names are not sorted")
			}
			last = name
			if name == "." && block.u64(12*i) != nid {
				panic("dot is another directory")
			}
			if name == "." || name == ".." {
				dots++
				continue
			}
			all = append(all, index.Dirent{Name: name, Inode: int32(block.u64(12 * i))})
		}
	}
	if dots != 2 {
		panic("no dot and dot dot")
	}
	return all
}

// compareImage compares an image with the index it was made of.
func compareImage(t *testing.T, idx *index.Index, m image) {
	t.Helper()
	if err := m.check(); err != nil {
		t.Fatal(err)
	}
	root := m.inode(m.u16(1024 + 14))
	if len(root.Entries) != 8 || root.Entries[0].Name != "diff" {
		t.Fatalf("root holds %v", root.Entries)
	}
	nids := map[int32]int32{0: root.Entries[0].Inode}
	for i, want := range idx.Inodes {
		nid, ok := nids[int32(i)]
		if !ok {
			t.Fatalf("inode %d is not in the image", i)
		}
		got := m.inode(uint64(nid))
		for k, e := range want.Entries {
			if k >= len(got.Entries) || got.Entries[k].Name != e.Name {
				t.Fatalf("directory %d holds %v, want %v", i, got.Entries, want.Entries)
			}
			if old, ok := nids[e.Inode]; ok && old != got.Entries[k].Inode {
				t.Errorf("inode %d is at %d and at %d", e.Inode, old, got.Entries[k].Inode)
			}
			nids[e.Inode] = got.Entries[k].Inode
			got.Entries[k] = e
		}
		if want.Size == 0 {
			want.Offset = 0
		}
		if want.Mode&unix.S_IFMT != unix.S_IFCHR && want.Mode&unix.S_IFMT != unix.S_IFBLK {
			want.Major, want.Minor = 0, 0
		}
		equateEmpty := cmp.Transformer("empty", func(e []index.Dirent) []index.Dirent { return append([]index.Dirent{}, e...) })
		if want.Mode&unix.S_IFMT != unix.S_IFLNK {
			want.Target = ""
		}
		if diff := cmp.Diff(want, got, cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "Entries" && len(p) > 1 }, equateEmpty)); diff != "" {
			t.Errorf("inode %d (-want +got):\n%.2000s", i, diff)
		}
	}
}

// randomEntries makes entries out of bytes; many of them are not sound.
func randomEntries(data []byte) []index.Entry {
	seed := [32]byte{}
	copy(seed[:], data)
	r := rand.New(rand.NewChaCha8(seed))
	names := []string{"a", "b", "dir", "-", "...", strings.Repeat("n", 255), "x\xff"}
	name := func() string {
		parts := make([]string, 1+r.IntN(3))
		for i := range parts {
			parts[i] = names[r.IntN(len(names))]
			if r.IntN(2) == 0 {
				parts[i] = fmt.Sprint(r.IntN(300))
			}
		}
		return strings.Join(parts, "/")
	}
	var entries []index.Entry
	for _, b := range data[:min(len(data), 100)] { // building tries each with all before it
		e := index.Entry{
			Name: name(), UID: r.Uint32(), GID: r.Uint32(), Major: r.Uint32N(1 << 12), Minor: r.Uint32N(1 << 20),
			ModTime: time.Unix(r.Int64N(1<<35)-1<<34, r.Int64N(1e9)),
		}
		types := []uint32{unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFREG, unix.S_IFDIR}
		e.Mode = types[b%8] | uint32(b)<<4&0o7777
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			if e.Size = r.Int64N(1 << (b % 43)); e.Size > 0 {
				e.Chunks = []index.Chunk{{Size: e.Size, BlobSize: 1}}
			}
		case unix.S_IFLNK:
			e.Target = strings.Repeat("t", r.IntN(4097))
		case unix.S_IFDIR:
			e.Name = strings.Repeat("dir/", int(b)/8%3) + e.Name
		}
		if b > 200 {
			e.Xattrs = map[string]string{}
			for i := range r.IntN(6) {
				e.Xattrs[fmt.Sprintf("trusted.%d", i)] = strings.Repeat("v", r.IntN(1<<r.IntN(17)))
			}
		}
		entries = append(entries, e)
		if b%16 == 3 {
			entries = append(entries, index.Entry{Name: name(), Target: e.Name})
		}
	}
	return entries
}

func seeds() [][]byte {
	all := [][]byte{nil, {0}, {1, 2, 3}, []byte(strings.Repeat("\x00\x01", 300)), []byte(strings.Repeat("\xff\xfa", 50))}
	for i := range byte(20) {
		r := rand.NewChaCha8([32]byte{i})
		b := make([]byte, int(i)*40)
		_, _ = r.Read(b) // it does not fail
		all = append(all, b)
	}
	return all
}

// FuzzWrite makes indexes of what a Builder takes of random entries; their
// images must hold the same.
func FuzzWrite(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x03"))
	for _, s := range seeds() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if idx := buildRandom(t, data); idx != nil {
			var m memory
			err := erofs.Write(&m, idx, "layer")
			if err == nil {
				compareImage(t, idx, m.data)
			} else if !errors.Is(err, erofs.ErrUnsupported) {
				t.Error(err)
			}
		}
	})
}

// buildRandom builds what it can; nil if that is nothing.
func buildRandom(t *testing.T, data []byte) *index.Index {
	t.Helper()
	var taken []index.Entry
	for _, e := range randomEntries(data) {
		b := index.NewBuilder(1<<20, index.DefaultLimits())
		ok := true
		for _, old := range append(taken[:len(taken):len(taken)], e) {
			ok = ok && b.Add(old) == nil
		}
		if ok {
			if _, err := b.Finish(index.Stream, index.Zstd); err == nil {
				taken = append(taken, e)
			}
		}
	}
	b := index.NewBuilder(1<<20, index.DefaultLimits())
	for _, e := range taken {
		if err := b.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	idx, err := b.Finish(index.Stream, index.Zstd)
	if err != nil {
		return nil
	}
	return idx
}

// TestSeeds mounts what the fuzz seeds make, so that the reader of this test
// and the kernel agree.
func TestSeeds(t *testing.T) {
	mounted := 0
	for _, s := range seeds() {
		idx := buildRandom(t, s)
		if idx == nil || idx.DeviceSize > 1<<43 {
			continue
		}
		mounted++
		forEachMethod(t, idx, func(t *testing.T, target string) { compareMount(t, idx, target) })
	}
	if mounted < 20 {
		t.Errorf("only %d of the seeds make an image", mounted)
	}
}

// BenchmarkWrite writes the image of a layer of 100,000 files.
func BenchmarkWrite(b *testing.B) {
	tr := newTree()
	for i := range 1000 {
		dir := tr.add(0, fmt.Sprint(i), index.Inode{Mode: unix.S_IFDIR | 0o755})
		for k := range 100 {
			tr.add(dir, fmt.Sprintf("file-%d-%d.py", i, k), index.Inode{Mode: unix.S_IFREG | 0o644, Size: 5000})
		}
	}
	idx := tr.index()
	for b.Loop() {
		var m memory
		m.data = make([]byte, 0, 32<<20)
		if err := erofs.Write(&m, idx, "layer"); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(m.data))/float64(len(idx.Inodes)), "B/inode")
	}
}
