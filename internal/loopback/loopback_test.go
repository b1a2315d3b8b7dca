// SPDX-License-Identifier: Apache-2.0

package loopback_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/loopback"
	"github.com/holdfast/holdfast/internal/sources"
	"github.com/holdfast/holdfast/internal/testimage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve serves content, and returns HOST:PORT.
func serve(t *testing.T, c loopback.Content) string {
	t.Helper()
	l, err := loopback.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := loopback.Serve(ctx, l, c, slog.New(slog.DiscardHandler)); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
	return l.Addr().String()
}

const repository = "registry.example.com:5000/team/app"

// layout is content out of an OCI layout.
func layout(t *testing.T) (loopback.Content, testimage.Image, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(testimage.File{Content: testimage.Bytes(300_000, 1)}), testimage.Gzip, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	img := testimage.Image{Layers: []testimage.Layer{l}, Cmd: []string{"/app"}}
	if err := img.WriteLayout(dir, repository+":v1"); err != nil {
		t.Fatal(err)
	}
	return sources.New(sources.Config{Places: []sources.Place{sources.Place(dir)}}), img, dir
}

// Another implementation's client gets the image, byte for byte.
func TestPull(t *testing.T) {
	content, img, _ := layout(t)
	host := serve(t, content)
	escaped, ok := loopback.Escape(repository)
	if !ok {
		t.Fatal("no name for it")
	}
	ref, err := name.ParseReference(host+"/"+escaped+":v1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	got, err := remote.Image(ref, remote.WithTransport(transport))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(got); err != nil {
		t.Error(err)
	}
	_, manifest, err := img.Build()
	if err != nil {
		t.Fatal(err)
	}
	if d, err := got.Digest(); err != nil || d.String() != digest.FromBytes(manifest).String() {
		t.Errorf("%s, %v", d, err)
	}
	tags, err := remote.List(ref.Context(), remote.WithTransport(transport))
	if err != nil || !slices.Equal(tags, []string{"v1"}) {
		t.Errorf("tags %q, %v", tags, err)
	}
	idx, err := remote.Referrers(ref.Context().Digest(digest.FromBytes(manifest).String()), remote.WithTransport(transport))
	if err != nil {
		t.Fatal(err)
	}
	if m, err := idx.IndexManifest(); err != nil || len(m.Manifests) != 0 {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := remote.Head(ref.Context().Tag("v2"), remote.WithTransport(transport)); err == nil {
		t.Error("there is no v2")
	}
}

// memory serves blobs.
type memory struct {
	blobtest.Memory
	fails bool
}

func (m memory) Manifest(context.Context, string, string) (blob.Manifest, error) {
	return blob.Manifest{}, blob.ErrNotFound
}

func (m memory) Blob(_ context.Context, _ string, d digest.Digest) (blob.Descriptor, blob.Source, error) {
	body, ok := m.Memory[d]
	if !ok {
		return blob.Descriptor{}, nil, blob.ErrNotFound
	}
	desc := blob.Descriptor{Digest: d, Size: int64(len(body))}
	if m.fails {
		return desc, broken{}, nil
	}
	return desc, m.Memory, nil
}

func (m memory) Tags(context.Context, string) ([]string, error) { return nil, blob.ErrNotFound }

func (m memory) Referrers(context.Context, string, digest.Digest) ([]v1.Descriptor, error) {
	return nil, nil
}

// broken is a stick that is pulled after some bytes.
type broken struct{}

func (broken) Open(context.Context, blob.Descriptor, int64, int64) (io.ReadCloser, error) {
	return io.NopCloser(io.MultiReader(strings.NewReader("some"), failing{})), nil
}

func (broken) String() string { return "broken" }

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the stick was pulled") }

func TestSource(t *testing.T) {
	blobtest.Run(t, func(t *testing.T, blobs map[digest.Digest][]byte) blob.Source {
		host := serve(t, memory{Memory: blobs})
		conf := filepath.Join(t.TempDir(), "registries.conf")
		if err := os.WriteFile(conf, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", host), 0o600); err != nil {
			t.Fatal(err)
		}
		client := registry.New(registry.Config{RegistriesConf: conf, RegistriesConfDir: "/nonexistent"})
		t.Cleanup(client.Close)
		ref, err := reference.ParseNamed(host + "/a.example/b:c")
		if err != nil {
			t.Fatal(err)
		}
		all, err := client.Endpoints(ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		return all[0]
	})
}

// get asks for a path.
func get(t *testing.T, method, url, host string, header http.Header) (status int, body []byte, err error) {
	t.Helper()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), method, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if host != "" {
		req.Host = host
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, nil, err
	}
	body, err = io.ReadAll(resp.Body)
	return resp.StatusCode, body, errors.Join(err, resp.Body.Close())
}

func TestRequests(t *testing.T) {
	body := []byte("0123456789")
	d := digest.FromBytes(body)
	url := "http://" + serve(t, memory{Memory: map[digest.Digest][]byte{d: body}})
	at := url + "/v2/a.example/b/blobs/" + d.String()
	for _, c := range []struct {
		method, url, host, ranges string
		status                    int
		want                      string
	}{
		{"GET", url + "/v2/", "", "", 200, "{}"},
		{"GET", at, "", "", 200, "0123456789"},
		{"HEAD", at, "", "", 200, ""},
		{"GET", at, "", "bytes=0-0", 206, "0"},
		{"GET", at, "", "bytes=3-", 206, "3456789"},
		{"GET", at, "", "bytes=3-100", 206, "3456789"},
		{"GET", at, "", "bytes=-2", 206, "89"},
		{"GET", at, "", "bytes=-20", 206, "0123456789"},
		{"GET", at, "", "bytes=10-", 416, ""},
		{"GET", at, "", "bytes=5-3", 416, ""},
		{"GET", at, "", "bytes=-0", 416, ""},
		{"GET", at, "", "bytes=0-1,3-4", 416, ""},
		{"GET", at, "", "lines=0-1", 416, ""},
		{"GET", at, "evil.example", "", 403, "DENIED"},
		{"GET", at, "localhost:1", "", 200, "0123456789"},
		{"POST", at, "", "", 405, "UNSUPPORTED"},
		{"DELETE", at, "", "", 405, "UNSUPPORTED"},
		{"PUT", url + "/v2/a.example/b/manifests/v1", "", "", 405, "UNSUPPORTED"},
		{"GET", url + "/v2/a.example/b/manifests/v1", "", "", 404, "UNKNOWN"},
		{"GET", url + "/v2/a.example/b/blobs/sha256:zz", "", "", 404, ""},
		{"GET", url + "/v2/a.example/b/referrers/zz", "", "", 404, ""},
		{"GET", url + "/v2/a.example/b/tags/other", "", "", 404, ""},
		{"GET", url + "/v2/blobs/" + d.String(), "", "", 404, ""},
		{"GET", url + "/", "", "", 404, ""},
		{"GET", url + "/v2/../../etc/passwd", "", "", 404, ""},
		{"GET", url + "/v2/%2e%2e%2fetc/b/blobs/" + digest.FromString("x").String(), "", "", 404, ""},
	} {
		header := http.Header{}
		if c.ranges != "" {
			header.Set("Range", c.ranges)
		}
		status, got, err := get(t, c.method, c.url, c.host, header)
		if err != nil || status != c.status || c.status < 300 && string(got) != c.want || !bytes.Contains(got, []byte(c.want)) {
			t.Errorf("%+v: %d, %q, %v", c, status, got, err)
		}
	}
}

// What breaks in the middle does not look whole.
func TestBroken(t *testing.T) {
	body := testimage.Bytes(100_000, 1)
	d := digest.FromBytes(body)
	url := "http://" + serve(t, memory{Memory: map[digest.Digest][]byte{d: body}, fails: true})
	if _, got, err := get(t, "GET", url+"/v2/a.example/b/blobs/"+d.String(), "", nil); err == nil {
		t.Errorf("got %d bytes and no error", len(got))
	}
}

func TestNames(t *testing.T) {
	for _, n := range []string{"registry.example.com/team/app", "registry.example.com:5000/team/app", "docker.io/library/debian", "127.0.0.1:42/x_y"} {
		escaped, ok := loopback.Escape(n)
		if _, err := reference.ParseNamed("127.0.0.1:5117/" + escaped); !ok || err != nil || loopback.Unescape(escaped) != n {
			t.Errorf("%s has become %s (%t), %v", n, escaped, ok, err)
		}
	}
	for _, n := range []string{"debian", "[::1]:5000/x", "Upper.example/x", "under_score/x"} {
		if escaped, ok := loopback.Escape(n); ok {
			t.Errorf("%s has become %s", n, escaped)
		}
	}
	for _, address := range []string{"0.0.0.0:0", ":0", "192.0.2.1:0", "localhost:0", "127.0.0.1"} {
		if l, err := loopback.Listen(t.Context(), address); err == nil {
			t.Errorf("listens on %s", address)
			_ = l.Close()
		}
	}
}
