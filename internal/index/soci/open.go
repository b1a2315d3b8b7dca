// SPDX-License-Identifier: Apache-2.0

package soci

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
)

// File is a zTOC in a file, mapped rather than read: a large layer's has more bytes
// than one wants to hold.
type File struct {
	Index  *index.Index // see Decode
	mapped []byte
}

// Open reads the zTOC in f, which nobody changes, of a blob of blobSize bytes. The
// errors are those of [Decode], or of the file system. f may be closed afterwards.
func Open(f *os.File, blobSize int64) (*File, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading zTOC: %w", err)
	}
	if info.Size() == 0 || info.Size() > MaxBytes {
		return nil, fmt.Errorf("reading zTOC of %d bytes: %w", info.Size(), index.ErrInvalid)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping zTOC: %w", err)
	}
	z := &File{mapped: m}
	// Most of it is windows, which are not looked at before they are written elsewhere.
	letGo := func() { _ = unix.Madvise(m, unix.MADV_DONTNEED) } // it only saves memory
	if z.Index, err = decode(m, blobSize, letGo); err != nil {
		return nil, errors.Join(err, z.Close())
	}
	letGo()
	if w := z.Index.Windows; w != nil {
		z.Index.Windows = &lean{ReaderAt: w, letGo: letGo}
	}
	return z, nil
}

// lean reads from a mapping, of which only a few MiB are in memory at a time. It is
// used by one goroutine.
type lean struct {
	io.ReaderAt
	letGo func()
	read  int
}

func (l *lean) ReadAt(p []byte, off int64) (int, error) {
	n, err := l.ReaderAt.ReadAt(p, off)
	const most = 2 << 20
	if l.read += n; l.read > most {
		l.read = 0
		l.letGo()
	}
	return n, err
}

// Close releases the document, which the index refers to until its windows have
// been read.
func (z *File) Close() error {
	m := z.mapped
	z.mapped = nil
	if m == nil {
		return nil
	}
	return unix.Munmap(m)
}
