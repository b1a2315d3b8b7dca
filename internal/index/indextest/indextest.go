// SPDX-License-Identifier: Apache-2.0

// Package indextest compares what decoders make of a layer with what a normal pull
// makes of it: the tree that containers/storage extracts. It needs root, as
// extraction does.
package indextest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/inflate"
)

// Tree is a file tree by path; the root is "".
type Tree map[string]File

// File is what stat and read say about a file. Links are the other names of the
// same inode that come before this one; Nlink is 0 for directories, whose count
// depends on the file system.
type File struct {
	Mode, UID, GID, Nlink uint32
	Major, Minor          uint32
	Size                  int64
	ModTime               time.Time
	Target                string
	Xattrs                map[string]string
	Content               string // sha256
	SameAs                string // the first name of this inode, if it has several
}

// Check fails the test unless the index of a blob describes what extracting the
// blob yields, content included. round is applied to times, for formats that do
// not keep them whole.
func Check(t testing.TB, idx *index.Index, layer []byte, round func(time.Time) time.Time) {
	t.Helper()
	plain := Decompress(t, layer, idx.Compression)
	described, root := names(t, plain)
	if idx.RootImplied == root {
		t.Errorf("RootImplied = %t, but described: %t", idx.RootImplied, root)
	}
	compare(t, extract(t, plain), fromIndex(t, idx, layer), described, round)
}

// CheckDirectory fails the test unless a directory holds what extracting a tar yields.
func CheckDirectory(t testing.TB, dir string, plain []byte) {
	t.Helper()
	described, _ := names(t, plain)
	compare(t, extract(t, plain), walk(t, dir), described, Exact)
}

func compare(t testing.TB, want, got Tree, described map[string]bool, round func(time.Time) time.Time) {
	t.Helper()
	for _, tree := range []Tree{want, got} {
		for name, f := range tree {
			f.ModTime = round(f.ModTime.UTC())
			if !described[name] {
				f.ModTime = time.Time{} // taken from the clock
			}
			tree[name] = f
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tree differs from a normal pull's (-normal +ours):\n%s", diff)
	}
}

// Exact keeps times as they are, Seconds rounds them as eStargz's writer does.
func Exact(t time.Time) time.Time { return t }

// Seconds rounds times as the writer of eStargz does.
func Seconds(t time.Time) time.Time { return t.Round(time.Second) }

// names returns the names that a tar describes as themselves, and whether it
// describes the root.
func names(t testing.TB, plain []byte) (described map[string]bool, root bool) {
	t.Helper()
	described = map[string]bool{}
	for tr := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return described, described[""]
		}
		if err != nil {
			t.Fatalf("reading tar: %v", err)
		}
		described[strings.TrimPrefix(path.Clean("/"+h.Name), "/")] = true
	}
}

// Decompress returns the content of a whole blob, or of frames of it.
func Decompress(t testing.TB, p []byte, c index.Compression) []byte {
	t.Helper()
	var r io.Reader = bytes.NewReader(p)
	switch c {
	case index.None:
		return p
	case index.Gzip:
		z, err := gzip.NewReader(r)
		if err != nil {
			t.Fatalf("decompressing: %v", err)
		}
		r = z
	case index.Zstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err != nil {
			t.Fatalf("decompressing: %v", err)
		}
		defer z.Close()
		r = z
	}
	plain, err := io.ReadAll(r)
	if err != nil && len(plain) == 0 { // a frame may be followed by the start of another
		t.Fatalf("decompressing: %v", err)
	}
	return plain
}

