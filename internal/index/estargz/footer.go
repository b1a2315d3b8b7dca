// SPDX-License-Identifier: Apache-2.0

package estargz

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"

	"github.com/holdfast/holdfast/internal/index"
)

// A footer is an empty gzip member whose header has an extra field with the
// offset of the TOC. The legacy form lacks the field's own header.
//
//	gzip header 10, length of extra 2 | "SG", length 2+2 | offset in hex 16, "STARGZ" | deflate 5, gzip trailer 8
const (
	footerSize       = 51
	legacyFooterSize = 47
	magic            = "STARGZ"
	offsetDigits     = 16
)

// emptyMember is what follows the extra field: an empty stored block, and
// checksum and length of nothing.
var emptyMember = [...]byte{1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0}

// parseFooter returns where the TOC starts and where the footer does, in a blob of
// blobSize bytes of which tail is the end.
func parseFooter(tail []byte, blobSize int64) (tocOffset, tocEnd int64, err error) {
	for _, size := range []int{footerSize, legacyFooterSize} {
		if len(tail) < size {
			continue
		}
		digits, ok := footerDigits(tail[len(tail)-size:])
		if !ok {
			continue
		}
		at, err := strconv.ParseUint(digits, 16, 63)
		end := blobSize - int64(size)
		if err != nil || int64(at) >= end { //nolint:gosec // 63 bits
			return 0, 0, fmt.Errorf("footer with offset %q in %d bytes: %w", digits, blobSize, index.ErrInvalid)
		}
		return int64(at), end, nil //nolint:gosec // 63 bits
	}
	return 0, 0, fmt.Errorf("no footer: %w", index.ErrNoIndex)
}

// footerDigits returns the offset as it is written in a footer.
func footerDigits(p []byte) (string, bool) {
	head, extra, end := p[:12], p[12:len(p)-len(emptyMember)], p[len(p)-len(emptyMember):]
	if !bytes.HasPrefix(head, []byte{0x1f, 0x8b, 8, 4}) || !bytes.Equal(end, emptyMember[:]) ||
		int(binary.LittleEndian.Uint16(head[10:])) != len(extra) {
		return "", false
	}
	if len(p) == footerSize {
		if !bytes.HasPrefix(extra, []byte{'S', 'G', byte(offsetDigits + len(magic)), 0}) {
			return "", false
		}
		extra = extra[4:]
	}
	digits, ok := bytes.CutSuffix(extra, []byte(magic))
	return string(digits), ok && len(digits) == offsetDigits
}
