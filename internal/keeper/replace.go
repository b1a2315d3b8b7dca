// SPDX-License-Identifier: Apache-2.0

package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// The keeper's socket: one JSON value each way.
type (
	question struct {
		Replace string `json:"replace"` // the path of a program
	}
	answer struct {
		Error string `json:"error,omitempty"`
	}
)

const (
	maxQuestion     = 64 << 10 // bytes
	questionTimeout = 10 * time.Second
)

// ErrNotRunning means that no keeper listens on the socket.
var ErrNotRunning = errors.New("the daemon is not running")

// request asks Run's goroutine to replace the worker.
type request struct {
	executable string
	done       chan error
}

// answer takes one question after the other, until ctx ends.
func (k *keeper) answer(ctx context.Context, l net.Listener) {
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			k.Logger.Error("answering on the keeper's socket", "err", err)
			return
		}
		var said answer
		if err := k.serve(ctx, c); err != nil {
			said.Error = err.Error()
		}
		_ = json.NewEncoder(c).Encode(said) // who asked may have left
		_ = c.Close()
	}
}

func (k *keeper) serve(ctx context.Context, c net.Conn) error {
	if err := c.SetReadDeadline(time.Now().Add(questionTimeout)); err != nil {
		return fmt.Errorf("reading the question: %w", err)
	}
	var q question
	if err := json.NewDecoder(io.LimitReader(c, maxQuestion)).Decode(&q); err != nil {
		return fmt.Errorf("reading the question: %w", err)
	}
	r := request{executable: q.Replace, done: make(chan error, 1)}
	select {
	case k.requests <- r:
		return <-r.done // replace ends within its own limits
	case <-ctx.Done():
		return errors.New("the daemon stops")
	}
}

// Replace has the keeper with that socket swap its worker for one of the program
// with the given path, and returns when that serves. An error tells that the old
// worker goes on.
func Replace(ctx context.Context, socket, executable string) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotRunning, err)
	}
	defer c.Close() //nolint:errcheck // all has been said
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	if err := json.NewEncoder(c).Encode(question{Replace: executable}); err != nil {
		return fmt.Errorf("asking the keeper: %w", err)
	}
	var a answer
	if err := json.NewDecoder(c).Decode(&a); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("waiting for the keeper: %w", err)
	}
	if a.Error != "" {
		return errors.New(a.Error)
	}
	return nil
}
