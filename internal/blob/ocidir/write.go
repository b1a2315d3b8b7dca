// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/filelock"
)

// The file that a writer holds locked, and the directory of blobs on their way.
const (
	writerLock = ".writer.lock"
	ingestDir  = ".ingest"
)

// ErrBusy means that another process is writing to a layout.
var ErrBusy = errors.New("another process is writing to it; try again when it has ended")

// Writer writes a layout that is a directory. Readers see each change as a whole:
// blobs are verified, durable and complete before they have their name, and are
// there before index.json names them. There is one writer at a time. Its methods
// but [Writer.Put] are called one at a time.
type Writer struct {
	*Layout
	// Compact leaves out white space in index.json, for readers that parse it often.
	Compact bool

	lock *os.File
}

// Create opens the layout in a directory for writing, and makes what is missing of
// it, readable by everybody. The error is [ErrBusy] while there is another writer.
// What an earlier one left unfinished goes.
func Create(dir string) (_ *Writer, err error) {
	w := &Writer{Layout: New(dir)}
	defer func() {
		if err != nil {
			err = fmt.Errorf("opening OCI layout %s for writing: %w", dir, errors.Join(err, w.Close()))
		}
	}()
	for _, d := range []string{dir, filepath.Join(dir, v1.ImageBlobsDir, digest.SHA256.String()), filepath.Join(dir, ingestDir)} {
		if err := os.MkdirAll(d, 0o755); err != nil { //nolint:gosec // runtimes read layouts as any user
			return nil, err
		}
	}
	if w.lock, err = os.OpenFile(filepath.Join(dir, writerLock), os.O_CREATE|os.O_RDWR, 0o644); err != nil { //nolint:gosec // as above
		return nil, err
	}
	if err := filelock.Try(w.lock); errors.Is(err, filelock.ErrHeld) {
		return nil, ErrBusy
	} else if err != nil {
		return nil, err
	}
	left, err := os.ReadDir(filepath.Join(dir, ingestDir))
	for _, e := range left {
		err = errors.Join(err, os.Remove(filepath.Join(dir, ingestDir, e.Name())))
	}
	if err := errors.Join(err, atomicfile.Clean(dir)); err != nil {
		return nil, err
	}
	layout := filepath.Join(dir, v1.ImageLayoutFile)
	if _, err := os.Stat(layout); errors.Is(err, fs.ErrNotExist) {
		text := []byte(`{"imageLayoutVersion":"` + v1.ImageLayoutVersion + `"}`)
		if err := atomicfile.Write(layout, text, 0o644); err != nil {
			return nil, err
		}
	}
	if _, err := os.Stat(filepath.Join(dir, v1.ImageIndexFile)); errors.Is(err, fs.ErrNotExist) {
		return w, w.writeIndex(v1.Index{})
	}
	return w, nil
}

// Close ends the writing.
func (w *Writer) Close() error {
	if w.lock == nil {
		return nil
	}
	return w.lock.Close() // ends the lock
}

// Has reports whether a blob is there, with its size. It does not read it.
func (w *Writer) Has(ctx context.Context, desc blob.Descriptor) (bool, error) {
	size, err := w.Stat(ctx, desc.Digest)
	if errors.Is(err, blob.ErrNotFound) {
		return false, nil
	}
	return err == nil && size == desc.Size, err
}

// Put stores a blob, which is [blob.ErrCorrupt] if it is not what its digest and
// its size say. It may be called concurrently.
func (w *Writer) Put(ctx context.Context, desc blob.Descriptor, content io.Reader) (err error) {
	err = w.store(func(to io.Writer) (digest.Digest, error) { return desc.Digest, Copy(ctx, to, desc, content) })
	if err != nil {
		return fmt.Errorf("storing blob %s in %s: %w", desc.Digest, w.path, err)
	}
	return nil
}

// Ingest stores content whose digest is not known yet, as a blob. It may be called
// concurrently.
func (w *Writer) Ingest(ctx context.Context, content io.Reader) (desc blob.Descriptor, err error) {
	err = w.store(func(to io.Writer) (digest.Digest, error) {
		sum := digest.SHA256.Digester()
		desc.Size, err = io.CopyBuffer(io.MultiWriter(to, sum.Hash()), contextReader{ctx, content}, make([]byte, pieceSize))
		desc.Digest = sum.Digest()
		return desc.Digest, err
	})
	if err != nil {
		return blob.Descriptor{}, fmt.Errorf("storing a blob in %s: %w", w.path, err)
	}
	return desc, nil
}

// contextReader is a reader until the context ends.
type contextReader struct {
	ctx context.Context //nolint:containedctx // of one copy
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(p)
}

// store stores what fill writes under the digest that it returns.
func (w *Writer) store(fill func(io.Writer) (digest.Digest, error)) (err error) {
	f, err := os.CreateTemp(filepath.Join(w.path, ingestDir), "blob-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	d, err := fill(&writeBehind{f: f})
	if err == nil {
		err = errors.Join(f.Chmod(0o644), f.Sync())
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	name, err := blobPath(d)
	if err != nil {
		return err
	}
	target := filepath.Join(w.path, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil { //nolint:gosec // runtimes read layouts as any user
		return err
	}
	if err := os.Rename(f.Name(), target); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(target))
}

// List replaces what index.json lists.
func (w *Writer) List(ctx context.Context, change func([]v1.Descriptor) ([]v1.Descriptor, error)) error {
	idx, err := w.Index(ctx)
	if err == nil {
		idx.Manifests, err = change(append([]v1.Descriptor(nil), idx.Manifests...))
	}
	if err != nil {
		return err
	}
	return w.writeIndex(idx)
}

func (w *Writer) writeIndex(idx v1.Index) error {
	idx.Versioned, idx.MediaType = specs.Versioned{SchemaVersion: 2}, v1.MediaTypeImageIndex
	if idx.Manifests == nil {
		idx.Manifests = []v1.Descriptor{}
	}
	body, err := json.Marshal(idx)
	if err == nil && !w.Compact {
		body, err = json.MarshalIndent(idx, "", "  ")
	}
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(w.path, v1.ImageIndexFile), append(body, '\n'), 0o644)
}
