// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
)

// unknownLength is the length of a stream that ends where the server ends it.
const unknownLength = -1

// maxRedirected bounds how many redirects are remembered; images have at most
// 127 layers.
const maxRedirected = 256

// Open reads a range of a blob, as [blob.Source] tells.
func (r *Repository) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if err := desc.CheckRange(offset, length); err != nil {
		return nil, err
	}
	if length == 0 {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("reading blob %q: %w", desc.Digest, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	rc, err := r.open(ctx, cancel, desc, offset, length)
	if err != nil {
		cancel(nil)
		return nil, fmt.Errorf("reading %d+%d of blob %s from %s: %w", offset, length, desc.Digest, r.name, err)
	}
	return rc, nil
}

func (r *Repository) open(ctx context.Context, cancel context.CancelCauseFunc, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	header := http.Header{"Accept-Encoding": {"identity"}}
	if length < desc.Size {
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	}
	resp, err := r.locate(ctx, desc.Digest, header)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusPartialContent {
		return nil, r.statusError(resp)
	}
	// Where it was redirected to may be what is wrong.
	broken := func() { r.forgetRedirect(desc.Digest, resp.Request.URL) }
	if err := checkAnswer(resp, desc, offset, length); err != nil {
		_ = resp.Body.Close() // it may be long
		broken()
		return nil, err
	}
	s := r.stream(ctx, cancel, resp, length, fmt.Sprintf("reading %d+%d of blob %s from %s", offset, length, desc.Digest, r.name))
	s.broken = broken
	return s, nil
}

// locate asks where the blob was found last, if that was elsewhere, and
// otherwise the registry. What it returns may have any status.
func (r *Repository) locate(ctx context.Context, d digest.Digest, header http.Header) (*http.Response, error) {
	if u := r.redirect(d); u != nil {
		resp, err := r.follow(ctx, nil, u, request{method: http.MethodGet, header: header})
		if err == nil && isSuccess(resp.StatusCode) {
			return resp, nil
		}
		// Whatever is wrong there, the registry may know a better place by now.
		r.forgetRedirect(d, u)
		if err != nil || isTemporary(resp.StatusCode) {
			return resp, err
		}
		r.client.config.Logger.DebugContext(ctx, "redirect expired", "blob", d, "repository", r.name, "status", resp.StatusCode)
		drain(resp)
	}
	resp, err := r.get(ctx, "blobs/"+d.String(), header)
	if err == nil && isSuccess(resp.StatusCode) && !r.isRegistry(resp.Request.URL) {
		r.rememberRedirect(d, resp.Request.URL)
	}
	return resp, err
}

func isSuccess(status int) bool { return status >= 200 && status < 300 }

func (r *Repository) redirect(d digest.Digest) *url.URL {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.redirects[d]
}

func (r *Repository) rememberRedirect(d digest.Digest, u *url.URL) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.redirects) >= maxRedirected {
		clear(r.redirects)
	}
	r.redirects[d] = u
}

// forgetRedirect forgets u, but not what replaced it meanwhile.
func (r *Repository) forgetRedirect(d digest.Digest, u *url.URL) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := r.redirects[d]; now != nil && now.String() == u.String() {
		delete(r.redirects, d)
	}
}

// checkAnswer checks that the body of an answer begins with the range.
func checkAnswer(resp *http.Response, desc blob.Descriptor, offset, length int64) error {
	if e := resp.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return fmt.Errorf("the server encoded the blob as %q", shorten(e))
	}
	if resp.StatusCode == http.StatusOK {
		if offset > 0 {
			return blob.ErrNoRange
		}
		if resp.ContentLength >= 0 && resp.ContentLength < length {
			return blob.Temporary(fmt.Errorf("the server sends %d bytes, not %d", resp.ContentLength, desc.Size))
		}
		return nil
	}
	value := resp.Header.Get("Content-Range")
	first, last, size, err := parseContentRange(value)
	if err != nil || first != offset || last != offset+length-1 || size >= 0 && size != desc.Size {
		return blob.Temporary(fmt.Errorf("the server sends the range %q of %d bytes", shorten(value), desc.Size))
	}
	if resp.ContentLength >= 0 && resp.ContentLength != length {
		return blob.Temporary(fmt.Errorf("the server sends %d bytes", resp.ContentLength))
	}
	return nil
}

// parseContentRange reads "bytes FIRST-LAST/SIZE"; the size is -1 if it is "*".
func parseContentRange(s string) (first, last, size int64, err error) {
	malformed := fmt.Errorf("malformed range %q", shorten(s))
	unit, rest, ok := strings.Cut(s, " ")
	span, total, ok2 := strings.Cut(rest, "/")
	from, to, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 || !strings.EqualFold(unit, "bytes") {
		return 0, 0, 0, malformed
	}
	first, err1 := parseNumber(from)
	last, err2 := parseNumber(to)
	size = -1
	var err3 error
	if total != "*" {
		size, err3 = parseNumber(total)
	}
	if errors.Join(err1, err2, err3) != nil || last < first || size >= 0 && last >= size {
		return 0, 0, 0, malformed
	}
	return first, last, size, nil
}

// parseNumber parses digits and nothing else.
func parseNumber(s string) (int64, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 63)
	return int64(n), err //nolint:gosec // 63 bits fit
}

// stream delivers the body of an answer: length bytes of it, or all. It fails if
// they do not come, or if nothing comes for too long.
type stream struct {
	body   io.ReadCloser
	ctx    context.Context // of the request; ended by cancel
	cancel context.CancelCauseFunc
	stall  time.Duration
	timer  *time.Timer // runs during a Read
	left   int64       // negative if unknown
	what   string      // context for errors, unless the caller gives it
	broken func()      // called when it breaks; may be nil
	err    error
}

func (r *Repository) stream(ctx context.Context, cancel context.CancelCauseFunc, resp *http.Response, length int64, what string) *stream {
	stall := r.client.config.StallTimeout
	timer := time.AfterFunc(stall, func() {
		cancel(blob.Temporary(fmt.Errorf("%s sent nothing for %v", resp.Request.URL.Host, stall)))
	})
	timer.Stop()
	return &stream{body: resp.Body, ctx: ctx, cancel: cancel, stall: stall, timer: timer, left: length, what: what}
}

func (s *stream) Read(p []byte) (int, error) {
	if s.err == nil && s.left == 0 {
		s.err = io.EOF
	}
	if s.err != nil || len(p) == 0 {
		return 0, s.err
	}
	if s.left > 0 {
		p = p[:min(int64(len(p)), s.left)]
	}
	s.timer.Reset(s.stall)
	n, err := s.body.Read(p)
	s.timer.Stop()
	if s.left > 0 {
		s.left -= int64(n)
	}
	switch {
	case err == nil || s.left == 0:
	case err == io.EOF && s.left < 0:
		s.err = io.EOF
	case err == io.EOF:
		s.err = s.explain(blob.Temporary(io.ErrUnexpectedEOF))
	default:
		s.err = s.explain(networkError(s.ctx, err))
	}
	return n, s.err
}

func (s *stream) explain(err error) error {
	if s.broken != nil && blob.IsTemporary(err) {
		s.broken()
	}
	if s.what == "" {
		return err
	}
	return fmt.Errorf("%s: %w", s.what, err)
}

// Close ends the request. That a server dislikes being interrupted is no error.
func (s *stream) Close() error {
	s.timer.Stop()
	if s.err == nil {
		s.err = errors.New("reading from a closed blob")
	}
	_ = s.body.Close()
	s.cancel(nil)
	return nil
}
