// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast/holdfast/internal/testimage"
)

// Next returns the layers of the sample's next version: one small file in twenty is
// another one, and all have been packed anew, with new times.
func (s Sample) Next(ctx context.Context, f testimage.Format) ([]testimage.Layer, error) {
	if _, err := s.Layers(ctx, f); err != nil { // makes the tars
		return nil, err
	}
	var layers []testimage.Layer
	for _, name := range []string{s.rootName(), s.weightsName()} {
		l, err := s.layer(ctx, name+"-next", f, func(_ context.Context, tarPath string) error {
			s.Log("changing files of %s", name)
			return replace(tarPath, func(tmp string) error { return changeTar(filepath.Join(s.Dir, name+".tar"), tmp) })
		})
		if err != nil {
			return nil, fmt.Errorf("making the next sample image: %w", err)
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// changeTar copies a tar and changes it.
func changeTar(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // read only
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	buffered := bufio.NewWriterSize(out, 1<<20)
	w := tar.NewWriter(buffered)
	for r := tar.NewReader(bufio.NewReaderSize(in, 1<<20)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return errors.Join(w.Close(), buffered.Flush())
		}
		if err != nil {
			return err
		}
		h.ModTime = h.ModTime.Add(24 * time.Hour)
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		var content io.Reader = r
		if isChanged(h) {
			content = inverted{r}
		}
		if _, err := io.Copy(w, content); err != nil {
			return err
		}
	}
}

// isChanged reports whether a file is another one in the next version.
func isChanged(h *tar.Header) bool {
	const largest = 64 << 20
	sum := fnv.New32a()
	_, _ = io.WriteString(sum, h.Name) // never fails
	return h.Typeflag == tar.TypeReg && h.Size < largest && sum.Sum32()%20 == 0
}

// inverted reads something with all bits inverted.
type inverted struct{ r io.Reader }

func (i inverted) Read(p []byte) (int, error) {
	n, err := i.r.Read(p)
	for k := range p[:n] {
		p[k] = ^p[k]
	}
	return n, err
}
