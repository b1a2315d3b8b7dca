// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// onBlobs makes the first requests for blobs fail.
func onBlobs(times int64, f testregistry.Fault) func(*http.Request, int) testregistry.Fault {
	var done atomic.Int64
	return func(r *http.Request, _ int) testregistry.Fault {
		if strings.Contains(r.URL.Path, "/blobs/") && done.Add(1) <= times {
			return f
		}
		return testregistry.Fault{}
	}
}

func header(name, value string) http.Header { return http.Header{name: {value}} }

func TestFaults(t *testing.T) {
	tests := []struct {
		name       string
		fault      testregistry.Fault
		temporary  bool
		is         error
		text       string
		retryAfter time.Duration
	}{
		{name: "404", fault: testregistry.Fault{Status: 404}, is: blob.ErrNotFound},
		{name: "400", fault: testregistry.Fault{Status: 400}, text: "400 Bad Request"},
		{name: "416", fault: testregistry.Fault{Status: 416}, text: "416"},
		{name: "204", fault: testregistry.Fault{Status: 204}, text: "204"},
		{name: "500", fault: testregistry.Fault{Status: 500}, temporary: true, text: "500"},
		{name: "503", fault: testregistry.Fault{Status: 503, Header: header("Retry-After", "17")}, temporary: true, retryAfter: 17 * time.Second},
		{name: "429", fault: testregistry.Fault{Status: 429, Header: header("Retry-After", "3600")}, temporary: true, retryAfter: time.Hour},
		{name: "429 without a time", fault: testregistry.Fault{Status: 429}, temporary: true},
		{name: "429 with nonsense", fault: testregistry.Fault{Status: 429, Header: header("Retry-After", "-5")}, temporary: true},
		{name: "429 in the past", fault: testregistry.Fault{Status: 429, Header: header("Retry-After", "Mon, 02 Jan 2006 15:04:05 GMT")}, temporary: true},
		{name: "reset", fault: testregistry.Fault{Reset: true}, temporary: true},
		{name: "200", fault: testregistry.Fault{IgnoreRange: true}, is: blob.ErrNoRange},
		{name: "other range", fault: testregistry.Fault{Header: header("Content-Range", "bytes 0-99/1000")}, temporary: true},
		{name: "other size", fault: testregistry.Fault{Header: header("Content-Range", "bytes 100-199/1001")}, temporary: true},
		{name: "shorter range", fault: testregistry.Fault{Header: header("Content-Range", "bytes 100-198/1000")}, temporary: true},
		{name: "no range", fault: testregistry.Fault{Header: header("Content-Range", "")}, temporary: true},
		{name: "encoded", fault: testregistry.Fault{Header: header("Content-Encoding", "gzip")}, text: "gzip"},
		{name: "truncated at once", fault: testregistry.Fault{Truncate: true}, temporary: true, is: io.ErrUnexpectedEOF},
		{name: "truncated", fault: testregistry.Fault{Truncate: true, At: 99}, temporary: true, is: io.ErrUnexpectedEOF},
		{name: "stalled", fault: testregistry.Fault{Stall: true, At: 50}, temporary: true, text: "sent nothing for"},
		{name: "no answer", fault: testregistry.Fault{Delay: time.Hour}, temporary: true},
	}
	for _, tls := range []bool{false, true} {
		for _, tt := range tests {
			t.Run(tt.name+map[bool]string{true: " over HTTP/2"}[tls], func(t *testing.T) {
				t.Parallel()
				times := int64(1)
				if tt.fault.Reset && !tls {
					// net/http itself asks again if a connection in use before
					// breaks without an answer: it may have been closed for idleness.
					times = 2
				}
				server := start(t, testregistry.Options{TLS: tls, Fault: onBlobs(times, tt.fault)})
				desc, want := addBlob(server, 1000, 1)
				repository := open(t, newClient(t, registry.Config{StallTimeout: time.Second}, server), server, nil)

				err := read(t, repository, desc, 100, 100)
				if err == nil {
					t.Fatal("no error")
				}
				if got := blob.IsTemporary(err); got != tt.temporary {
					t.Errorf("temporary = %v; want %v: %v", got, tt.temporary, err)
				}
				if tt.is != nil && !errors.Is(err, tt.is) && !(tls && errors.Is(tt.is, io.ErrUnexpectedEOF)) {
					t.Errorf("error = %v; want %v", err, tt.is)
				}
				for _, part := range []string{tt.text, desc.Digest.String(), server.Host() + "/" + repositoryPath} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("error %q does not tell %q", err, part)
					}
				}
				var temporary *blob.TemporaryError
				if errors.As(err, &temporary) && temporary.RetryAfter != tt.retryAfter {
					t.Errorf("retry after %v; want %v", temporary.RetryAfter, tt.retryAfter)
				}
				assertSame(t, repository, desc, want, 100, 100)
			})
		}
	}
}

