// SPDX-License-Identifier: Apache-2.0

// Package retry makes a blob source patient: it asks again after temporary
// errors, and goes on with a broken stream from where it stopped.
//
// It retries what [blob.IsTemporary] names and nothing else, waits with full
// jitter, and never delivers a byte twice. It neither verifies bytes nor
// chooses another source.
package retry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
)

// progress is how many bytes have to arrive after a failure for the attempts to
// be counted anew. It bounds what a source that breaks all the time can cost,
// and lets a long stream survive more breaks than a short one.
const progress = 1 << 20

// Policy says how often and how patiently to retry.
type Policy struct {
	// Attempts is how often something is tried before its error is returned;
	// values below 1 count as 1. A stream that goes on for a mebibyte after a
	// failure has all its attempts again.
	Attempts int
	// Base is the longest wait before the second attempt; it doubles with each
	// attempt, up to Max. The wait itself is random between 0 and that, but at
	// least what the source asked for. If that is more than Max, the source is
	// not asked again: there may be others.
	Base, Max time.Duration
}

// Do calls f until it succeeds, fails with an error that is not temporary, or
// has used up the attempts. It returns the last error of f, or that of the
// context if it ended during a wait. A wait that the deadline of ctx would cut
// short is not begun.
func Do(ctx context.Context, p Policy, f func(ctx context.Context) error) error {
	for attempt := 1; ; attempt++ {
		err := f(ctx)
		if err == nil {
			return nil
		}
		if err := p.Wait(ctx, attempt, err); err != nil {
			return err
		}
	}
}

// Wait sleeps before the attempt that follows the given one, which failed with
// cause. An error means that there is no next attempt: cause if it is not
// temporary or the attempts are used up, or if ctx ends too early.
func (p Policy) Wait(ctx context.Context, attempt int, cause error) error {
	var temporary *blob.TemporaryError
	if !errors.As(cause, &temporary) {
		return cause
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("giving up after %q: %w", cause, err) //nolint:errorlint // it is not temporary any more
	}
	if attempt >= p.Attempts {
		return cause
	}
	if temporary.RetryAfter > p.Max {
		return cause
	}
	d := max(p.delay(attempt), temporary.RetryAfter)
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < d {
		return cause
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("giving up after %q: %w", cause, ctx.Err()) //nolint:errorlint // it is not temporary any more
	}
}

// delay is a random wait before the attempt that follows the given one.
func (p Policy) delay(attempt int) time.Duration {
	limit := p.Base
	for i := 1; i < attempt && limit < p.Max; i++ {
		limit *= 2
	}
	return rand.N(max(min(limit, p.Max), 0) + 1)
}

// New returns a source that reads from src with patience. It may be used as
// src may be, and keeps nothing between calls.
func New(src blob.Source, p Policy) blob.Source {
	return &source{src: src, policy: p}
}

type source struct {
	src    blob.Source
	policy Policy
}

func (s *source) String() string { return s.src.String() }

func (s *source) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if err := desc.CheckRange(offset, length); err != nil {
		return nil, err
	}
	if length == 0 {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	r := &reader{source: s, ctx: ctx, desc: desc, offset: offset, left: length}
	if err := r.open(); err != nil {
		return nil, err
	}
	return r, nil
}

// reader delivers [offset, offset+left) of the blob. After a break rc is nil
// and cause tells why.
type reader struct {
	*source
	ctx     context.Context // of the Open call that returned the reader
	desc    blob.Descriptor
	offset  int64
	left    int64
	rc      io.ReadCloser
	cause   error
	failed  int   // attempts that failed since the last progress
	arrived int64 // bytes since the last failure
	err     error // why the reader is at its end
}

// open gets a stream of what is left.
func (r *reader) open() error {
	for {
		if r.cause != nil {
			if err := r.wait(); err != nil {
				return err
			}
		}
		if r.rc, r.cause = r.src.Open(r.ctx, r.desc, r.offset, r.left); r.cause == nil {
			return nil
		}
	}
}

// wait counts a failed attempt and waits for the next one, if there is one.
func (r *reader) wait() error {
	if r.arrived >= progress {
		r.failed = 0
	}
	r.arrived = 0
	r.failed++
	return r.policy.Wait(r.ctx, r.failed, r.cause)
}

func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for r.err == nil {
		if r.left == 0 {
			r.err = io.EOF
			break
		}
		if r.rc == nil {
			if r.err = r.open(); r.err != nil {
				break
			}
		}
		n, err := r.rc.Read(p[:min(int64(len(p)), r.left)])
		r.offset += int64(n)
		r.left -= int64(n)
		r.arrived += int64(n)
		if err != nil && r.left > 0 {
			r.drop(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// drop gives up a stream that ended before its time.
func (r *reader) drop(cause error) {
	_ = r.rc.Close() // the read error says more
	r.rc = nil
	if errors.Is(cause, io.EOF) {
		cause = blob.Temporary(io.ErrUnexpectedEOF)
	}
	r.cause = cause
}

func (r *reader) Close() error {
	if r.err == nil {
		r.err = io.ErrClosedPipe
	}
	if r.rc == nil {
		return nil
	}
	rc := r.rc
	r.rc = nil
	return rc.Close()
}
