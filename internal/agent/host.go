// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/render"
)

// host is the file system of the node.
type host struct{ root string }

// path is where a file of the node is from here. Links are followed as the node
// would, and do not lead out of it.
func (h host) path(p string) (string, error) {
	if h.root == "/" {
		return p, nil
	}
	return h.resolved(p)
}

// resolved is path without links, as mounts are listed: /mnt leads to /var/mnt on some nodes.
// What is not there stays as it is.
func (h host) resolved(p string) (string, error) {
	joined, err := securejoin.SecureJoin(h.root, p)
	if err != nil {
		return "", fmt.Errorf("looking for %s in %s: %w", p, h.root, err)
	}
	return joined, nil
}

// maxFile bounds configuration files.
const maxFile = 4 << 20

// read returns a file's content; the error wraps [fs.ErrNotExist] if there is none.
func (h host) read(p string) ([]byte, error) {
	name, err := h.path(p)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(name)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > maxFile) {
		err = fmt.Errorf("%s: want a file of at most 4 MiB", p)
	}
	if err != nil {
		return nil, err
	}
	return os.ReadFile(name)
}

// content is read for files that may be missing: nil then.
func (h host) content(p string) (*content, error) {
	data, err := h.read(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", p, err)
	}
	c := content(data)
	return &c, nil
}

// write replaces a file, or removes it if there is to be none.
func (h host) write(p string, data *content) error {
	name, err := h.path(p)
	if err != nil {
		return err
	}
	if data == nil {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing %s: %w", p, err)
		}
		return nil
	}
	// A link stays one, to what it leads to.
	if target, err := filepath.EvalSymlinks(name); err == nil {
		name = target
	}
	mode := fs.FileMode(0o644)
	if info, err := os.Stat(name); err == nil {
		mode = info.Mode().Perm()
	}
	err = os.MkdirAll(filepath.Dir(name), 0o755) //nolint:gosec // as packages make them
	if err == nil {
		err = atomicfile.WriteVia(stagingFor(name), name, []byte(*data), mode)
	}
	var named *fs.PathError
	if errors.As(err, &named) {
		err = named.Err // of a temporary file, whose name is another each time
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", p, err)
	}
	return nil
}

// exists reports whether the node has a file or directory.
func (h host) exists(p string) bool {
	name, err := h.path(p)
	if err == nil {
		_, err = os.Stat(name)
	}
	return err == nil
}

// stagingFor is where a file is made before it takes its place: CRI-O reads
// whatever is in its directory of drop-ins (pkg/config/config.go, UpdateFromPath).
func stagingFor(name string) string {
	dir := filepath.Dir(name)
	if filepath.Base(dir) == filepath.Base(render.CRIODropIns) {
		return filepath.Dir(dir)
	}
	return dir
}

// clean removes what a killed agent has left in the directories that it writes to.
func (h host) clean() error {
	var all error
	for _, p := range render.Paths() {
		name, err := h.path(p)
		if err == nil {
			err = atomicfile.Clean(stagingFor(name))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			all = errors.Join(all, err)
		}
	}
	return all
}

// content is what a file holds. In JSON it is text, so that people can read a state.
type content string

func (c *content) equal(other *content) bool {
	if c == nil || other == nil {
		return c == other
	}
	return *c == *other
}

// digestOf tells sets of files apart.
func digestOf(files map[string]*content) string {
	h := sha256.New()
	for _, p := range render.Paths() {
		if c := files[p]; c != nil {
			fmt.Fprintf(h, "%s %d\n%s", p, len(*c), *c)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// bootID differs from boot to boot.
func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// entry is where a name of the node is from here, also if it is a link: not what it
// leads to.
func (h host) entry(p string) (string, error) {
	dir, err := h.path(filepath.Dir(p))
	return filepath.Join(dir, filepath.Base(p)), err
}

// removeFile removes a file or a link itself.
func (h host) removeFile(p string) error {
	name, err := h.entry(p)
	if err != nil {
		return err
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing %s: %w", p, err)
	}
	return nil
}
