// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"context"
	"io"
)

// calls bounds how many system calls about a layout are under way: one about a
// server that is gone may never return.
type calls chan struct{}

// await does what may hang, and leaves it behind when ctx ends. What it then comes
// by after all is dropped.
func await[T any](ctx context.Context, c calls, do func() (T, error), drop func(T)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	var none T
	if ctx.Err() != nil {
		return none, context.Cause(ctx)
	}
	select {
	case c <- struct{}{}:
	case <-ctx.Done():
		return none, context.Cause(ctx)
	}
	done := make(chan outcome, 1)
	go func() {
		value, err := do()
		<-c
		done <- outcome{value, err}
	}()
	select {
	case o := <-done:
		return o.value, o.err
	case <-ctx.Done():
		if drop != nil {
			go func() { drop((<-done).value) }()
		}
		return none, context.Cause(ctx)
	}
}

// readSize is how much is read by a call, in bytes.
const readSize = 1 << 20

// reader is a range of a file. What it reads goes to a buffer of its own first: a
// call that was left behind may still write there.
type reader struct {
	ctx     context.Context //nolint:containedctx // of one stream
	calls   calls
	file    *file
	at, end int64
	buf     []byte
	have    []byte // of buf, not passed on yet
	err     error
}

func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(r.have) == 0 {
		if err := r.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.have)
	r.have = r.have[n:]
	return n, nil
}

// fill reads on.
func (r *reader) fill() error {
	switch {
	case r.err != nil:
		return r.err
	case r.at == r.end:
		return io.EOF
	}
	if r.buf == nil {
		r.buf = make([]byte, min(readSize, r.end-r.at))
	}
	p := r.buf[:min(int64(len(r.buf)), r.end-r.at)]
	f, at := r.file, r.at
	if _, r.err = await(r.ctx, r.calls, func() (struct{}, error) { return struct{}{}, f.readAt(p, at) }, nil); r.err != nil {
		return r.err
	}
	r.at += int64(len(p))
	r.have = p
	return nil
}

// Close does not wait for a call that hangs: the descriptor is closed after it.
func (r *reader) Close() error {
	r.err = io.ErrClosedPipe
	return r.file.Close()
}
