// SPDX-License-Identifier: Apache-2.0

// Package verify reads the whole of a layer and compares it with what an index says
// about it: the digests of chunks or spans, the places where decompression can
// begin and what precedes them, and where in the layer files lie.
//
// It compares neither digests of the layer nor trees: its caller has those of the
// layer in the result. See [stream.Result.Check] and [erofs.CompareTree].
package verify

import (
	"context"
	"errors"
	"io"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/stream"
)

// Device takes in the content of a layer and compares it with its chunk table: a
// [device.Filling]. It is written to by another goroutine than the one that calls
// Blob.
type Device interface {
	io.WriterAt
	Blob(p []byte)
	Finish() *device.Mismatch
}

// Content reads a layer's blob of size bytes from r, and has its content compared
// with the table by d, whose table it is. It returns what the layer really is, and
// the first mismatch, nil if there is none. The error is that of [stream.ReadTree]
// and says nothing about the index.
func Content(ctx context.Context, r io.Reader, size int64, d Device, table *index.Table) (res *stream.Result, mismatch, err error) {
	out := newBehind(d)
	points := &pointCheck{table: table}
	res, err = stream.ReadTree(ctx, telling{r, d.Blob}, size, out, points.points())
	if err = errors.Join(err, out.close()); err != nil {
		return nil, nil, err
	}
	if m := d.Finish(); m != nil { // not an error that holds nil
		return res, m, nil
	}
	return res, points.finish(res.Index), nil
}

// telling tells what is read through it.
type telling struct {
	io.Reader
	tell func([]byte)
}

func (t telling) Read(p []byte) (int, error) {
	n, err := t.Reader.Read(p)
	t.tell(p[:n])
	return n, err
}
