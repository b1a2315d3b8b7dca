// SPDX-License-Identifier: Apache-2.0

// Package parts reads a blob from its start to its end by several requests at once.
//
// Object stores, and proxies before them, give each connection a share of what the
// line carries. The requests that are ahead are not read, only asked: what they send
// waits in the kernel's buffers, which is enough to keep the line busy.
package parts

import (
	"context"
	"errors"
	"io"

	"github.com/holdfast/holdfast/internal/blob"
)

const (
	// partSize is what one request asks for, in bytes: some times what the kernel
	// buffers of a connection.
	partSize = 16 << 20
	// ahead is how many requests are under way beside the one that is being read.
	ahead = 2
)

// Open reads all of a blob from src. What it returns is as [blob.Source] has it, with
// the errors of src; the caller closes it.
func Open(ctx context.Context, src blob.Source, desc blob.Descriptor) (io.ReadCloser, error) {
	return open(ctx, src, desc, 0, partSize)
}

// OpenFrom is Open for what of the blob begins at an offset.
func OpenFrom(ctx context.Context, src blob.Source, desc blob.Descriptor, offset int64) (io.ReadCloser, error) {
	return open(ctx, src, desc, offset, partSize)
}

func open(ctx context.Context, src blob.Source, desc blob.Descriptor, offset, size int64) (io.ReadCloser, error) {
	if desc.Size-offset <= size && offset == 0 {
		return src.Open(ctx, desc, 0, desc.Size)
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &reader{ctx: ctx, cancel: cancel, src: src, desc: desc, size: size, pos: offset}
	// The first one alone: it finds out what the others need, such as a token.
	first := min(size, desc.Size-offset)
	body, err := src.Open(ctx, desc, offset, first)
	if errors.Is(err, blob.ErrNoRange) && offset > 0 {
		if err = r.whole(); err == nil {
			return r, nil
		}
	}
	if err != nil {
		cancel()
		return nil, err
	}
	r.body, r.next = body, offset+first
	for range ahead {
		r.ask()
	}
	return r, nil
}

// reader is used by one goroutine.
type reader struct {
	ctx    context.Context //nolint:containedctx // of its requests
	cancel context.CancelFunc
	src    blob.Source
	desc   blob.Descriptor
	size   int64
	body   io.ReadCloser // of the part that is being read
	pos    int64         // in the blob
	next   int64         // where the next request begins
	asked  []chan answer // the parts behind that one, in order
}

type answer struct {
	body io.ReadCloser
	err  error
}

// ask begins the next request, if there is any.
func (r *reader) ask() {
	if r.next == r.desc.Size {
		return
	}
	at, n := r.next, min(r.size, r.desc.Size-r.next)
	r.next += n
	c := make(chan answer, 1)
	r.asked = append(r.asked, c)
	go func() {
		body, err := r.src.Open(r.ctx, r.desc, at, n)
		c <- answer{body, err}
	}()
}

func (r *reader) Read(p []byte) (int, error) {
	for {
		n, err := r.body.Read(p)
		r.pos += int64(n)
		if !errors.Is(err, io.EOF) || r.pos == r.desc.Size {
			return n, err
		}
		if err := r.advance(); err != nil {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
	}
}

// advance goes to the next part.
func (r *reader) advance() error {
	_ = r.body.Close()
	r.ask()
	if len(r.asked) == 0 {
		return io.ErrUnexpectedEOF // the source does not keep its contract
	}
	got := <-r.asked[0] // its request ends with the context
	r.asked = r.asked[1:]
	if errors.Is(got.err, blob.ErrNoRange) {
		return r.whole()
	}
	if got.err != nil {
		r.body = failed{got.err}
		return got.err
	}
	r.body = got.body
	return nil
}

// whole goes on with a source that sends blobs from their start only.
func (r *reader) whole() error {
	r.next = r.desc.Size
	body, err := r.src.Open(r.ctx, r.desc, 0, r.desc.Size)
	if err == nil {
		_, err = io.CopyN(io.Discard, body, r.pos)
	}
	if err != nil {
		r.body = failed{err}
		return err
	}
	r.body = body
	return nil
}

// Close ends all requests.
func (r *reader) Close() error {
	r.cancel()
	err := r.body.Close()
	for _, c := range r.asked {
		if got := <-c; got.body != nil {
			err = errors.Join(err, got.body.Close())
		}
	}
	r.asked = nil
	return err
}

// failed is a part that cannot be read.
type failed struct{ err error }

func (f failed) Read([]byte) (int, error) { return 0, f.err }
func (failed) Close() error               { return nil }
