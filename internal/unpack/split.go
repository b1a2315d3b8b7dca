// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

// split writes what a tar has besides the content of its files, as
// go.podman.io/storage does (layers.go, applyDiffWithOptions), and counts the files
// that have content. A tar that names a file twice cannot be split: then contents is
// -1. It reads all of it in any case.
func split(plain io.Reader, to io.Writer) (contents int, err error) {
	z, err := gzip.NewWriterLevel(to, gzip.BestSpeed)
	if err != nil {
		return 0, err
	}
	counting := &counter{Packer: storage.NewJSONPacker(z)}
	tarStream, done, err := asm.NewInputTarStreamWithDone(plain, counting, storage.NewDiscardFilePutter())
	if err == nil {
		_, err = io.Copy(io.Discard, tarStream)
		if packing := <-done; err == nil { // it writes until then
			err = packing
		}
		_ = tarStream.Close() // all of it has been read, or it has failed
	}
	if errors.Is(err, storage.ErrDuplicatePath) {
		counting.contents = -1
		_, err = io.Copy(io.Discard, plain)
	}
	if err := errors.Join(err, z.Close()); err != nil {
		return 0, fmt.Errorf("splitting the tar: %w", err)
	}
	return counting.contents, nil
}

// counter counts files that have content.
type counter struct {
	storage.Packer
	contents int
}

func (c *counter) AddEntry(e storage.Entry) (int, error) {
	if e.Type == storage.FileType && e.Size > 0 {
		c.contents++
	}
	return c.Packer.AddEntry(e)
}

// Join puts a tar together again from a tree and its tar-split, and writes it to to.
func Join(diff string, split io.Reader, to io.Writer) error {
	z, err := gzip.NewReader(split)
	if err != nil {
		return fmt.Errorf("reading tar-split: %w", err)
	}
	root, err := os.OpenRoot(diff) // no link leads out of it
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // read only
	return asm.WriteOutputTarStream(getter{root}, storage.NewJSONUnpacker(z), to)
}

// getter gives the content of files.
type getter struct{ root *os.Root }

func (g getter) Get(name string) (io.ReadCloser, error) { return g.root.Open(relative(name)) }
