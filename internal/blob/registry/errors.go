// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
)

const (
	maxErrorBody  = 8 << 10
	maxErrorText  = 300
	drainTimeout  = 5 * time.Second
	maxRetryAfter = 24 * time.Hour
)

// statusError closes an answer that is not what was asked for and tells what it
// means.
func (r *Repository) statusError(resp *http.Response) error {
	from := "registry"
	if !r.isRegistry(resp.Request.URL) {
		from = "object store " + resp.Request.URL.Host
	}
	text := fmt.Sprintf("%s answered %d %s", from, resp.StatusCode, http.StatusText(resp.StatusCode))
	if said := diagnosis(drain(resp)); said != "" && r.isRegistry(resp.Request.URL) {
		text += ": " + r.scrub(said)
	}
	if from != "registry" && isRefusal(resp.StatusCode) {
		// Our credentials do not go there: it is the signature in the redirect that
		// has expired, and the registry makes another.
		return blob.Temporary(errors.New(text))
	}
	return classify(resp.StatusCode, retryAfter(resp.Header, time.Now()), text)
}

// classify turns the status of an answer into one of the errors that
// [blob.Source] distinguishes.
func classify(status int, after time.Duration, text string) error {
	switch {
	case status == http.StatusNotFound:
		return fmt.Errorf("%s: %w", text, blob.ErrNotFound)
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return fmt.Errorf("%s: %w", text, blob.ErrUnauthorized)
	case isTemporary(status):
		return &blob.TemporaryError{Err: errors.New(text), RetryAfter: after}
	default:
		return errors.New(text)
	}
}

// isRefusal reports whether an object store may mean that a signature has
// expired; Google Cloud Storage says it with 400.
func isRefusal(status int) bool {
	return status == http.StatusBadRequest || status == http.StatusUnauthorized || status == http.StatusForbidden
}

func isTemporary(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return true
	default:
		return status >= 500
	}
}

// networkError tells what it means that there was no answer, or no end of one.
func networkError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		if cause := context.Cause(ctx); blob.IsTemporary(cause) {
			return cause // a stream that stalled
		}
		return ctx.Err()
	}
	clean := &remoteError{text: shorten(err.Error()), cause: err}
	if isMismatch(err) {
		return clean
	}
	return blob.Temporary(clean)
}

// isMismatch reports whether the two sides do not agree about TLS, which does
// not change by asking again.
func isMismatch(err error) bool {
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	return errors.As(err, &certificate) || errors.As(err, &record) || errors.Is(err, http.ErrSchemeMismatch)
}

// remoteError gives an error that a server had a hand in a text of its own:
// servers can put anything of any length into them.
type remoteError struct {
	text  string
	cause error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.cause }

// shorten returns the first line of a foreign text without the queries of the
// URLs in it: those of signed URLs are as good as a password.
func shorten(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	var b strings.Builder
	for {
		before, query, found := strings.Cut(text, "?")
		b.WriteString(before)
		if !found {
			break
		}
		end := strings.IndexAny(query, " \t\"'")
		if end < 0 {
			break
		}
		text = query[end:]
	}
	text = strings.ToValidUTF8(b.String(), "")
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "") + "..."
	}
	return text
}

// scrub also takes out secrets, should a server repeat them.
func (r *Repository) scrub(text string) string {
	for _, c := range []*Credentials{r.given, r.shown.Load()} {
		if c == nil {
			continue
		}
		for _, secret := range []string{c.Password, c.IdentityToken} {
			if secret != "" {
				text = strings.ReplaceAll(text, secret, "***")
			}
		}
	}
	return shorten(text)
}

// diagnosis extracts what an error body in the format of the distribution
// specification says.
func diagnosis(body []byte) string {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil || len(doc.Errors) == 0 {
		return ""
	}
	return fmt.Sprintf("%q", doc.Errors[0].Code+": "+doc.Errors[0].Message)
}

// drain closes the body of an answer and returns its beginning. Reading it
// keeps the connection usable; but it is not worth waiting for.
func drain(resp *http.Response) []byte {
	timer := time.AfterFunc(drainTimeout, func() { _ = resp.Body.Close() })
	defer timer.Stop()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // what there is of it
	_ = resp.Body.Close()
	return body
}

// retryAfter reads the header of that name: seconds, or a date. Without one, or
// with one that makes no sense, it returns 0.
func retryAfter(header http.Header, now time.Time) time.Duration {
	value := header.Get("Retry-After")
	if seconds, err := strconv.ParseInt(value, 10, 64); err == nil {
		seconds = min(max(seconds, 0), int64(maxRetryAfter/time.Second))
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(at.Sub(now), 0), maxRetryAfter)
	}
	return 0
}
