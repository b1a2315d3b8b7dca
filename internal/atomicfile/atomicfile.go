// SPDX-License-Identifier: Apache-2.0

// Package atomicfile replaces files so that a reader, and a machine that lost
// power, sees the old content or the new, never a part.
package atomicfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Write replaces the file with data and makes it durable.
func Write(name string, data []byte, mode fs.FileMode) error {
	return WriteVia(filepath.Dir(name), name, data, mode)
}

// WriteJSON replaces the file with v, indented for people to read.
func WriteJSON(name string, v any, mode fs.FileMode) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding %s: %w", name, err)
	}
	return Write(name, append(data, '\n'), mode)
}

// Create replaces the file with what fill writes. If fill or the disk fails,
// the old file stays. What is left if the process is killed, [Clean] removes.
func Create(name string, mode fs.FileMode, fill func(*os.File) error) (err error) {
	return create(filepath.Dir(name), name, mode, fill)
}

// WriteVia is Write for a directory all of whose files somebody reads, whatever their
// names: the new file is made in dir, on the same file system, and so is what a kill leaves.
func WriteVia(dir, name string, data []byte, mode fs.FileMode) error {
	return create(dir, name, mode, func(w *os.File) error {
		_, err := w.Write(data)
		return err
	})
}

// WriteIn is Write for a file below a directory that no link leads out of: name is a path in root,
// and a link of that name is replaced itself. Only one may write the file at a time; what a kill
// leaves, the next one replaces.
func WriteIn(root *os.Root, name string, data []byte, mode fs.FileMode) (err error) {
	temporary := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+suffix)
	if err := root.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("replacing %s: %w", name, err)
	}
	f, err := root.OpenFile(temporary, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("replacing %s: %w", name, err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = root.Rename(temporary, name)
	}
	if err != nil {
		return fmt.Errorf("replacing %s: %w", name, errors.Join(err, root.Remove(temporary)))
	}
	dir, err := root.Open(filepath.Dir(name))
	if err != nil {
		return fmt.Errorf("replacing %s: %w", name, err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func create(dir, name string, mode fs.FileMode, fill func(*os.File) error) (err error) {
	f, err := os.CreateTemp(dir, "."+filepath.Base(name)+".*"+suffix)
	if err != nil {
		return fmt.Errorf("replacing %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("replacing %s: %w", name, errors.Join(err, f.Close(), os.Remove(f.Name())))
		}
	}()
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	_ = f.Close() // it is synced; there is nothing left to fail
	return SyncDir(filepath.Dir(name))
}

// suffix ends the names of files that are not complete; they begin with a dot.
const suffix = ".tmp"

// Clean removes from dir what processes that were killed while they replaced a
// file have left. Nobody may be replacing one meanwhile.
func Clean(dir string) error {
	return clean(dir, func(fs.DirEntry) (bool, error) { return true, nil })
}

// CleanBefore is Clean where others may be replacing files: it removes what has
// not been written to since t.
func CleanBefore(dir string, t time.Time) error {
	return clean(dir, func(e fs.DirEntry) (bool, error) {
		info, err := e.Info() // it may be complete by now, and gone
		return err == nil && info.ModTime().Before(t), err
	})
}

func clean(dir string, which func(fs.DirEntry) (bool, error)) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cleaning %s: %w", dir, err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") || !strings.HasSuffix(e.Name(), suffix) {
			continue
		}
		ok, err := which(e)
		if err == nil && ok {
			err = os.Remove(filepath.Join(dir, e.Name()))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cleaning %s: %w", dir, err)
		}
	}
	return nil
}

// SyncDir makes names in a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing directory %s: %w", dir, err)
	}
	return errors.Join(d.Sync(), d.Close())
}

// ReadJSON reads a file of at most limit bytes into v.
func ReadJSON(name string, limit int64, v any) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return fmt.Errorf("reading %s: %w", name, err)
	}
	if int64(len(data)) > limit {
		return fmt.Errorf("reading %s: more than %d bytes", name, limit)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("reading %s: %w", name, err)
	}
	return nil
}
