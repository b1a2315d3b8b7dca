// SPDX-License-Identifier: Apache-2.0

package indexes

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/index"
)

// Digests is what belongs to a layer's index and has no place in its zTOC: whose
// index it is, the digest of the zTOC, and those of the files, by which the ones that
// another layer has too are found.
//
// On disk it is a magic number, then digests: of the blob, of the decompressed
// blob (the diff ID), of the zTOC, of each regular file with content, in the order of
// the layer.
type Digests struct {
	Blob, DiffID digest.Digest
	// ZTOC tells a zTOC that a disk has damaged: spans whose windows are wrong
	// decompress to wrong bytes, which nothing else would notice.
	ZTOC  digest.Digest
	Files [][sha256.Size]byte
}

const digestsMagic = "HFDIGST1"

// maxDigests is how long the document may be.
func maxDigests() int64 {
	return int64(len(digestsMagic)) + sha256.Size*int64(3+index.DefaultLimits().Entries)
}

// Encode writes the document.
func (d Digests) Encode(w io.Writer) error {
	buf := []byte(digestsMagic)
	for _, dig := range []digest.Digest{d.Blob, d.DiffID, d.ZTOC} {
		if dig.Validate() != nil || dig.Algorithm() != digest.SHA256 {
			return fmt.Errorf("digest %q: only sha256 is supported", dig)
		}
		raw, err := hex.DecodeString(dig.Encoded())
		if err != nil {
			return fmt.Errorf("digest %q: %w", dig, err)
		}
		buf = append(buf, raw...)
	}
	for _, f := range d.Files {
		buf = append(buf, f[:]...)
	}
	if _, err := w.Write(buf); err != nil {
		return fmt.Errorf("writing digests: %w", err)
	}
	return nil
}

// DecodeDigests reads the document of the layer. One of another layer is
// [index.ErrInvalid].
func DecodeDigests(p []byte, layer digest.Digest) (Digests, error) {
	rest, ok := bytes.CutPrefix(p, []byte(digestsMagic))
	if !ok || len(rest)%sha256.Size != 0 || len(rest) < 3*sha256.Size || int64(len(p)) > maxDigests() {
		return Digests{}, fmt.Errorf("digests of %d bytes: %w", len(p), index.ErrInvalid)
	}
	next := func() (sum [sha256.Size]byte) {
		copy(sum[:], rest)
		rest = rest[sha256.Size:]
		return sum
	}
	named := func() digest.Digest {
		sum := next()
		return digest.NewDigestFromBytes(digest.SHA256, sum[:])
	}
	d := Digests{Blob: named(), DiffID: named(), ZTOC: named()}
	if d.Blob != layer {
		return Digests{}, fmt.Errorf("digests of layer %s: %w", d.Blob, index.ErrInvalid)
	}
	for len(rest) > 0 {
		d.Files = append(d.Files, next())
	}
	return d, nil
}
