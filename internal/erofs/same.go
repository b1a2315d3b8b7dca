// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// What of the superblock depends on the data of files: include/linux/erofs_fs.h,
// struct erofs_super_block, checksum and uuid.
const (
	checksumAt, checksumSize = 1024 + 4, 4
	uuidAt, uuidSize         = 1024 + 48, 16
)

// SameTree reports whether two images show the same tree at the same places of
// their devices, whatever the data is. It compares bytes: what [Write] makes of
// the same tree is the same.
func SameTree(a, b io.ReaderAt) (bool, error) {
	const step = 64 << 10
	x, y := make([]byte, step), make([]byte, step)
	for off := int64(0); ; off += step {
		n, errA := a.ReadAt(x, off)
		m, errB := b.ReadAt(y, off)
		if off == 0 && n >= uuidAt+uuidSize && m >= uuidAt+uuidSize {
			for _, p := range [][]byte{x, y} {
				clear(p[checksumAt : checksumAt+checksumSize])
				clear(p[uuidAt : uuidAt+uuidSize])
			}
		}
		if !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		endA, endB := errors.Is(errA, io.EOF), errors.Is(errB, io.EOF)
		switch {
		case endA && endB:
			return true, nil
		case errA != nil && !endA || errB != nil && !endB:
			return false, fmt.Errorf("comparing EROFS images: %w", errors.Join(errA, errB))
		}
	}
}
