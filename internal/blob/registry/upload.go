// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
)

// upload is the body of a request. It ends the request if the server takes
// nothing for too long, notes why its content could not be read, and reads none
// of it after Close, which net/http may do late.
type upload struct {
	size  int64
	stall time.Duration
	timer *time.Timer // runs between two Reads

	mu      sync.Mutex // protects the fields below, and is held while content is read
	content io.ReadCloser
	sent    int64
	err     error // of content
	closed  bool
}

// upload returns what opens the body of a request that cancel ends.
func (r *Repository) upload(cancel context.CancelCauseFunc, size int64, content func() (io.ReadCloser, error)) func() (*upload, error) {
	stall := r.client.config.StallTimeout
	return func() (*upload, error) {
		rc, err := content()
		if err != nil {
			return nil, fmt.Errorf("opening what is to be uploaded: %w", err)
		}
		timer := time.AfterFunc(stall, func() {
			cancel(blob.Temporary(fmt.Errorf("the server took nothing for %v", stall)))
		})
		timer.Stop()
		return &upload{size: size, stall: stall, timer: timer, content: rc}, nil
	}
}

func (u *upload) Read(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return 0, errors.New("reading an upload that has ended")
	}
	if u.err != nil {
		return 0, u.err
	}
	u.timer.Stop()
	n, err := u.content.Read(p)
	u.sent += int64(n)
	switch {
	case u.sent > u.size, err == io.EOF && u.sent < u.size:
		u.err = fmt.Errorf("what is to be uploaded does not have %d bytes", u.size)
	case err != nil && err != io.EOF:
		u.err = fmt.Errorf("reading what is to be uploaded: %w", err)
	case err == io.EOF:
		return n, io.EOF // the answer has a time limit of its own
	default:
		u.timer.Reset(u.stall)
	}
	if u.err != nil {
		return 0, u.err
	}
	return n, nil
}

// Close ends the upload. It waits for a Read of the content that is under way.
func (u *upload) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil
	}
	u.closed = true
	u.timer.Stop()
	return u.content.Close()
}

// failure is why the content could not be read; nil if it could.
func (u *upload) failure() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.err
}

// roundTrip sends a request, with what open opens if it is not nil. Closing the
// body of the answer ends that too.
func (r *Repository) roundTrip(ctx context.Context, req *http.Request, open func() (*upload, error)) (*http.Response, error) {
	if open == nil {
		resp, err := r.meter.RoundTrip(req)
		if err != nil {
			return nil, networkError(ctx, err)
		}
		return resp, nil
	}
	u, err := open()
	if err != nil {
		return nil, err
	}
	req.Body, req.ContentLength = u, u.size
	if u.size == 0 {
		req.Body = http.NoBody // an empty body of its own has no known length
	}
	resp, err := r.meter.RoundTrip(req)
	if err != nil {
		_ = u.Close() // the request has failed anyway
		if err := u.failure(); err != nil {
			return nil, err
		}
		return nil, networkError(ctx, err)
	}
	resp.Body = answerBody{resp.Body, u}
	return resp, nil
}

// answerBody is the body of the answer to a request with a body.
type answerBody struct {
	io.ReadCloser
	upload *upload
}

func (b answerBody) Close() error {
	return errors.Join(b.ReadCloser.Close(), b.upload.Close())
}
