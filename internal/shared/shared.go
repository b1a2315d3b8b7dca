// SPDX-License-Identifier: Apache-2.0

// Package shared lets callers that want the same thing at the same time share
// one call for it.
package shared

import (
	"context"
	"errors"
	"sync"
)

// Calls shares calls by key. The zero value is ready; it is safe for concurrent use.
type Calls[T any] struct {
	running sync.WaitGroup

	mu    sync.Mutex // protects the fields below, and those of all calls
	calls map[string]*call[T]
}

// Wait returns when no call is under way, also none whose callers have left.
// Do must not be called any more.
func (c *Calls[T]) Wait() { c.running.Wait() }

type call[T any] struct {
	cancel  context.CancelCauseFunc
	waiting int
	done    chan struct{} // closed after value and err are set
	value   T
	err     error
}

var errNobodyWaits = errors.New("nobody waits for it any more")

// Do returns what fn returns, or joins a call for the same key that is under
// way. The context of fn has the values of the first caller's, and ends when the
// last caller's has ended.
func (c *Calls[T]) Do(ctx context.Context, key string, fn func(context.Context) (T, error)) (T, error) {
	c.mu.Lock()
	cl := c.calls[key]
	if cl == nil {
		cl = c.start(ctx, key, fn)
	}
	cl.waiting++
	c.mu.Unlock()

	select {
	case <-cl.done:
	case <-ctx.Done():
	}
	c.mu.Lock()
	cl.waiting--
	if cl.waiting == 0 {
		if c.calls[key] == cl {
			delete(c.calls, key) // a later caller starts afresh
		}
		cl.cancel(errNobodyWaits)
	}
	c.mu.Unlock()
	select {
	case <-cl.done:
		return cl.value, cl.err
	default:
		var zero T
		return zero, context.Cause(ctx)
	}
}

// start begins a call. The caller holds c.mu.
func (c *Calls[T]) start(ctx context.Context, key string, fn func(context.Context) (T, error)) *call[T] {
	cl := &call[T]{done: make(chan struct{})}
	ctx, cl.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	if c.calls == nil {
		c.calls = map[string]*call[T]{}
	}
	c.calls[key] = cl
	c.running.Go(func() {
		cl.value, cl.err = fn(ctx)
		c.mu.Lock()
		if c.calls[key] == cl {
			delete(c.calls, key)
		}
		c.mu.Unlock()
		close(cl.done)
	})
	return cl
}