func assertSame(t *testing.T, repository *registry.Repository, desc blob.Descriptor, want []byte, offset, length int64) {
	t.Helper()
	rc, err := repository.Open(t.Context(), desc, offset, length)
	if err != nil {
		t.Errorf("afterwards: %v", err)
		return
	}
	defer rc.Close()
	got, err := io.ReadAll(rc)
	if err != nil || !bytes.Equal(got, want[offset:offset+length]) {
		t.Errorf("afterwards: %d bytes, error %v", len(got), err)
	}
}

func TestRetryAfterDate(t *testing.T) {
	at := time.Now().Add(time.Minute).UTC().Format(http.TimeFormat)
	server, repository := connect(t, testregistry.Options{Fault: onBlobs(1, testregistry.Fault{Status: 503, Header: header("Retry-After", at)})}, nil)
	desc, _ := addBlob(server, 100, 1)
	var temporary *blob.TemporaryError
	err := read(t, repository, desc, 10, 10)
	if !errors.As(err, &temporary) || temporary.RetryAfter <= 50*time.Second || temporary.RetryAfter > time.Minute {
		t.Errorf("error = %#v; want one that asks for a minute", err)
	}
}

// A server without ranges is good enough for what begins a blob.
func TestServerWithoutRanges(t *testing.T) {
	server, repository := connect(t, testregistry.Options{Fault: func(*http.Request, int) testregistry.Fault {
		return testregistry.Fault{IgnoreRange: true}
	}}, nil)
	desc, want := addBlob(server, 1<<20, 1)
	assertSame(t, repository, desc, want, 0, 100)
	assertSame(t, repository, desc, want, 0, 1<<20)
	if err := read(t, repository, desc, 1, 1<<20-1); !errors.Is(err, blob.ErrNoRange) {
		t.Errorf("error = %v; want %v", err, blob.ErrNoRange)
	}
}

// A blob that is shorter than its descriptor says is never a short stream.
func TestBlobIsShorter(t *testing.T) {
	server, repository := connect(t, testregistry.Options{}, nil)
	desc, _ := addBlob(server, 1000, 1)
	desc.Size = 2000
	for _, r := range [][2]int64{{0, 2000}, {0, 1500}, {500, 1000}, {1200, 100}} {
		if err := read(t, repository, desc, r[0], r[1]); err == nil {
			t.Errorf("reading %d+%d: no error", r[0], r[1])
		}
	}
}

// Redirects are remembered, and asked for anew when they do not work any more.
func TestRedirects(t *testing.T) {
	var next atomic.Pointer[testregistry.Fault]
	server := start(t, testregistry.Options{Manner: testregistry.Quay, Fault: func(r *http.Request, _ int) testregistry.Fault {
		if f := next.Load(); f != nil && strings.HasPrefix(r.URL.Path, "/store/") && next.CompareAndSwap(f, nil) {
			return *f
		}
		return testregistry.Fault{}
	}})
	repository := open(t, newClient(t, registry.Config{StallTimeout: time.Second}, server), server, nil)
	desc, want := addBlob(server, 1000, 1)
	assertSame(t, repository, desc, want, 0, 10)

	steps := []struct {
		name          string
		before        func()
		temporary     bool
		blob, storage int64
	}{
		{name: "remembered", storage: 1},
		{name: "expired", before: server.ExpireRedirects, blob: 1, storage: 2},
		{name: "remembered again", storage: 1},
		{name: "404", before: func() { next.Store(&testregistry.Fault{Status: 404}) }, blob: 1, storage: 2},
		{name: "410", before: func() { next.Store(&testregistry.Fault{Status: 410}) }, blob: 1, storage: 2},
		{name: "401", before: func() { next.Store(&testregistry.Fault{Status: 401}) }, blob: 1, storage: 2},
		{name: "400 as Google Cloud Storage says it", before: func() { next.Store(&testregistry.Fault{Status: 400}) }, blob: 1, storage: 2},
		{name: "503", before: func() { next.Store(&testregistry.Fault{Status: 503}) }, temporary: true, storage: 1},
		{name: "after 503", blob: 1, storage: 1},
		{name: "no answer", before: func() { next.Store(&testregistry.Fault{Delay: time.Hour}) }, temporary: true, storage: 1},
		{name: "after no answer", blob: 1, storage: 1},
		{name: "broken", before: func() { next.Store(&testregistry.Fault{Truncate: true, At: 5}) }, temporary: true, storage: 1},
		{name: "after broken", blob: 1, storage: 1},
		{name: "stalled", before: func() { next.Store(&testregistry.Fault{Stall: true, At: 5}) }, temporary: true, storage: 1},
		{name: "after stalled", blob: 1, storage: 1},
		{name: "other range", before: func() { next.Store(&testregistry.Fault{Header: header("Content-Range", "bytes 0-9/1000")}) }, temporary: true, storage: 1},
		{name: "after other range", blob: 1, storage: 1},
	}
	for _, step := range steps {
		server.ResetCounts()
		if step.before != nil {
			step.before()
		}
		err := read(t, repository, desc, 100, 10)
		if step.temporary != (err != nil) || step.temporary && !blob.IsTemporary(err) {
			t.Errorf("%s: error %v", step.name, err)
		}
		assertClean(t, err)
		if c := server.Counts(); c.Blob != step.blob || c.Storage != step.storage {
			t.Errorf("%s: %d requests to the registry and %d to the storage; want %d and %d",
				step.name, c.Blob, c.Storage, step.blob, step.storage)
		}
	}
}

