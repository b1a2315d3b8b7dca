// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
)

// Sink is what a layout is written to: a directory, or an archive.
type Sink interface {
	// Has reports whether a blob is there already.
	Has(ctx context.Context, desc blob.Descriptor) (bool, error)
	// Put stores a blob, which is [blob.ErrCorrupt] if it is not what desc says. It may be
	// called concurrently.
	Put(ctx context.Context, desc blob.Descriptor, content io.Reader) error
	// List changes what index.json lists. All that is listed has been stored. In an
	// archive it is called once, at the end.
	List(ctx context.Context, change func([]v1.Descriptor) ([]v1.Descriptor, error)) error
}

var (
	_ Sink = (*Writer)(nil)
	_ Sink = (*ArchiveWriter)(nil)
)

// ArchiveWriter writes a layout as an uncompressed tar, from which a [Layout] reads
// any part of any blob. The file gets its name when it is complete and durable.
type ArchiveWriter struct {
	name string
	f    *os.File

	mu   sync.Mutex // protects the fields below; one blob is written at a time
	have map[digest.Digest]int64
	at   int64 // where the next file goes
}

// CreateArchive begins an archive.
func CreateArchive(name string) (*ArchiveWriter, error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*.tmp")
	if err != nil {
		return nil, fmt.Errorf("writing archive %s: %w", name, err)
	}
	return &ArchiveWriter{name: name, f: f, have: map[digest.Digest]int64{}}, nil
}

// Has reports whether a blob was stored before.
func (a *ArchiveWriter) Has(_ context.Context, desc blob.Descriptor) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	size, ok := a.have[desc.Digest]
	return ok && size == desc.Size, nil
}

// Put appends a blob.
func (a *ArchiveWriter) Put(ctx context.Context, desc blob.Descriptor, content io.Reader) error {
	name, err := blobPath(desc.Digest)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.have[desc.Digest]; ok {
		return nil
	}
	err = a.append(name, desc.Size, func(w io.Writer) error { return Copy(ctx, w, desc, content) })
	if err != nil {
		return fmt.Errorf("storing blob %s in %s: %w", desc.Digest, a.name, err)
	}
	a.have[desc.Digest] = desc.Size
	return nil
}

// append appends a file, or leaves the archive as it was. The caller holds a.mu.
func (a *ArchiveWriter) append(name string, size int64, fill func(io.Writer) error) error {
	if _, err := a.f.Seek(a.at, io.SeekStart); err != nil {
		return err
	}
	tw := tar.NewWriter(&writeBehind{f: a.f, at: a.at, begun: a.at})
	// The same content makes the same archive.
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatGNU}
	err := tw.WriteHeader(h)
	if err == nil {
		err = fill(tw)
	}
	if err == nil {
		err = tw.Flush()
	}
	if err != nil {
		return errors.Join(err, a.f.Truncate(a.at))
	}
	a.at, err = a.f.Seek(0, io.SeekCurrent)
	return err
}

// List completes the archive.
func (a *ArchiveWriter) List(_ context.Context, change func([]v1.Descriptor) ([]v1.Descriptor, error)) error {
	list, err := change(nil)
	if err != nil {
		return err
	}
	index, err := json.MarshalIndent(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: list}, "", "  ")
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, file := range []struct {
		name string
		body []byte
	}{
		{v1.ImageLayoutFile, []byte(`{"imageLayoutVersion":"` + v1.ImageLayoutVersion + `"}`)},
		{v1.ImageIndexFile, append(index, '\n')},
	} {
		err := a.append(file.name, int64(len(file.body)), func(w io.Writer) error {
			_, err := w.Write(file.body)
			return err
		})
		if err != nil {
			return fmt.Errorf("writing archive %s: %w", a.name, err)
		}
	}
	_, err = a.f.Write(make([]byte, 1024)) // the end of a tar
	if err == nil {
		err = errors.Join(a.f.Chmod(0o644), a.f.Sync())
	}
	if err == nil {
		err = os.Rename(a.f.Name(), a.name)
	}
	if err != nil {
		return fmt.Errorf("writing archive %s: %w", a.name, err)
	}
	return atomicfile.SyncDir(filepath.Dir(a.name))
}

// Close ends the writing. An archive that is not complete goes.
func (a *ArchiveWriter) Close() error {
	err := os.Remove(a.f.Name())
	if errors.Is(err, os.ErrNotExist) { // it has its name
		err = nil
	}
	return errors.Join(err, a.f.Close())
}

// writeBehind has the kernel begin to write to the disk while more is coming, so that
// making it durable in the end does not take long.
type writeBehind struct {
	f         *os.File
	at, begun int64 // offsets in the file
}

const behind = 8 << 20 // bytes

func (w *writeBehind) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	w.at += int64(n)
	if w.at-w.begun >= behind {
		// It matters to nobody if this fails.
		_ = unix.SyncFileRange(int(w.f.Fd()), w.begun, w.at-w.begun, unix.SYNC_FILE_RANGE_WRITE)
		w.begun = w.at
	}
	return n, err
}
