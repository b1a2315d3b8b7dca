// SPDX-License-Identifier: Apache-2.0

package index

import (
	"archive/tar"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Entry is one entry of a layer as its decoder read it: names as in a tar.
type Entry struct {
	// Name is the path; "./a", "/a" and "a/" all mean a. Dot-dot is refused.
	Name string
	// Mode is st_mode. Without type bits the entry is a hard link to Target; its
	// owner, permissions, time and attributes then become those of the target, as
	// extracting a tar does.
	Mode         uint32
	UID, GID     uint32
	ModTime      time.Time
	Size         int64
	Target       string // of a symbolic link, or the name a hard link refers to
	Major, Minor uint32
	Xattrs       map[string]string
	// Chunks cover [0, Size) of a regular file in order; Offset is relative to
	// the file. See [Builder.AddChunk], which may add them later instead.
	Chunks []Chunk
}

const (
	permissions = 0o7777          // of st_mode: with setuid, setgid and sticky
	paxXattr    = "SCHILY.xattr." // prefix of extended attributes in PAX records
	selinux     = "security.selinux"
	capability  = "security.capability"
)

// FromTar returns the entry that a tar header describes, without its chunks.
// What it keeps of the header is what the extraction in containers/storage
// keeps (pkg/archive, extractTarFileEntry).
func FromTar(h *tar.Header) (Entry, error) {
	e := Entry{Name: h.Name, Mode: uint32(h.Mode & permissions), ModTime: h.ModTime} //nolint:gosec // masked
	var err error
	if e.UID, err = unsigned(int64(h.Uid)); err != nil {
		return Entry{}, fmt.Errorf("owner of %.256q: %w", h.Name, err)
	}
	if e.GID, err = unsigned(int64(h.Gid)); err != nil {
		return Entry{}, fmt.Errorf("group of %.256q: %w", h.Name, err)
	}
	switch h.Typeflag {
	case tar.TypeReg:
		e.Mode |= unix.S_IFREG
		e.Size = h.Size
	case tar.TypeDir:
		e.Mode |= unix.S_IFDIR
	case tar.TypeSymlink:
		e.Mode |= unix.S_IFLNK
		e.Target = h.Linkname
	case tar.TypeLink:
		e.Target = h.Linkname
	case tar.TypeFifo:
		e.Mode |= unix.S_IFIFO
	case tar.TypeChar, tar.TypeBlock:
		e.Mode |= unix.S_IFCHR
		if h.Typeflag == tar.TypeBlock {
			e.Mode = e.Mode&permissions | unix.S_IFBLK
		}
		if e.Major, err = unsigned(h.Devmajor); err == nil {
			e.Minor, err = unsigned(h.Devminor)
		}
		if err != nil {
			return Entry{}, fmt.Errorf("device %.256q: %w", h.Name, err)
		}
	default:
		return Entry{}, fmt.Errorf("%.256q is of tar type %q: %w", h.Name, h.Typeflag, ErrInvalid)
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, paxXattr); ok && name != selinux {
			if e.Xattrs == nil {
				e.Xattrs = map[string]string{}
			}
			e.Xattrs[name] = v
		}
	}
	return e, nil
}

func unsigned(n int64) (uint32, error) {
	if n < 0 || n > math.MaxUint32 {
		return 0, fmt.Errorf("number %d: %w", n, ErrInvalid)
	}
	return uint32(n), nil
}

// cleanName returns a path relative to the root, "" for the root itself.
func cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", fmt.Errorf("name has a NUL byte: %w", ErrInvalid)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("name leaves its directory: %w", ErrInvalid)
		}
		if len(part) > unix.NAME_MAX {
			return "", fmt.Errorf("name has a part longer than %d bytes: %w", unix.NAME_MAX, ErrInvalid)
		}
	}
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if len(name) >= unix.PathMax {
		return "", fmt.Errorf("name of %d bytes: %w", len(name), ErrInvalid)
	}
	return name, nil
}

// checkXattr refuses attributes that a layer must not carry: overlayfs's own
// would let one layer redirect names into others, and ACLs (system.) would
// change the mode of the file.
func checkXattr(name, value string) error {
	prefix, rest, _ := strings.Cut(name, ".")
	switch {
	case rest == "" || len(name) > unix.NAME_MAX || len(value) > math.MaxUint16 || strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("extended attribute %.64q of %d bytes: %w", name, len(value), ErrInvalid)
	case strings.HasPrefix(name, "trusted.overlay."), strings.HasPrefix(name, "user.overlay."):
		return fmt.Errorf("extended attribute %q belongs to overlayfs: %w", name, ErrInvalid)
	case !slices.Contains([]string{"user", "trusted", "security"}, prefix):
		return fmt.Errorf("extended attribute %q: %w", name, ErrInvalid)
	}
	return nil
}

// setXattr returns xattrs, sorted by name, with one of them set.
func setXattr(xattrs []Xattr, name, value string) []Xattr {
	i, found := slices.BinarySearchFunc(xattrs, name, func(x Xattr, name string) int { return strings.Compare(x.Name, name) })
	if found {
		xattrs[i].Value = value
		return xattrs
	}
	return slices.Insert(xattrs, i, Xattr{name, value})
}

// extractedTime is the time a file has after its extraction: containers/storage
// (pkg/system, Chtimes) puts what lies outside of its range at the epoch, but
// for symbolic links, which may be older.
func extractedTime(t time.Time, mode uint32) time.Time {
	epoch := time.Unix(0, 0)
	first := epoch
	if mode&unix.S_IFMT == unix.S_IFLNK {
		first = time.Unix(0, math.MinInt64)
	}
	if t.Before(first) || t.After(time.Unix(0, math.MaxInt64)) {
		return epoch
	}
	return t
}
