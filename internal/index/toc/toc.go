// SPDX-License-Identifier: Apache-2.0

// Package toc reads the table of contents that eStargz and zstd:chunked layers
// carry: one JSON document, the same model in both.
//
// It parses while it reads and holds one entry at a time, so that a TOC which
// inflates to gigabytes costs no memory. It does not know where the TOC lies,
// nor does it verify it: packages estargz and zstdchunked do, and use nothing of
// what was read before the digest matched.
package toc

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/holdfast/holdfast/internal/index"
)

const (
	// MaxBytes is how long an uncompressed TOC may be.
	MaxBytes = 512 << 20
	// maxEntryBytes is how long one entry may be. The largest attribute has 64 KiB.
	maxEntryBytes = 1 << 20
)

// Landmark files in the root of a layer, made by estargz.Build. The offset of the
// first one is where the content ends that is to be fetched at once.
const (
	prefetchLandmark   = ".prefetch.landmark"
	noPrefetchLandmark = ".no.prefetch.landmark"
)

// Facts are what a decoder wants to know about a TOC besides its entries.
type Facts struct {
	// HasLandmark tells whether the layer holds a landmark file, of either kind.
	HasLandmark bool
	// Prefetch is the offset in the blob of the prefetch landmark; 0 without one.
	Prefetch int64
	// Last is the chunk with the largest offset in the blob; zero without chunks.
	Last Position
}

// Position tells where a chunk ends.
type Position struct {
	// Offset is where the chunk's frame starts in the blob, End where the chunk
	// ends in the decompressed frame.
	Offset, End int64
	// FileSize is the length of the file that the chunk belongs to.
	FileSize int64
}

// Decode reads a TOC from r, to its end, and adds its entries to b. Errors wrap
// [index.ErrInvalid], [index.ErrTooLarge], or come from r.
func Decode(r io.Reader, b *index.Builder) (Facts, error) {
	d := decoder{input: &limiter{r: r}, b: b}
	d.json = json.NewDecoder(d.input)
	if err := d.document(); err != nil {
		return Facts{}, d.explain(err)
	}
	d.input.limit = MaxBytes
	if _, err := io.Copy(io.Discard, d.input); err != nil {
		return Facts{}, d.explain(err)
	}
	return d.facts, nil
}

type decoder struct {
	input *limiter
	json  *json.Decoder
	b     *index.Builder
	facts Facts
	file  file
}

// file is the regular file whose chunks are being read.
type file struct {
	name   string
	digest string
	size   int64 // of its content in the device: 0 for a whiteout
}

// entry is the union of what the two formats write; fields that only describe
// what others do already (userName, endOffset, accesstime) are left out.
type entry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	LinkName    string            `json:"linkName"`
	Mode        int64             `json:"mode"`
	Size        int64             `json:"size"`
	UID         int               `json:"uid"`
	GID         int               `json:"gid"`
	ModTime     time.Time         `json:"modtime"`
	DevMajor    int64             `json:"devMajor"`
	DevMinor    int64             `json:"devMinor"`
	Xattrs      map[string][]byte `json:"xattrs"`
	Digest      string            `json:"digest"`
	Offset      int64             `json:"offset"`
	InnerOffset int64             `json:"innerOffset"`
	ChunkOffset int64             `json:"chunkOffset"`
	ChunkSize   int64             `json:"chunkSize"`
	ChunkDigest string            `json:"chunkDigest"`
	ChunkType   string            `json:"chunkType"`
}

// value reads the next JSON value, which must be short.
func (d *decoder) value(v any) error {
	d.input.limit = d.json.InputOffset() + maxEntryBytes
	return d.json.Decode(v)
}

// token reads the next JSON token, which must be short.
func (d *decoder) token() (json.Token, error) {
	d.input.limit = d.json.InputOffset() + maxEntryBytes
	return d.json.Token()
}

// document reads {"version": 1, "entries": [...]}.
func (d *decoder) document() error {
	if err := d.delim('{'); err != nil {
		return err
	}
	version := 0
	for d.more() {
		key, err := d.token()
		if err != nil {
			return err
		}
		switch key {
		case "version":
			err = d.value(&version)
		case "entries":
			err = d.entries()
		default:
			err = d.value(new(json.RawMessage))
		}
		if err != nil {
			return err
		}
	}
	if err := d.delim('}'); err != nil {
		return err
	}
	if version != 1 {
		return fmt.Errorf("version %d: %w", version, index.ErrInvalid)
	}
	return nil
}

func (d *decoder) delim(want json.Delim) error {
	t, err := d.token()
	if err == nil && t != want {
		return fmt.Errorf("%v where %v should be: %w", t, want, index.ErrInvalid)
	}
	return err
}

// entries reads the array of entries, or null for none.
func (d *decoder) entries() error {
	t, err := d.token()
	if err != nil || t == nil {
		return err
	}
	if t != json.Delim('[') {
		return fmt.Errorf("entries are no array: %w", index.ErrInvalid)
	}
	var e entry
	for d.more() {
		e = entry{}
		if err := d.value(&e); err != nil {
			return err
		}
		if err := d.entry(&e); err != nil {
			return err
		}
	}
	return d.delim(']')
}

func (d *decoder) more() bool {
	d.input.limit = d.json.InputOffset() + maxEntryBytes
	return d.json.More()
}

// explain tells broken JSON from a broken reader.
func (d *decoder) explain(err error) error {
	switch {
	case d.input.err != nil && !errors.Is(d.input.err, io.EOF):
		err = d.input.err
	case errors.Is(err, index.ErrInvalid), errors.Is(err, index.ErrTooLarge):
	default: // not the JSON it should be
		err = fmt.Errorf("%w: %w", index.ErrInvalid, err)
	}
	return fmt.Errorf("reading table of contents near byte %d: %w", d.json.InputOffset(), err)
}

// limiter refuses to read past limit.
type limiter struct {
	r     io.Reader
	read  int64
	limit int64
	err   error // what r answered last
}

func (l *limiter) Read(p []byte) (int, error) {
	left := min(l.limit, MaxBytes) - l.read
	if left <= 0 {
		// Only what the reader would deliver counts as too much.
		var one [1]byte
		n, err := l.r.Read(one[:])
		if n == 0 {
			l.err = err
			return 0, err
		}
		l.err = fmt.Errorf("more than %d bytes, or %d in one entry: %w", MaxBytes, maxEntryBytes, index.ErrTooLarge)
		return 0, l.err
	}
	n, err := l.r.Read(p[:min(int64(len(p)), left)])
	l.read += int64(n)
	l.err = err
	return n, err
}

// tarType maps the type of an entry to that of a tar header.
func tarType(name string) (byte, bool) {
	switch name {
	case "reg":
		return tar.TypeReg, true
	case "dir":
		return tar.TypeDir, true
	case "symlink":
		return tar.TypeSymlink, true
	case "hardlink":
		return tar.TypeLink, true
	case "char":
		return tar.TypeChar, true
	case "block":
		return tar.TypeBlock, true
	case "fifo":
		return tar.TypeFifo, true
	}
	return 0, false
}
