// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"

	"github.com/holdfast/holdfast/internal/index"
)

// Extended attributes follow their inode: a header, then each attribute with a
// fixed part, its name without prefix, and its value, padded to xattrAlign.
const (
	xattrHeader  = 12
	xattrFixed   = 4
	xattrAlign   = 4
	maxXattrSize = xattrHeader + (math.MaxUint16-1)*xattrAlign
)

// xattrPrefixes are the prefixes EROFS knows, by the number that stands for
// them. The two ACLs are whole names.
var xattrPrefixes = []struct {
	number byte
	prefix string
	whole  bool
}{
	{1, "user.", false},
	{2, "system.posix_acl_access", true},
	{3, "system.posix_acl_default", true},
	{4, "trusted.", false},
	{6, "security.", false},
}

// splitXattr returns the number of a name's prefix and the rest of the name.
func splitXattr(name string) (number byte, rest string, ok bool) {
	for _, p := range xattrPrefixes {
		if rest, ok := strings.CutPrefix(name, p.prefix); ok && p.whole == (rest == "") && len(rest) <= math.MaxUint8 {
			return p.number, rest, true
		}
	}
	return 0, "", false
}

// xattrSize is how many bytes the attributes take in an image.
func xattrSize(xattrs []index.Xattr) (int, error) {
	if len(xattrs) == 0 {
		return 0, nil
	}
	size := xattrHeader
	for _, x := range xattrs {
		_, rest, ok := splitXattr(x.Name)
		if !ok || len(x.Value) > math.MaxUint16 {
			return 0, fmt.Errorf("extended attribute %.64q of %d bytes: %w", x.Name, len(x.Value), ErrUnsupported)
		}
		size += int(alignUp(int64(xattrFixed+len(rest)+len(x.Value)), xattrAlign))
		if size > maxXattrSize {
			return 0, fmt.Errorf("more than %d bytes of extended attributes: %w", maxXattrSize, ErrUnsupported)
		}
	}
	return size, nil
}

// appendXattrs appends attributes that xattrSize has approved.
func appendXattrs(b []byte, xattrs []index.Xattr) []byte {
	if len(xattrs) == 0 {
		return b
	}
	b = append(b, make([]byte, xattrHeader)...)
	for _, x := range xattrs {
		number, rest, _ := splitXattr(x.Name)
		b = append(b, byte(len(rest)), number)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(x.Value))) //nolint:gosec // checked by xattrSize
		b = append(b, rest...)
		b = append(b, x.Value...)
		b = padTo(b, int(alignUp(int64(len(b)), xattrAlign)))
	}
	return b
}

// padTo appends zeros until b has n bytes.
func padTo(b []byte, n int) []byte {
	if n <= len(b) {
		return b
	}
	return append(b, make([]byte, n-len(b))...)
}