// Many read at once while the signatures of what they all know expire. One may
// even expire on the way to the object store: then asking again helps.
func TestRedirectsExpireUnderLoad(t *testing.T) {
	server := start(t, testregistry.Options{Manner: testregistry.Quay})
	repository := open(t, newClient(t, registry.Config{}, server), server, nil)
	desc, want := addBlob(server, 1000, 1)
	var readers sync.WaitGroup
	for i := range 8 {
		readers.Go(func() {
			for n := range 20 {
				if i == 0 {
					server.ExpireRedirects()
				}
				if err := read(t, repository, desc, int64(n), 100); err != nil && !blob.IsTemporary(err) {
					t.Errorf("error %v", err)
				}
			}
		})
	}
	readers.Wait()
	assertSame(t, repository, desc, want, 100, 100)
}

// Bodies that stall do not keep others from being read, and give their
// connections back.
func TestStalledBodiesDoNotUseUpConnections(t *testing.T) {
	for _, tls := range []bool{false, true} {
		var stalling atomic.Bool
		stalling.Store(true)
		server := start(t, testregistry.Options{TLS: tls, Fault: func(r *http.Request, _ int) testregistry.Fault {
			return testregistry.Fault{Stall: stalling.Load() && strings.Contains(r.URL.Path, "/blobs/"), At: 1}
		}})
		repository := open(t, newClient(t, registry.Config{StallTimeout: time.Second}, server), server, nil)
		desc, want := addBlob(server, 1000, 1)
		const readers = 200 // more than there are connections
		errs := make(chan error)
		for range readers {
			go func() { errs <- read(t, repository, desc, 100, 100) }()
		}
		for range readers {
			if err := <-errs; !blob.IsTemporary(err) {
				t.Errorf("TLS %v: error = %v", tls, err)
			}
		}
		stalling.Store(false)
		assertSame(t, repository, desc, want, 100, 100)
	}
}

func TestRedirectLoop(t *testing.T) {
	server, repository := connect(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
		if strings.Contains(r.URL.Path, "/blobs/") {
			return testregistry.Fault{Status: 307, Header: header("Location", r.URL.Path+"?X-Signature=1")}
		}
		return testregistry.Fault{}
	}}, nil)
	desc, _ := addBlob(server, 100, 1)
	err := read(t, repository, desc, 10, 10)
	if err == nil || !strings.Contains(err.Error(), "redirects") || blob.IsTemporary(err) {
		t.Errorf("error = %v", err)
	}
	assertClean(t, err)
}

func TestStrangeRedirects(t *testing.T) {
	for _, location := range []string{"", "file:///etc/passwd", "http://", "::", "gopher://x/"} {
		server, repository := connect(t, testregistry.Options{Fault: onBlobs(1, testregistry.Fault{Status: 302, Header: header("Location", location)})}, nil)
		desc, _ := addBlob(server, 100, 1)
		if err := read(t, repository, desc, 10, 10); err == nil {
			t.Errorf("redirect to %q: no error", location)
		}
	}
}

