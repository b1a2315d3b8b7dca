// SPDX-License-Identifier: Apache-2.0

package blobtest

import (
	"context"
	"io"
	"sync/atomic"

	"github.com/holdfast/holdfast/internal/blob"
)

// Call is one call of Open on a source made by [Inject].
type Call struct {
	N              int // counts calls from 1
	Desc           blob.Descriptor
	Offset, Length int64
}

// Fault says what goes wrong with one call. The zero Fault lets it pass.
//
// OpenErr fails the call itself. The others happen in the returned stream, when
// At bytes of it have been delivered, the first that is set in the order of the
// fields.
type Fault struct {
	OpenErr error

	At       int64
	Stall    bool  // wait until the context ends, then fail with its error
	ReadErr  error // fail with this
	Truncate bool  // end with io.EOF, against the contract
	Flip     byte  // change the byte at At by XOR with this, and go on
}

// Inject returns a source that asks script about every call and misbehaves as
// it says. Script is called by several goroutines if the source is.
func Inject(src blob.Source, script func(Call) Fault) blob.Source {
	return &faulty{src: src, script: script}
}

type faulty struct {
	src    blob.Source
	script func(Call) Fault
	calls  atomic.Int64
}

func (f *faulty) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	fault := f.script(Call{N: int(f.calls.Add(1)), Desc: desc, Offset: offset, Length: length})
	if fault.OpenErr != nil {
		return nil, fault.OpenErr
	}
	rc, err := f.src.Open(ctx, desc, offset, length)
	if err != nil {
		return nil, err
	}
	return &faultyReader{ReadCloser: rc, ctx: ctx, fault: fault}, nil
}

func (f *faulty) String() string { return f.src.String() }

type faultyReader struct {
	io.ReadCloser
	ctx   context.Context
	fault Fault
	pos   int64
}

func (r *faultyReader) Read(p []byte) (int, error) {
	breaks := r.fault.Stall || r.fault.ReadErr != nil || r.fault.Truncate
	if breaks {
		left := r.fault.At - r.pos
		if left <= 0 {
			return 0, r.broken()
		}
		p = p[:min(int64(len(p)), left)]
	}
	n, err := r.ReadCloser.Read(p)
	if i := r.fault.At - r.pos; !breaks && i >= 0 && i < int64(n) {
		p[i] ^= r.fault.Flip
	}
	r.pos += int64(n)
	return n, err
}

func (r *faultyReader) broken() error {
	switch {
	case r.fault.Stall:
		<-r.ctx.Done()
		return r.ctx.Err()
	case r.fault.ReadErr != nil:
		return r.fault.ReadErr
	default:
		return io.EOF
	}
}
