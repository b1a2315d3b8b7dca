// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
)

// maxEntries bounds what is remembered of an archive.
const maxEntries = 1 << 20

// ErrCompressed means that an archive is compressed as a whole: nothing can be read
// from its middle.
var ErrCompressed = errors.New("the archive is compressed; uncompress it")

// identity tells versions of a file apart.
type identity struct {
	dev, ino    uint64
	size, mtime int64 // bytes; nanoseconds
}

// identify tells which file it is. Only of regular files anything is read: opening
// a pipe would wait.
func identify(f *os.File) (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return identity{}, blob.Temporary(fmt.Errorf("reading attributes of %s: %w", path.Base(f.Name()), err))
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return identity{}, fmt.Errorf("%s is no regular file", path.Base(f.Name()))
	}
	return identity{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim.Nano()}, nil
}

// file is an open file of a layout, or the part of an archive that it is.
type file struct {
	f      *os.File
	offset int64
	id     identity // with the size of the part
}

func (f *file) Close() error { return f.f.Close() }

// drop closes a file that nobody wants any more.
func (f *file) drop() {
	if f != nil {
		_ = f.f.Close() // read only
	}
}

// readAt reads all of p. A file that has become shorter, and a device that fails,
// may be right again later.
func (f *file) readAt(p []byte, at int64) error {
	_, err := f.f.ReadAt(p, f.offset+at)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return blob.Temporary(err)
}

// whole reads the file, of at most limit bytes.
func (f *file) whole(limit int64) ([]byte, error) {
	if f.id.size > limit {
		return nil, fmt.Errorf("its %d bytes are more than %d", f.id.size, limit)
	}
	p := make([]byte, f.id.size)
	return p, f.readAt(p, 0)
}

// files opens the files of a layout by their slash-separated paths.
type files interface {
	open(name string) (*file, error)
	all() (map[string]int64, error)
}

// files finds out what is at the layout's path now. It may hang.
func (l *Layout) files() (files, error) {
	info, err := os.Stat(l.path)
	switch {
	case err != nil:
		return nil, blob.Temporary(fmt.Errorf("it is not attached: %w", err))
	case info.IsDir():
		return directory(l.path), nil
	case !info.Mode().IsRegular():
		return nil, ErrNoLayout
	}
	return l.archive()
}

// directory is a layout that is a directory. Links in it cannot lead out of it.
type directory string

func (d directory) open(name string) (*file, error) {
	root, err := os.OpenRoot(string(d))
	if err != nil {
		return nil, err
	}
	defer root.Close() //nolint:errcheck // read only
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			err = blob.Temporary(err) // the device fails, the server has forgotten the file
		}
		return nil, err
	}
	id, err := identify(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &file{f: f, id: id}, nil
}

func (d directory) all() (map[string]int64, error) {
	all := map[string]int64{}
	err := filepath.WalkDir(string(d), func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(string(d), p)
		all[filepath.ToSlash(name)] = info.Size()
		if len(all) > maxEntries {
			err = fmt.Errorf("it has more than %d files", maxEntries)
		}
		return err
	})
	return all, err
}

// table is what an archive holds.
type table struct {
	id      identity
	entries map[string]blob.Range
}

// archive is a layout in a tar.
type archive struct {
	path  string
	table *table
}

// archive reads the table of an archive that has changed since it was last seen.
func (l *Layout) archive() (*archive, error) {
	f, err := os.OpenFile(l.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, blob.Temporary(err)
	}
	defer f.Close() //nolint:errcheck // read only
	id, err := identify(f)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	have := l.table
	l.mu.Unlock()
	if have == nil || have.id != id {
		have = &table{id: id}
		if have.entries, err = scan(f); err != nil {
			return nil, err
		}
		l.mu.Lock()
		l.table = have
		l.mu.Unlock()
	}
	return &archive{path: l.path, table: have}, nil
}

// scan finds the files of a tar. Their content is skipped, not read.
func scan(f io.ReadSeeker) (map[string]blob.Range, error) {
	head := make([]byte, 4)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, blob.Temporary(err)
	}
	if isCompressed(head[:n]) {
		return nil, ErrCompressed
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, blob.Temporary(err)
	}
	entries := map[string]blob.Range{}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return entries, nil
		case err != nil:
			return nil, fmt.Errorf("%w: %w", ErrNoLayout, err)
		case len(entries) == maxEntries:
			return nil, fmt.Errorf("%w: it has more than %d files", ErrNoLayout, maxEntries)
		case h.Typeflag != tar.TypeReg:
			continue
		}
		// The reader has read the header and nothing else. Of a sparse file, which
		// nobody makes a blob, this is not the content: no digest will match.
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, blob.Temporary(err)
		}
		entries[path.Clean(h.Name)] = blob.Range{Offset: at, Length: h.Size}
	}
}

// isCompressed tells gzip, zstd and xz by how they begin.
func isCompressed(head []byte) bool {
	for _, magic := range []string{"\x1f\x8b", "\x28\xb5\x2f\xfd", "\xfd7zX"} {
		if len(head) >= len(magic) && string(head[:len(magic)]) == magic {
			return true
		}
	}
	return false
}

func (a *archive) all() (map[string]int64, error) {
	all := make(map[string]int64, len(a.table.entries))
	for name, r := range a.table.entries {
		all[name] = r.Length
	}
	return all, nil
}

func (a *archive) open(name string) (*file, error) {
	r, ok := a.table.entries[name]
	if !ok {
		return nil, fmt.Errorf("opening %s: %w", name, fs.ErrNotExist)
	}
	f, err := os.OpenFile(a.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, blob.Temporary(err)
	}
	id, err := identify(f)
	if err == nil && id != a.table.id {
		err = blob.Temporary(fmt.Errorf("%s has just been replaced", a.path))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	id.size = r.Length
	return &file{f: f, offset: r.Offset, id: id}, nil
}
