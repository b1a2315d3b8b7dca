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
)

// Write replaces the file with data and makes it durable.
func Write(name string, data []byte, mode fs.FileMode) error {
	return Create(name, mode, func(w *os.File) error {
		_, err := w.Write(data)
		return err
	})
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
// the old file stays.
func Create(name string, mode fs.FileMode, fill func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
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
