// SPDX-License-Identifier: Apache-2.0

package toc

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path"
	"strings"
	"unicode/utf8"

	"github.com/holdfast/holdfast/internal/index"
)

// entry adds one entry, or one more chunk of the file before it.
func (d *decoder) entry(e *entry) error {
	if e.Type == "chunk" {
		if e.Name != d.file.name {
			return fmt.Errorf("chunk of %.256q without its file: %w", e.Name, index.ErrInvalid)
		}
		return d.chunk(e)
	}
	h, err := header(e)
	if err != nil {
		return err
	}
	added, err := index.FromTar(h)
	if err != nil {
		return err
	}
	if err := d.b.Add(added); err != nil {
		return err
	}
	_, size := d.b.Content()
	d.file = file{name: e.Name, digest: e.Digest, size: size}
	switch strings.TrimPrefix(path.Clean("/"+e.Name), "/") {
	case prefetchLandmark:
		d.facts.HasLandmark, d.facts.Prefetch = true, e.Offset
	case noPrefetchLandmark:
		d.facts.HasLandmark = true
	}
	if e.Type != "reg" {
		return nil
	}
	return d.chunk(e)
}

// header is the tar header that the entry was made from.
func header(e *entry) (*tar.Header, error) {
	kind, ok := tarType(e.Type)
	if !ok {
		return nil, fmt.Errorf("entry %.256q is of type %.16q: %w", e.Name, e.Type, index.ErrInvalid)
	}
	h := &tar.Header{
		Typeflag: kind, Name: e.Name, Linkname: e.LinkName, Size: e.Size, Mode: e.Mode,
		Uid: e.UID, Gid: e.GID, ModTime: e.ModTime, Devmajor: e.DevMajor, Devminor: e.DevMinor,
	}
	text := []string{e.Name, e.LinkName}
	if len(e.Xattrs) > 0 {
		h.PAXRecords = make(map[string]string, len(e.Xattrs))
		for k, v := range e.Xattrs {
			h.PAXRecords["SCHILY.xattr."+k] = string(v)
			text = append(text, k)
		}
	}
	// A name that is not UTF-8 cannot be written in JSON: encoders put the
	// replacement character in, and the true name is lost.
	for _, s := range text {
		if strings.ContainsRune(s, utf8.RuneError) {
			return nil, fmt.Errorf("name %.256q is not what the layer holds: %w", s, index.ErrInvalid)
		}
	}
	return h, nil
}

// chunk adds the chunk that an entry of type reg or chunk describes.
func (d *decoder) chunk(e *entry) error {
	if d.file.size == 0 {
		return nil
	}
	c := index.Chunk{
		Offset: e.ChunkOffset, Size: e.ChunkSize,
		BlobOffset: e.Offset, BlobSize: index.ToNext, InnerOffset: e.InnerOffset,
	}
	if c.Size == 0 {
		c.Size = d.file.size - c.Offset // to the end of the file
	}
	switch e.ChunkType {
	case "":
		sum, err := d.chunkDigest(e, c)
		if err != nil {
			return err
		}
		c.Digest = sum
	case "zeros":
		c.BlobSize = 0
	default:
		return fmt.Errorf("chunk of %.256q is of type %.16q: %w", e.Name, e.ChunkType, index.ErrInvalid)
	}
	if err := d.b.AddChunk(c); err != nil {
		return err
	}
	end := Position{Offset: c.BlobOffset, End: c.InnerOffset + c.Size, FileSize: d.file.size}
	if last := d.facts.Last; c.BlobSize != 0 && (end.Offset > last.Offset || end.Offset == last.Offset && end.End > last.End) {
		d.facts.Last = end
	}
	return nil
}

// chunkDigest is the digest of a chunk; that of the file will do for a chunk that
// is all of it.
func (d *decoder) chunkDigest(e *entry, c index.Chunk) ([sha256.Size]byte, error) {
	text := e.ChunkDigest
	if text == "" && c.Offset == 0 && c.Size == d.file.size {
		text = d.file.digest
	}
	sum, err := Sum(text)
	if err != nil {
		return sum, fmt.Errorf("chunk %d+%d of %.256q: %w", c.Offset, c.Size, e.Name, err)
	}
	return sum, nil
}

// Sum returns the bytes of a sha256 digest, the only kind that an index holds.
func Sum(text string) (sum [sha256.Size]byte, err error) {
	encoded, ok := strings.CutPrefix(text, "sha256:")
	if !ok || len(encoded) != hex.EncodedLen(len(sum)) {
		return sum, fmt.Errorf("digest %.128q is no sha256: %w", text, index.ErrInvalid)
	}
	if _, err := hex.Decode(sum[:], []byte(encoded)); err != nil {
		return sum, fmt.Errorf("digest %.128q: %w: %w", text, index.ErrInvalid, err)
	}
	return sum, nil
}
