// SPDX-License-Identifier: Apache-2.0

package testregistry_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/testregistry"
)

// do sends a request with a body and returns the status and where to go on.
func do(t *testing.T, server *testregistry.Server, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, server.URL()+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x")
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return resp.StatusCode, resp.Header.Get("Location")
}

func TestPush(t *testing.T) {
	server := start(t, testregistry.Options{Push: testregistry.PushAllowed})
	d := digest.FromString("x").String()
	begin := func() string {
		status, location := do(t, server, "POST", "/v2/some/name/blobs/uploads/", "")
		if status != 202 {
			t.Fatalf("status %d", status)
		}
		return location
	}
	location := begin()
	for _, tt := range []struct {
		name, method, path, body string
		want                     int
	}{
		{"other bytes", "PUT", location + "&digest=" + d, "y", 400},
		{"no digest", "PUT", location, "x", 400},
		{"query that is not given back", "PUT", strings.Replace(location, "_state", "other", 1) + "&digest=" + d, "x", 404},
		{"other repository", "PUT", strings.Replace(location, "some", "other", 1) + "&digest=" + d, "x", 404},
		{"manifest before its blob", "PUT", "/v2/some/name/manifests/v1", `{"layers":[{"digest":"` + d + `"}]}`, 400},
		{"blob", "PUT", location + "&digest=" + d, "x", 201},
		{"the same upload again", "PUT", location + "&digest=" + d, "x", 404},
		{"manifest", "PUT", "/v2/some/name/manifests/v1", `{"layers":[{"digest":"` + d + `"}]}`, 201},
		{"manifest that is not JSON", "PUT", "/v2/some/name/manifests/v1", `{`, 400},
		{"manifest under a wrong digest", "PUT", "/v2/some/name/manifests/" + d, `{}`, 400},
		{"removal", "DELETE", "/v2/some/name/manifests/v1", "", 405},
		{"upload in pieces", "PATCH", begin(), "x", 405},
	} {
		if status, _ := do(t, server, tt.method, tt.path, tt.body); status != tt.want {
			t.Errorf("%s: status %d; want %d", tt.name, status, tt.want)
		}
	}
	if status, _, body, err := get(t, server, "/v2/some/name/blobs/"+d); status != 200 || string(body) != "x" || err != nil {
		t.Errorf("the blob: status %d, %q, error %v", status, body, err)
	}
	if status, _, body, err := get(t, server, "/v2/some/name/manifests/v1"); status != 200 || !strings.Contains(string(body), d) || err != nil {
		t.Errorf("the manifest: status %d, %q, error %v", status, body, err)
	}
	want := testregistry.Counts{Total: 16, Upload: 9, PutManifest: 4, Manifest: 2, Blob: 1, BlobBytes: 1}
	if diff := cmp.Diff(want, server.Counts()); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}

func TestWhoMayPush(t *testing.T) {
	for _, tt := range []struct {
		push testregistry.Push
		want int
	}{
		{testregistry.PushNever, 405},
		{testregistry.PushDenied, 403},
		{testregistry.PushAllowed, 202},
	} {
		server := start(t, testregistry.Options{Push: tt.push})
		if status, _ := do(t, server, "POST", "/v2/some/name/blobs/uploads/", ""); status != tt.want {
			t.Errorf("%d: status %d; want %d", tt.push, status, tt.want)
		}
	}
}
