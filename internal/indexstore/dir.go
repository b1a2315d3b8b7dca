// SPDX-License-Identifier: Apache-2.0

package indexstore

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// abandoned is the age from which on a file that is not complete is one whose
// writer was killed.
const abandoned = time.Hour

// Dir is a directory as a place: one file a document, <hex of the digest>.<kind>.
// It may be on media that are read-only, and shared by nodes. It need not exist
// until something is published.
type Dir struct {
	path string
}

var _ Place = (*Dir)(nil)

// NewDir returns the place that a directory is.
func NewDir(path string) *Dir { return &Dir{path: path} }

func (d *Dir) String() string { return "directory " + d.path }

// file is the path of a document.
func (d *Dir) file(subject digest.Digest, kind Kind) (string, error) {
	name, err := encoded(subject)
	if err != nil {
		return "", err
	}
	if !kind.known() {
		return "", fmt.Errorf("%q is no kind of document", kind)
	}
	return filepath.Join(d.path, name+"."+string(kind)), nil
}

// Fetch copies a document, as Place tells. Only regular files are documents.
func (d *Dir) Fetch(ctx context.Context, subject digest.Digest, kind Kind, limit int64, w io.Writer) error {
	name, err := d.file(subject, kind)
	if err != nil {
		return err
	}
	// Opening a pipe that nobody writes to would wait.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("opening %s of %s: %w", kind, subject, err)
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	switch {
	case err != nil:
		return fmt.Errorf("opening %s of %s: %w", kind, subject, err)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", name)
	case info.Size() > limit:
		return fmt.Errorf("%s has %d bytes, more than %d", name, info.Size(), limit)
	}
	n, err := io.Copy(w, io.LimitReader(contextReader{ctx, f}, info.Size()))
	if err == nil && n < info.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("copying %s: %w", name, err)
	}
	touch(name)
	return nil
}

// touch notes that a document is in use, where that is possible.
func touch(name string) {
	now := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_NOW}}
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, name, now, unix.AT_SYMLINK_NOFOLLOW) // read-only media, or somebody else's
}

// Publish writes documents, which everybody may read. Each is there whole or not
// at all, whenever somebody looks or the power fails.
func (d *Dir) Publish(ctx context.Context, p Publication) error {
	if err := d.create(); err != nil {
		return fmt.Errorf("publishing to %s: %w", d, err)
	}
	for _, l := range p.Layers {
		for kind, content := range map[Kind]Content{ZTOC: l.ZTOC, Digests: l.Digests, Chunks: l.Chunks} {
			if err := d.write(ctx, l.Layer.Digest, kind, content); err != nil {
				return err
			}
		}
	}
	if p.Profile == nil {
		return nil
	}
	return d.write(ctx, p.Image.Digest, Profile, bytes.NewReader(p.Profile))
}

// create makes the directory if there is none.
func (d *Dir) create() error {
	if _, err := os.Stat(d.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(d.path, 0o755); err != nil {
		return err
	}
	return os.Chmod(d.path, 0o755) // the umask may say otherwise
}

// write writes a document; nil is none.
func (d *Dir) write(ctx context.Context, subject digest.Digest, kind Kind, c Content) error {
	if c == nil {
		return nil
	}
	name, err := d.file(subject, kind)
	if err != nil {
		return err
	}
	return atomicfile.Create(name, 0o644, func(f *os.File) error {
		n, err := io.Copy(f, contextReader{ctx, reader(c)})
		if err == nil && n < c.Size() {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
}

// Entry is a document in a directory.
type Entry struct {
	Subject digest.Digest
	Kind    Kind
	Size    int64     // in bytes
	Used    time.Time // when it was written or, where that can be noted, last fetched
}

// List returns the documents in the directory, the one that has not been used for
// the longest time first. Other files are left out.
func (d *Dir) List() ([]Entry, error) {
	files, err := os.ReadDir(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing %s: %w", d, err)
	}
	var list []Entry
	for _, f := range files {
		name, kind, _ := strings.Cut(f.Name(), ".")
		e := Entry{Subject: digest.NewDigestFromEncoded(digest.SHA256, name), Kind: Kind(kind)}
		if !e.Kind.known() || e.Subject.Validate() != nil || !f.Type().IsRegular() {
			continue
		}
		info, err := f.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			return nil, fmt.Errorf("listing %s: %w", d, err)
		}
		e.Size, e.Used = info.Size(), info.ModTime()
		list = append(list, e)
	}
	slices.SortStableFunc(list, func(a, b Entry) int {
		return cmp.Or(a.Used.Compare(b.Used), strings.Compare(string(a.Subject), string(b.Subject)))
	})
	return list, nil
}

// Remove removes a document. That there is none is no error.
func (d *Dir) Remove(subject digest.Digest, kind Kind) error {
	name, err := d.file(subject, kind)
	if err != nil {
		return err
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing %s of %s: %w", kind, subject, err)
	}
	return nil
}

// Trim removes documents, those first that have not been used for the longest
// time, until the others have at most limit bytes; and what was left by those who
// were killed while they published.
func (d *Dir) Trim(limit int64) error {
	list, err := d.List()
	if err != nil {
		return err
	}
	var total int64
	for _, e := range list {
		total += e.Size
	}
	for _, e := range list {
		if total <= limit {
			break
		}
		if err := d.Remove(e.Subject, e.Kind); err != nil {
			return err
		}
		total -= e.Size
	}
	err = atomicfile.CleanBefore(d.path, time.Now().Add(-abandoned))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing has been published
	}
	return err
}

// contextReader is a reader until the context ends.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
