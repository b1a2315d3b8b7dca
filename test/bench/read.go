// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// fileSize is the size of the file that is read from start to end.
const fileSize = 1 << 30

// transfer is bytes that came over the line, and how long that took.
type transfer struct {
	Bytes int64         `json:"bytes"` // compressed
	Took  time.Duration `json:"took"`
}

func (t transfer) rate() float64 { return float64(t.Bytes) / t.Took.Seconds() }

// measureRead reads a large file that is not local, as dd does, and gets as much
// of the same blob over the same line in one HTTP request.
func (b *bench) measureRead(ctx context.Context) error {
	sample := b.sample
	sample.WeightsSize = fileSize
	image, err := sample.Image(ctx, testimage.EStargz)
	if err != nil {
		return err
	}
	ref, err := b.stand.Push(image, "file")
	if err != nil {
		return err
	}
	layer := image.Layers[len(image.Layers)-1].Descriptor
	for i := range b.pairs {
		var read transfer
		lazy := func() error {
			read, err = b.readCold(ctx, ref, layer.Digest)
			b.logTook(err, "reading 1 GiB: %.1f MB/s", read.rate()/1e6)
			b.report.Read.Mount = append(b.report.Read.Mount, read)
			return err
		}
		plain := func() error {
			got, err := b.get(ctx, "file", layer.Digest, min(layer.Size, fileSize))
			b.logTook(err, "one HTTP request: %.1f MB/s", got.rate()/1e6)
			b.report.Read.HTTP = append(b.report.Read.HTTP, got)
			return err
		}
		if err := inTurn(i, plain, lazy); err != nil {
			return err
		}
	}
	return nil
}

// readCold reads the file through the mount; afterwards it is forgotten.
func (b *bench) readCold(ctx context.Context, ref string, layer digest.Digest) (t transfer, err error) {
	d := b.stand.Daemon
	if err := d.PrepareAll(ctx, ref); err != nil {
		return t, err
	}
	defer func() {
		_, e := d.CLI(context.WithoutCancel(ctx), nil, "remove", ref)
		err = joined(err, e)
	}()
	if err := lab.DropPageCache(); err != nil {
		return t, err
	}
	start := time.Now()
	n, err := readFile(ctx, filepath.Join(d.LayerTree(layer), lab.WeightsPath), make([]byte, 1<<20))
	t.Took = time.Since(start)
	if err != nil {
		return t, err
	}
	if n != fileSize {
		return t, fmt.Errorf("the file has %d bytes, want %d", n, fileSize)
	}
	img, err := d.Client().Image(ctx, ref)
	if err != nil {
		return t, err
	}
	for _, l := range img.Layers {
		if l.Digest == layer && l.Device != nil {
			t.Bytes = l.Device.Touched
		}
	}
	return t, nil
}

// readFile reads all of a file and returns how much that was.
func readFile(ctx context.Context, name string, buf []byte) (total int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close() //nolint:errcheck // read only
	for ctx.Err() == nil {
		n, err := f.Read(buf)
		total += int64(n)
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
	return total, context.Cause(ctx)
}

// get fetches the first n bytes of a blob.
func (b *bench) get(ctx context.Context, repository string, d digest.Digest, n int64) (t transfer, err error) {
	if err := lab.DropPageCache(); err != nil {
		return t, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+b.stand.Host()+"/v2/"+repository+"/blobs/"+d.String(), nil)
	if err != nil {
		return t, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=0-%d", n-1))
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, ReadBufferSize: 256 << 10}}
	start := time.Now()
	res, err := client.Do(req)
	if err != nil {
		return t, err
	}
	defer res.Body.Close() //nolint:errcheck // read only
	if res.StatusCode != http.StatusPartialContent {
		return t, fmt.Errorf("getting blob %s: %s", d, res.Status)
	}
	t.Bytes, err = io.CopyBuffer(onlyWriter{io.Discard}, res.Body, make([]byte, 1<<20))
	t.Took = time.Since(start)
	if err == nil && t.Bytes != n {
		err = fmt.Errorf("getting blob %s: got %d bytes, want %d", d, t.Bytes, n)
	}
	return t, err
}

// onlyWriter hides io.Discard's own, small buffers.
type onlyWriter struct{ io.Writer }

// joined is errors.Join, but leaves a single error as it is.
func joined(a, b error) error {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	return errors.Join(a, b)
}
