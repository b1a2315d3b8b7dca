// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
)

// minClone is the smallest part of a chunk, in bytes, that is worth a transaction of
// the file system instead of a copy.
const minClone = 128 << 10

// Loan is the content of a chunk that another cache copies. It is read from its
// start to its end, by one goroutine, and closed once.
type Loan struct {
	hold  *hold
	chunk index.Chunk
	pos   int64 // in the chunk
}

var _ io.ReadCloser = (*Loan)(nil)

// Lend lends chunk i if it is on disk, where it stays until the loan is closed, or
// returns nil. It does not count as read: what has a copy is needed less than
// before. [File.Close] waits for loans and must not have begun.
func (f *File) Lend(i int) *Loan {
	h := f.pin(i, i+1)
	if !f.stored(i) {
		f.unpin(h)
		return nil
	}
	f.loans.Add(1)
	return &Loan{hold: h, chunk: f.table.At(i)}
}

// Stored reports whether chunk i is on disk at present.
func (f *File) Stored(i int) bool { return f.stored(i) }

// Read reads on in the chunk.
func (l *Loan) Read(p []byte) (int, error) {
	n := min(int64(len(p)), l.chunk.Size-l.pos)
	if n == 0 {
		return 0, io.EOF
	}
	got, err := l.hold.file.ReadAt(p[:n], l.chunk.Offset+l.pos)
	l.pos += int64(got)
	return got, err
}

// Close ends the loan.
func (l *Loan) Close() error {
	l.hold.file.unpin(l.hold)
	l.hold.file.loans.Done()
	return nil
}

// Clone lets the chunk have the disk blocks of a loan that has not been read, as far
// as the file system can share them, and returns for how many bytes, from the
// chunk's start. The rest is to be written. It comes before the first Write.
func (w *Writer) Clone(l *Loan) int64 {
	n := blockStart(min(l.chunk.Size, w.chunk.Size))
	aligned := blockStart(l.chunk.Offset) == l.chunk.Offset && blockStart(w.chunk.Offset) == w.chunk.Offset
	if w.buf != nil || w.n > 0 || !aligned || n < minClone {
		return 0
	}
	if err := w.file.clone(l.hold.file.data, l.chunk.Offset, n, w.chunk.Offset); err != nil {
		return 0 // most file systems cannot, and none must
	}
	w.n = n
	return n
}

// cloneRange shares n bytes at an offset of another file: see ioctl_ficlonerange(2).
func (f *File) cloneRange(from *os.File, off, n, to int64) error {
	conn, err := from.SyscallConn()
	if err != nil {
		return err
	}
	cerr := conn.Control(func(fd uintptr) {
		r := unix.FileCloneRange{Src_fd: int64(fd), Src_offset: uint64(off), Src_length: uint64(n), Dest_offset: uint64(to)} //nolint:gosec // checked: they lie in chunks
		err = f.control(func(dst int) error { return unix.IoctlFileCloneRange(dst, &r) })
	})
	if cerr != nil {
		return cerr
	}
	return err
}

// Room reports whether n bytes more can be stored without taking anything from
// readers.
func (f *File) Room(n int64) bool {
	s := f.space
	if f.Frozen() || s.paused() {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.limit == 0 || s.used+n <= s.limit-s.limit/reserveShare
}
