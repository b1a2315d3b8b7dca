// SPDX-License-Identifier: Apache-2.0

package testregistry_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// get sends a request and returns the status, the headers and what came of the body.
func get(t *testing.T, server *testregistry.Server, path string, header ...string) (int, http.Header, []byte, error) {
	t.Helper()
	return getContext(t.Context(), t, server, path, header...)
}

func getContext(ctx context.Context, t *testing.T, server *testregistry.Server, path string, header ...string) (int, http.Header, []byte, error) {
	t.Helper()
	transport := &http.Transport{DisableCompression: true, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	if ca := server.CA(); ca != nil {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(ca) {
			t.Fatal("the CA is no certificate")
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL()+path, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, body, err
}

func start(t *testing.T, opts testregistry.Options) *testregistry.Server {
	t.Helper()
	server, err := testregistry.Start(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 2 {
			if err := server.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return server
}

func TestBlobs(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 300_000) // more than one piece of the count
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, add := range map[string]func(*testregistry.Server) (digest.Digest, error){
		"memory": func(s *testregistry.Server) (digest.Digest, error) { return s.AddBlob(data), nil },
		"file": func(s *testregistry.Server) (digest.Digest, error) {
			d := digest.FromBytes(data)
			return d, s.AddBlobFile(path, d, int64(len(data)))
		},
	} {
		for _, tls := range []bool{false, true} {
			server := start(t, testregistry.Options{TLS: tls})
			d, err := add(server)
			if err != nil {
				t.Fatal(err)
			}
			url := "/v2/some/name/blobs/" + d.String()
			status, header, body, err := get(t, server, url)
			if status != 200 || err != nil || !bytes.Equal(body, data) || header.Get("Docker-Content-Digest") != d.String() {
				t.Errorf("%s: status %d, %d bytes, error %v", name, status, len(body), err)
			}
			status, header, body, err = get(t, server, url, "Range", "bytes=7-11")
			if status != 206 || err != nil || string(body) != "78901" || header.Get("Content-Range") != "bytes 7-11/3000000" {
				t.Errorf("%s: status %d, %q, %q, error %v", name, status, body, header, err)
			}
			wantServed := []testregistry.Served{{Digest: d, Offset: 0, Length: 3_000_000}, {Digest: d, Offset: 7, Length: 5}}
			if diff := cmp.Diff(wantServed, server.Served()); diff != "" {
				t.Errorf("%s served (-want +got):\n%s", name, diff)
			}
			want := testregistry.Counts{Total: 2, Blob: 2, BlobBytes: 3_000_005}
			// The client may have all before the server has counted it.
			for start := time.Now(); server.Counts() != want && time.Since(start) < 5*time.Second; {
				time.Sleep(time.Millisecond)
			}
			if diff := cmp.Diff(want, server.Counts()); diff != "" {
				t.Errorf("%s counts (-want +got):\n%s", name, diff)
			}
			server.ResetCounts()
			if diff := cmp.Diff(testregistry.Counts{}, server.Counts()); diff != "" || len(server.Served()) != 0 {
				t.Errorf("%s counts after a reset (-want +got):\n%s", name, diff)
			}
		}
	}
}

func TestAddBlobFileChecks(t *testing.T) {
	server := start(t, testregistry.Options{})
	dir := t.TempDir()
	path := filepath.Join(dir, "blob")
	if err := os.WriteFile(path, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, size := range map[string]int64{path: 4, dir: 4096, filepath.Join(dir, "none"): 0} {
		if err := server.AddBlobFile(path, "sha256:x", size); err == nil {
			t.Errorf("%s with %d bytes: no error", path, size)
		}
	}
}

func TestAPI(t *testing.T) {
	server := start(t, testregistry.Options{})
	subject := server.AddManifest("a/manifests/b", "v1", "application/x", []byte(`{}`))
	server.AddManifest("a/manifests/b", "", "application/y", []byte(`{"subject":{"digest":"`+subject.String()+`"}}`))
	for path, want := range map[string]struct {
		status int
		body   string
	}{
		"/v2/":                           {200, "{}"},
		"/v2/a/manifests/b/manifests/v1": {200, "{}"},
		"/v2/a/manifests/b/manifests/" + subject.String(): {200, "{}"},
		"/v2/a/manifests/b/manifests/v2":                  {404, "MANIFEST_UNKNOWN"},
		"/v2/other/manifests/v1":                          {404, "MANIFEST_UNKNOWN"},
		"/v2/a/blobs/sha256:x":                            {404, "BLOB_UNKNOWN"},
		"/v2/a/manifests/b/tags/list":                     {200, `["v1"]`},
		"/v2/a/manifests/b/tags/list?n=1&last=v1":         {200, `[]`},
		"/v2/_catalog":                                    {200, `["a/manifests/b"]`},
		"/v2/a/manifests/b/referrers/" + subject.String(): {200, `"application/y"`},
		"/v2/nonsense":                                    {404, ""},
		"/":                                               {404, ""},
	} {
		status, _, body, err := get(t, server, path)
		if status != want.status || !strings.Contains(string(body), want.body) || err != nil {
			t.Errorf("%s: status %d, %s, error %v", path, status, body, err)
		}
	}
}

func TestFaults(t *testing.T) {
	for _, tls := range []bool{false, true} {
		var fault atomic.Pointer[testregistry.Fault]
		server := start(t, testregistry.Options{TLS: tls, Fault: func(*http.Request, int) testregistry.Fault { return *fault.Load() }})
		url := "/v2/a/blobs/" + server.AddBlob([]byte("0123456789")).String()
		for _, tt := range []struct {
			name   string
			fault  testregistry.Fault
			status int
			body   string
			fails  bool
		}{
			{"none", testregistry.Fault{}, 206, "234", false},
			{"status", testregistry.Fault{Status: 503}, 503, "", false},
			{"reset", testregistry.Fault{Reset: true}, 0, "", true},
			{"no range", testregistry.Fault{IgnoreRange: true}, 200, "0123456789", false},
			{"flip", testregistry.Fault{Flip: 1, At: 1}, 206, "224", false},
			{"flip beyond the end", testregistry.Fault{Flip: 1, At: 3}, 206, "234", false},
			{"truncate", testregistry.Fault{Truncate: true, At: 2}, 206, "23", true},
			{"zero", testregistry.Fault{Zero: true, At: 1}, 206, "2\x00\x00", false},
			{"drip", testregistry.Fault{Drip: time.Millisecond, At: 1}, 206, "234", false},
			{"shift", testregistry.Fault{Shift: -2}, 206, "012", false},
		} {
			fault.Store(&tt.fault)
			status, header, body, err := get(t, server, url, "Range", "bytes=2-4")
			if said := header.Get("Content-Range"); status == 206 && said != "bytes 2-4/10" {
				t.Errorf("%s (TLS %v): range %q", tt.name, tls, said)
			}
			if status != tt.status || string(body) != tt.body || (err != nil) != tt.fails {
				t.Errorf("%s (TLS %v): status %d, body %q, error %v", tt.name, tls, status, body, err)
			}
		}
	}
}

// Answers are faulty about as often as they are to be, and each is counted.
func TestRandom(t *testing.T) {
	random := testregistry.NewRandom(1, 0.5)
	server := start(t, testregistry.Options{Fault: random.Fault})
	blob := bytes.Repeat([]byte("0123456789"), 100)
	url := "/v2/a/blobs/" + server.AddBlob(blob).String()
	var faulty int64
	for range 100 {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond) // stalls
		status, header, body, err := getContext(ctx, t, server, url, "Range", "bytes=200-300")
		cancel()
		if err != nil || status != 206 || header.Get("Content-Range") != "bytes 200-300/1000" || !bytes.Equal(body, blob[200:301]) {
			faulty++
		}
	}
	var counted int64
	for _, n := range random.Counts() {
		counted += n
	}
	if counted < 30 || counted > 70 || counted != faulty {
		t.Errorf("%d answers were faulty, %d are counted: %v", faulty, counted, random.Counts())
	}
}

// TestBack starts a registry where another one was.
func TestBack(t *testing.T) {
	first := start(t, testregistry.Options{})
	first.AddBlob([]byte("old"))
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second := start(t, testregistry.Options{Address: first.Host()})
	if second.Host() != first.Host() {
		t.Errorf("it is at %s, not at %s", second.Host(), first.Host())
	}
	d := second.AddBlob([]byte("new"))
	if _, _, body, err := get(t, second, "/v2/a/blobs/"+d.String()); err != nil || string(body) != "new" {
		t.Errorf("got %q, %v", body, err)
	}
}