func TestRateLimit(t *testing.T) {
	server, repository := connect(t, testregistry.Options{
		Manner: testregistry.DockerHub, ManifestLimit: 1, RetryAfter: 30 * time.Second,
	}, nil)
	server.AddManifest(repositoryPath, "v1", "application/json", []byte(`{}`))
	if _, err := repository.Manifest(t.Context(), "v1"); err != nil {
		t.Fatal(err)
	}
	_, err := repository.Manifest(t.Context(), "v1")
	var temporary *blob.TemporaryError
	if !errors.As(err, &temporary) || temporary.RetryAfter != 30*time.Second || !strings.Contains(err.Error(), "pull rate limit") {
		t.Errorf("error = %v", err)
	}
}

// Trouble while authenticating is told apart as elsewhere.
func TestFaultsOfAuthentication(t *testing.T) {
	for _, tt := range []struct {
		name       string
		path       string
		fault      testregistry.Fault
		temporary  bool
		is         error
		retryAfter time.Duration
	}{
		{name: "ping 503", path: "/v2/", fault: testregistry.Fault{Status: 503, Header: header("Retry-After", "5")}, temporary: true, retryAfter: 5 * time.Second},
		{name: "ping 404", path: "/v2/", fault: testregistry.Fault{Status: 404}},
		{name: "ping 403", path: "/v2/", fault: testregistry.Fault{Status: 403}, is: blob.ErrUnauthorized},
		{name: "ping 401 that wants something else", path: "/v2/", fault: testregistry.Fault{Status: 401, Header: header("Www-Authenticate", "Negotiate")}},
		{name: "ping 401 without a realm", path: "/v2/", fault: testregistry.Fault{Status: 401, Header: header("Www-Authenticate", "Bearer")}},
		{name: "ping 401 with a realm elsewhere", path: "/v2/", fault: testregistry.Fault{Status: 401, Header: header("Www-Authenticate", `Bearer realm="http://169.254.169.254/token"`)}},
		{name: "ping reset", path: "/v2/", fault: testregistry.Fault{Reset: true}, temporary: true},
		{name: "ping without an answer", path: "/v2/", fault: testregistry.Fault{Delay: time.Hour}, temporary: true},
		{name: "token 429", path: "/v2/auth", fault: testregistry.Fault{Status: 429, Header: header("Retry-After", "6")}, temporary: true, retryAfter: 6 * time.Second},
		{name: "token 401", path: "/v2/auth", fault: testregistry.Fault{Status: 401}, is: blob.ErrUnauthorized},
		{name: "token 200 without a token", path: "/v2/auth", fault: testregistry.Fault{Status: 200}},
		{name: "token reset", path: "/v2/auth", fault: testregistry.Fault{Reset: true}, temporary: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var healed atomic.Bool
			server := start(t, testregistry.Options{Manner: testregistry.Quay, TLS: true, Private: true, Fault: func(r *http.Request, _ int) testregistry.Fault {
				if r.URL.Path == tt.path && !healed.Load() {
					return tt.fault
				}
				return testregistry.Fault{}
			}})
			desc, want := addBlob(server, 100, 1)
			repository := open(t, newClient(t, registry.Config{StallTimeout: time.Second}, server), server, account(testregistry.Quay))
			err := read(t, repository, desc, 10, 10)
			if err == nil || blob.IsTemporary(err) != tt.temporary || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error = %v; want temporary %v, %v", err, tt.temporary, tt.is)
			}
			if errors.Is(err, blob.ErrNotFound) {
				t.Errorf("error = %v, which says nothing about the blob", err)
			}
			var temporary *blob.TemporaryError
			if errors.As(err, &temporary) && temporary.RetryAfter != tt.retryAfter {
				t.Errorf("retry after %v; want %v", temporary.RetryAfter, tt.retryAfter)
			}
			assertClean(t, err)
			healed.Store(true)
			if tt.fault.Status != 401 || tt.path != "/v2/" { // a challenge is believed until it is refused
				assertSame(t, repository, desc, want, 10, 10)
			}
		})
	}
}

// Whoever waits for somebody else's authentication can leave.
func TestWaitingForAuthenticationEnds(t *testing.T) {
	reached := make(chan struct{}, 10)
	server := start(t, testregistry.Options{Fault: func(*http.Request, int) testregistry.Fault {
		reached <- struct{}{}
		return testregistry.Fault{Delay: time.Hour}
	}})
	desc, _ := addBlob(server, 100, 1)
	repository := open(t, newClient(t, registry.Config{}, server), server, nil)
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error)
	for range 3 {
		go func() {
			_, err := repository.Open(ctx, desc, 0, 10)
			errs <- err
		}()
	}
	<-reached
	cancel()
	for range 3 {
		if err := <-errs; !errors.Is(err, context.Canceled) || blob.IsTemporary(err) {
			t.Errorf("error = %v; want %v", err, context.Canceled)
		}
	}
}
