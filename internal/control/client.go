// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"github.com/holdfast/holdfast/internal/prepare"
)

// ErrNotRunning means that nothing listens on the control socket.
var ErrNotRunning = errors.New("the daemon is not running")

// Client talks to a daemon. Its methods may be called concurrently.
type Client struct {
	path string
	http http.Client
}

// NewClient returns a client of the daemon with that control socket.
func NewClient(path string) *Client {
	var d net.Dialer
	return &Client{path: path, http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		},
		DisableKeepAlives: true,
	}}}
}

// Prepare has an image prepared. progress, if not nil, is called for each event.
func (c *Client) Prepare(ctx context.Context, req PrepareRequest, progress func(prepare.Event)) (*prepare.Result, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encoding request: %w", err)
	}
	res, err := c.do(ctx, http.MethodPost, "/v1/prepare", body)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close() //nolint:errcheck // read only
	for dec := json.NewDecoder(res.Body); ; {
		var p Progress
		if err := dec.Decode(&p); err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			return nil, fmt.Errorf("the daemon ended the connection: %w", err)
		}
		switch {
		case p.Error != "":
			return nil, errors.New(p.Error)
		case p.Result != nil:
			return p.Result, nil
		case p.Event != nil && progress != nil:
			progress(*p.Event)
		}
	}
}

// Images returns the state of all prepared images.
func (c *Client) Images(ctx context.Context) ([]ImageStatus, error) {
	var all []ImageStatus
	return all, c.call(ctx, http.MethodGet, "/v1/images", nil, &all)
}

// Image returns the state of one prepared image.
func (c *Client) Image(ctx context.Context, reference string) (*ImageStatus, error) {
	var img ImageStatus
	if err := c.call(ctx, http.MethodGet, "/v1/images?reference="+url.QueryEscape(reference), nil, &img); err != nil {
		return nil, err
	}
	return &img, nil
}

// Remove removes a prepared image.
func (c *Client) Remove(ctx context.Context, reference string) error {
	var none struct{}
	return c.call(ctx, http.MethodDelete, "/v1/images?reference="+url.QueryEscape(reference), nil, &none)
}

// Collect removes what is unused.
func (c *Client) Collect(ctx context.Context, req CollectRequest) (*prepare.Collection, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encoding request: %w", err)
	}
	var done prepare.Collection
	if err := c.call(ctx, http.MethodPost, "/v1/gc", body, &done); err != nil {
		return nil, err
	}
	return &done, nil
}

// Info describes the daemon.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var info Info
	return info, c.call(ctx, http.MethodGet, "/v1/info", nil, &info)
}

func (c *Client) call(ctx context.Context, method, path string, body []byte, v any) error {
	res, err := c.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer res.Body.Close() //nolint:errcheck // read only
	if err := json.NewDecoder(res.Body).Decode(v); err != nil {
		return fmt.Errorf("reading the daemon's answer: %w", err)
	}
	return nil
}

// do sends a request and turns an error status into an error.
func (c *Client) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://holdfast"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("asking the daemon: %w", err)
	}
	res, err := c.http.Do(req)
	if ctx.Err() != nil {
		if err == nil {
			_ = res.Body.Close()
		}
		return nil, fmt.Errorf("asking the daemon: %w", context.Cause(ctx))
	}
	if err != nil {
		var dial *net.OpError
		if errors.As(err, &dial) && dial.Op == "dial" {
			return nil, fmt.Errorf("%w: %s: %w", ErrNotRunning, c.path, dial.Err)
		}
		return nil, fmt.Errorf("asking the daemon: %w", err)
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close() //nolint:errcheck // read only
	var e apiError
	data, err := io.ReadAll(io.LimitReader(res.Body, maxRequest))
	if err != nil || json.Unmarshal(data, &e) != nil || e.Error == "" {
		return nil, fmt.Errorf("the daemon answers %s", res.Status)
	}
	return nil, &StatusError{Status: res.StatusCode, Message: e.Error}
}

// StatusError is an error that the daemon answered with.
type StatusError struct {
	Status  int // of HTTP
	Message string
}

func (e *StatusError) Error() string { return e.Message }

// Is makes the daemon's errors the service's again.
func (e *StatusError) Is(target error) bool {
	switch e.Status {
	case http.StatusNotFound:
		return target == prepare.ErrUnknown
	case http.StatusConflict:
		return target == prepare.ErrInUse
	case http.StatusGone:
		return target == prepare.ErrNoProfile
	}
	return false
}
