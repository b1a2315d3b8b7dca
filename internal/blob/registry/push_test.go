// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// reopen opens bytes as the content of an upload, and counts how often.
func reopen(b []byte, opened *int) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) {
		*opened++
		return io.NopCloser(bytes.NewReader(b)), nil
	}
}

// push pushes bytes as a blob and returns how often they were opened.
func push(t *testing.T, repository *registry.Repository, b []byte) (blob.Descriptor, int, error) {
	t.Helper()
	opened := 0
	desc := blob.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
	err := repository.PushBlob(t.Context(), desc, reopen(b, &opened))
	return desc, opened, err
}

// onUploads makes a fault of the n-th request by a method that has to do with uploads.
func onUploads(method string, n int, fault testregistry.Fault) func(*http.Request, int) testregistry.Fault {
	var seen atomic.Int32
	return func(r *http.Request, _ int) testregistry.Fault {
		if r.Method == method && strings.Contains(r.URL.Path, "/blobs/") && int(seen.Add(1)) == n {
			return fault
		}
		return testregistry.Fault{}
	}
}

func TestPushBlob(t *testing.T) {
	for name, manner := range manners() {
		for _, tls := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s tls=%v", name, tls), func(t *testing.T) {
				server, repository := connect(t, testregistry.Options{
					Manner: manner, TLS: tls, Private: tls, Push: testregistry.PushAllowed,
				}, account(manner))
				for i, size := range []int{0, 1, 300_000} {
					want := blobtest.Bytes(size, uint64(i))
					for round := range 2 {
						server.ResetCounts()
						desc, opened, err := push(t, repository, want)
						if err != nil {
							t.Fatal(err)
						}
						got, err := repository.Blob(t.Context(), desc, int64(size))
						if err != nil || !bytes.Equal(got, want) {
							t.Errorf("got %d of %d bytes back, error %v", len(got), size, err)
						}
						// What is there is not sent again.
						if uploads := server.Counts().Upload; opened != 1-round || uploads != int64(2*opened) {
							t.Errorf("%d bytes, round %d: opened %d times, %d uploads", size, round, opened, uploads)
						}
					}
				}
			})
		}
	}
}

// Somebody who may read need not be allowed to push, and goes on reading.
func TestPushIsDenied(t *testing.T) {
	right := account
	wrong := func(testregistry.Manner) *registry.Credentials {
		return &registry.Credentials{Username: "AWS", Password: "hunter2"}
	}
	for name, manner := range manners() {
		for _, tt := range []struct {
			name    string
			push    testregistry.Push
			private bool
			creds   func(testregistry.Manner) *registry.Credentials
			reads   bool
		}{
			{"read-only registry", testregistry.PushNever, true, right, true},
			{"read-only account", testregistry.PushDenied, true, right, true},
			{"read-only account of what is public", testregistry.PushDenied, false, right, true},
			{"wrong password", testregistry.PushAllowed, true, wrong, false},
		} {
			t.Run(name+" "+tt.name, func(t *testing.T) {
				server, repository := connect(t, testregistry.Options{Manner: manner, Private: tt.private, Push: tt.push}, tt.creds(manner))
				there, _ := addBlob(server, 100, 1)
				_, opened, err := push(t, repository, []byte("something new"))
				if !errors.Is(err, blob.ErrUnauthorized) || blob.IsTemporary(err) || opened != 0 {
					t.Errorf("pushing a blob: error = %v, opened %d times", err, opened)
				}
				assertClean(t, err)
				_, err = repository.PushManifest(t.Context(), v1.MediaTypeImageManifest, []byte(`{}`), "v1")
				if !errors.Is(err, blob.ErrUnauthorized) || blob.IsTemporary(err) {
					t.Errorf("pushing a manifest: error = %v", err)
				}
				assertClean(t, err)
				if err := read(t, repository, there, 10, 10); (err == nil) != tt.reads {
					t.Errorf("reading afterwards: error = %v", err)
				}
			})
		}
	}
}

func TestPushGoesWrong(t *testing.T) {
	body := blobtest.Bytes(1000, 1)
	for _, tt := range []struct {
		name      string
		method    string
		fault     testregistry.Fault
		is        error
		temporary bool
		opened    int
	}{
		{"repository unknown", "POST", testregistry.Fault{Status: 404}, blob.ErrNotFound, false, 0},
		{"too many requests", "POST", testregistry.Fault{Status: 429}, nil, true, 0},
		{"no location", "POST", testregistry.Fault{Status: 202}, nil, false, 0},
		{"location that is none", "POST", testregistry.Fault{Header: header("Location", "ftp://x/y")}, nil, false, 0},
		{"unknown upload", "POST", testregistry.Fault{Header: header("Location", "/v2/"+repositoryPath+"/blobs/uploads/x?_state=x")}, blob.ErrNotFound, false, 1},
		{"redirect that is not for a POST", "POST", testregistry.Fault{Status: 302, Header: header("Location", "/v2/")}, nil, false, 0},
		{"server error before", "HEAD", testregistry.Fault{Status: 500}, nil, true, 0},
		{"broken upload", "PUT", testregistry.Fault{Reset: true}, nil, true, 1},
		{"server error", "PUT", testregistry.Fault{Status: 503}, nil, true, 1},
		{"too large", "PUT", testregistry.Fault{Status: 413}, nil, false, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, repository := connect(t, testregistry.Options{
				Push: testregistry.PushAllowed, Fault: onUploads(tt.method, 1, tt.fault),
			}, nil)
			desc, opened, err := push(t, repository, body)
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) || blob.IsTemporary(err) != tt.temporary || opened != tt.opened {
				t.Errorf("error = %v, opened %d times", err, opened)
			}
			if _, err := repository.Blob(t.Context(), desc, 1000); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("reading it: error = %v; want %v", err, blob.ErrNotFound)
			}
			if _, _, err := push(t, repository, body); err != nil {
				t.Errorf("the next time: %v", err)
			}
			if c := server.Counts(); c.Upload < 2 {
				t.Errorf("%d requests for uploads", c.Upload)
			}
		})
	}
}

