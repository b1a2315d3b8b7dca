// SPDX-License-Identifier: Apache-2.0

package startup

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/erofs/go-erofs"
)

// tree is the file tree of an image: its layers, base first.
type tree []Layer

var errNoFile = errors.New("no such file")

// content is an open file.
type content struct {
	io.ReaderAt
	size  int64
	wait  func(n int64) error // returns when the first n bytes are there
	close func()
}

// Size is the size of the file in bytes.
func (c *content) Size() int64 { return c.size }

// open opens a file by the name that resolve returned.
func (t tree) open(ctx context.Context, name string) (*content, error) {
	for i := len(t) - 1; i >= 0; i-- {
		info, err := fs.Lstat(t[i].FS, name)
		if err != nil {
			continue
		}
		if !info.Mode().IsRegular() {
			return nil, errNoFile
		}
		return t[i].open(ctx, name, info)
	}
	return nil, errNoFile
}

func (l Layer) open(ctx context.Context, name string, info fs.FileInfo) (*content, error) {
	c := &content{size: info.Size(), wait: func(int64) error { return nil }, close: func() {}}
	if placed, ok := info.(interface{ DataRange() []erofs.DataRange }); ok {
		ranges := placed.DataRange()
		if len(ranges) != 1 || ranges[0].Device != 0 || ranges[0].Offset < l.Origin || ranges[0].Size < c.size {
			return nil, errNoFile
		}
		start := ranges[0].Offset - l.Origin
		c.ReaderAt = io.NewSectionReader(patient{ctx, l.Data}, start, c.size)
		c.wait = func(n int64) error {
			release, err := l.Data.Wait(ctx, start, int(n))
			if err == nil {
				release()
			}
			return err
		}
		return c, nil
	}
	f, err := l.FS.Open(name)
	if err != nil {
		return nil, err
	}
	r, ok := f.(io.ReaderAt)
	if !ok {
		return nil, errors.Join(errNoFile, f.Close())
	}
	c.ReaderAt, c.close = r, func() { _ = f.Close() } // read only
	return c, nil
}

// patient waits for what it reads.
type patient struct {
	ctx  context.Context // of the one Warm that made it
	data Data
}

func (p patient) ReadAt(b []byte, off int64) (int, error) {
	release, err := p.data.Wait(p.ctx, off, len(b))
	if err != nil {
		return 0, err
	}
	defer release()
	return p.data.ReadAt(b, off)
}

// resolve follows symbolic links, as within the container's root, and returns
// the name of an existing file without any on its way.
func (t tree) resolve(name string) (string, bool) {
	at := "" // resolved so far
	rest := strings.Split(path.Clean("/" + name)[1:], "/")
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = strings.TrimPrefix(path.Dir("/"+at), "/")
			continue
		}
		next := path.Join(at, part)
		target, isLink, ok := t.lookup(next)
		switch {
		case !ok:
			return "", false
		case !isLink:
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", false
		}
		if strings.HasPrefix(target, "/") {
			at = ""
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return at, at != ""
}

// lookup finds a name in the topmost layer that has it, a whiteout included.
func (t tree) lookup(name string) (target string, isLink, ok bool) {
	for i := len(t) - 1; i >= 0; i-- {
		info, err := fs.Lstat(t[i].FS, name)
		if err != nil {
			continue
		}
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			target, err = fs.ReadLink(t[i].FS, name)
			return target, true, err == nil
		case info.Mode().IsRegular(), info.IsDir():
			return "", false, true
		default: // a whiteout, or nothing that can be run
			return "", false, false
		}
	}
	return "", false, false
}
