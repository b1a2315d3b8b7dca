// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// early is from which size on, in bytes, a file is on its way to the disk at once, so
// that the caller waits less when he makes everything durable.
const early = 1 << 20

// files takes the content of a layer's files, one after the other. It is the device of
// the layer's index: a file lies at an offset there.
type files struct {
	dir   string
	at    int64 // of the file that is written
	size  int64
	f     *os.File
	names map[int64]string // by offset
	taken int
}

// begin begins a file.
func (s *files) begin(at, size int64) error {
	if err := s.end(); err != nil {
		return err
	}
	if s.names == nil {
		s.names = map[int64]string{}
	}
	name := filepath.Join(s.dir, strconv.Itoa(len(s.names)))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	s.f, s.at, s.size = f, at, size
	s.names[at] = name
	return nil
}

// WriteAt writes content of the file that was begun last.
func (s *files) WriteAt(p []byte, at int64) (int, error) {
	if s.f == nil || at < s.at || at-s.at+int64(len(p)) > s.size {
		return 0, fmt.Errorf("content at %d belongs to no file", at)
	}
	return s.f.WriteAt(p, at-s.at)
}

// end ends the file that was begun last. What was not written of it are zeros.
func (s *files) end() error {
	if s.f == nil {
		return nil
	}
	err := s.f.Truncate(s.size)
	if err == nil && s.size >= early {
		// It only begins to write, and does not matter if it does not.
		_ = unix.SyncFileRange(int(s.f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
	}
	err = errors.Join(err, s.f.Close())
	s.f = nil
	return err
}

// take gives a file its place.
func (s *files) take(at int64, to string) error {
	name, ok := s.names[at]
	if !ok {
		return fmt.Errorf("there is no content at %d", at)
	}
	s.taken++
	return os.Rename(name, to)
}

// left counts files that have no place.
func (s *files) left() int { return len(s.names) - s.taken }