// fromIndex builds the tree of an index, reading every chunk through its frame.
func fromIndex(t testing.TB, idx *index.Index, layer []byte) Tree {
	t.Helper()
	device := Device(t, idx, layer)
	tree := Tree{}
	first := map[int32]string{}
	var walk func(name string, id int32)
	walk = func(name string, id int32) {
		n := idx.Inodes[id]
		f := File{
			Mode: n.Mode, UID: n.UID, GID: n.GID, Nlink: n.Nlink, Major: n.Major, Minor: n.Minor,
			Size: n.Size, ModTime: n.ModTime, Target: n.Target,
		}
		for _, x := range n.Xattrs {
			if f.Xattrs == nil {
				f.Xattrs = map[string]string{}
			}
			f.Xattrs[x.Name] = x.Value
		}
		switch n.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			f.Nlink = 0
		case unix.S_IFREG:
			content := []byte{}
			if n.Size > 0 {
				content = device[n.Offset : n.Offset+n.Size]
			}
			f.Content = sum(content)
		}
		if f.Nlink > 1 {
			if _, ok := first[id]; !ok {
				first[id] = name
			}
			f.SameAs = first[id]
		}
		tree[name] = f
		for _, e := range n.Entries {
			walk(strings.TrimPrefix(name+"/"+e.Name, "/"), e.Inode)
		}
	}
	walk("", 0)
	return tree
}

// Device returns the device of an index, with every chunk read and verified.
func Device(t testing.TB, idx *index.Index, layer []byte) []byte {
	t.Helper()
	device := make([]byte, idx.DeviceSize)
	frames := map[[2]int64][]byte{}
	var end int64
	for i, c := range idx.Chunks {
		if c.Offset < end || c.End() > idx.DeviceSize {
			t.Fatalf("chunk %d is at %d, after one that ends at %d, in a device of %d bytes", i, c.Offset, end, idx.DeviceSize)
		}
		end = c.End()
		at := [2]int64{c.BlobOffset, c.BlobSize}
		if frames[at] == nil && len(idx.Spans) > 0 {
			frames[at] = span(t, idx, layer, c)
		} else if frames[at] == nil {
			frames[at] = Decompress(t, layer[c.BlobOffset:c.BlobOffset+c.BlobSize], idx.Compression)
		}
		content := frames[at][c.InnerOffset : c.InnerOffset+c.Size]
		if len(idx.Spans) == 0 && sha256.Sum256(content) != c.Digest {
			t.Fatalf("chunk %d, %+v, does not match its digest", i, c)
		}
		copy(device[c.Offset:], content)
	}
	return device
}

// span decompresses the span that a chunk lies in, and verifies it.
func span(t testing.TB, idx *index.Index, layer []byte, c index.Chunk) []byte {
	t.Helper()
	for i, s := range idx.Spans {
		if s.BlobOffset != c.BlobOffset {
			continue
		}
		p := layer[s.BlobOffset : s.BlobOffset+s.BlobSize]
		if sha256.Sum256(p) != s.Digest || c.Digest != [sha256.Size]byte{} || c.BlobSize != s.BlobSize {
			t.Fatalf("span %d, %+v, does not match its digest", i, s)
		}
		if idx.Compression != index.Gzip {
			return Decompress(t, p, idx.Compression)
		}
		var window []byte
		if s.Window >= 0 {
			window = make([]byte, index.WindowSize)
			if _, err := idx.Windows.ReadAt(window, s.Window); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		}
		z := inflate.NewReader(nil)
		if err := z.Resume(bytes.NewReader(p), s.Bits, window); err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(z)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) { // in the middle of the stream
			t.Fatalf("span %d: %v", i, err)
		}
		return plain
	}
	t.Fatalf("chunk %+v lies in no span", c)
	return nil
}

func sum(p []byte) string {
	s := sha256.Sum256(p)
	return hex.EncodeToString(s[:])
}

// Source serves one blob from memory. It counts requests.
type Source struct {
	Blob     []byte
	Requests int
	Bytes    int64
}

var _ blob.Source = (*Source)(nil)

// Open implements [blob.Source].
func (s *Source) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := desc.CheckRange(offset, length); err != nil {
		return nil, err
	}
	if offset+length > int64(len(s.Blob)) {
		return nil, fmt.Errorf("range %d+%d of %d bytes", offset, length, len(s.Blob))
	}
	s.Requests++
	s.Bytes += length
	return io.NopCloser(bytes.NewReader(s.Blob[offset : offset+length])), nil
}

func (s *Source) String() string { return "memory" }