// What is sent is opened anew when it has to be sent again.
func TestPushIsSentAgain(t *testing.T) {
	for name, fault := range map[string]testregistry.Fault{
		"token refused":      {Status: 401, Header: header("WWW-Authenticate", "")},
		"redirect":           {Status: 307, Header: header("Location", "")},
		"permanent redirect": {Status: 308, Header: header("Location", "")},
	} {
		t.Run(name, func(t *testing.T) {
			faults := onUploads("PUT", 1, fault)
			server, repository := connect(t, testregistry.Options{
				Manner: testregistry.Quay, Private: true, Push: testregistry.PushAllowed,
				Fault: func(r *http.Request, n int) testregistry.Fault {
					f := faults(r, n)
					if f.Header.Get("Location") == "" && f.Status/100 == 3 {
						f.Header = header("Location", r.URL.String())
					}
					return f
				},
			}, account(testregistry.Quay))
			want := blobtest.Bytes(1<<20, 1)
			desc, opened, err := push(t, repository, want)
			if err != nil || opened != 2 {
				t.Errorf("error = %v, opened %d times; want 2", err, opened)
			}
			got, err := repository.Blob(t.Context(), desc, desc.Size)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %d bytes back, error %v", len(got), err)
			}
			if c := server.Counts(); c.Upload != 3 {
				t.Errorf("%d requests for uploads; want a POST and 2 PUTs", c.Upload)
			}
		})
	}
}

// A registry may have uploads go elsewhere; its credentials do not go along.
func TestPushElsewhere(t *testing.T) {
	seen := make(chan http.Header, 10)
	other := start(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
		seen <- r.Header.Clone()
		return testregistry.Fault{Status: 201}
	}})
	fault := testregistry.Fault{Header: header("Location", other.URL()+"/store/x?signature=hunter2")}
	_, repository := connect(t, testregistry.Options{
		Manner: testregistry.ECR, Push: testregistry.PushAllowed, Fault: onUploads("POST", 1, fault),
	}, account(testregistry.ECR))
	if _, _, err := push(t, repository, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if h := <-seen; h.Get("Authorization") != "" || h.Get("Content-Length") != "" && h.Get("Content-Length") != "1" {
		t.Errorf("headers %v", h)
	}
}

func TestPushContent(t *testing.T) {
	broken := errors.New("the disk is broken")
	for _, tt := range []struct {
		name string
		open func() (io.ReadCloser, error)
		is   error
		sent bool // the first bytes, which are right, may be there
	}{
		{"cannot be opened", func() (io.ReadCloser, error) { return nil, broken }, broken, false},
		{"cannot be read", func() (io.ReadCloser, error) { return io.NopCloser(iotest.ErrReader(broken)), nil }, broken, false},
		{"too short", func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("012345678")), nil }, nil, false},
		{"too long", func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("0123456789a")), nil }, nil, true},
		{"other bytes", func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("abcdefghij")), nil }, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, repository := connect(t, testregistry.Options{Push: testregistry.PushAllowed}, nil)
			desc := blob.Descriptor{Digest: digest.FromString("0123456789"), Size: 10}
			err := repository.PushBlob(t.Context(), desc, tt.open)
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) || blob.IsTemporary(err) {
				t.Errorf("error = %v; want %v", err, tt.is)
			}
			if _, err := repository.Blob(t.Context(), desc, 10); err == nil && !tt.sent {
				t.Error("it is there")
			}
		})
	}
	_, repository := connect(t, testregistry.Options{Push: testregistry.PushAllowed}, nil)
	if err := repository.PushBlob(t.Context(), blob.Descriptor{Digest: "sha256:../x"}, nil); err == nil {
		t.Error("pushing a digest that is none: no error")
	}
}

// noting is content that tells whether it was read after it should have been.
type noting struct {
	io.Reader
	closed, late atomic.Bool
}

func (s *noting) Read(p []byte) (int, error) {
	if s.closed.Load() {
		s.late.Store(true)
	}
	return s.Reader.Read(p)
}

func (s *noting) Close() error { s.closed.Store(true); return nil }

// A server that takes nothing does not hold a push up.
func TestPushStalls(t *testing.T) {
	b := make([]byte, 32<<20) // more than sockets keep
	desc := blob.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
	for _, tt := range []struct {
		name  string
		stall time.Duration // of the client
		leave time.Duration // of the caller, after he was asked for the content
		ok    func(error) bool
	}{
		{"client", 3 * time.Second, time.Minute, blob.IsTemporary},
		{"caller", time.Minute, 200 * time.Millisecond, func(err error) bool { return errors.Is(err, context.Canceled) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := start(t, testregistry.Options{
				Push: testregistry.PushAllowed, Fault: onUploads("PUT", 1, testregistry.Fault{Delay: time.Minute}),
			})
			repository := open(t, newClient(t, registry.Config{StallTimeout: tt.stall}, server), server, nil)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			content := &noting{Reader: bytes.NewReader(b)}
			began := time.Now()
			err := repository.PushBlob(ctx, desc, func() (io.ReadCloser, error) {
				time.AfterFunc(tt.leave, cancel)
				return content, nil
			})
			if !tt.ok(err) || time.Since(began) > 20*time.Second {
				t.Errorf("after %v: error = %v", time.Since(began), err)
			}
			if !content.closed.Load() || content.late.Load() {
				t.Errorf("closed %v, read afterwards %v", content.closed.Load(), content.late.Load())
			}
		})
	}
}
