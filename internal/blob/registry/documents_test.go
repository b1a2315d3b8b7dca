// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestManifest(t *testing.T) {
	body := []byte(`{"schemaVersion":2}`)
	good := blob.Manifest{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Body: body}
	other := digest.FromString("something else")
	sha512 := digest.SHA512.FromBytes(body)

	for _, tt := range []struct {
		name  string
		ref   string
		fault testregistry.Fault
		want  blob.Manifest
		is    error
		fails bool
	}{
		{name: "by tag", ref: "v1", want: good},
		{name: "by digest", ref: good.Digest.String(), want: good},
		{
			name: "media type with parameters", ref: "v1", want: good,
			fault: testregistry.Fault{Header: header("Content-Type", v1.MediaTypeImageManifest+"; charset=utf-8")},
		},
		{
			name: "no media type", ref: "v1", want: blob.Manifest{Digest: good.Digest, Body: body},
			fault: testregistry.Fault{Header: header("Content-Type", ";")},
		},
		{
			name: "digest by another algorithm", ref: "v1", want: blob.Manifest{MediaType: good.MediaType, Digest: sha512, Body: body},
			fault: testregistry.Fault{Header: header("Docker-Content-Digest", sha512.String())},
		},
		{
			name: "header that is no digest", ref: "v1", want: good,
			fault: testregistry.Fault{Header: header("Docker-Content-Digest", "sha256:nonsense")},
		},
		{name: "unknown tag", ref: "v2", is: blob.ErrNotFound, fails: true},
		{name: "unknown digest", ref: other.String(), is: blob.ErrNotFound, fails: true},
		{name: "malformed tag", ref: "../v1", fails: true},
		{name: "malformed digest", ref: "sha256:1", fails: true},
		{name: "changed, by digest", ref: good.Digest.String(), fault: testregistry.Fault{Flip: 1, At: 5}, is: blob.ErrCorrupt, fails: true},
		{name: "changed, by tag", ref: "v1", fault: testregistry.Fault{Flip: 1, At: 5}, is: blob.ErrCorrupt, fails: true},
		{name: "other digest in the header", ref: "v1", fault: testregistry.Fault{Header: header("Docker-Content-Digest", other.String())}, is: blob.ErrCorrupt, fails: true},
		{name: "too large", ref: "large", fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, repository := connect(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
				if strings.Contains(r.URL.Path, "/manifests/") {
					return tt.fault
				}
				return testregistry.Fault{}
			}}, nil)
			server.AddManifest(repositoryPath, "v1", v1.MediaTypeImageManifest, body)
			server.AddManifest(repositoryPath, "large", v1.MediaTypeImageManifest, make([]byte, registry.MaxManifestSize+1))
			got, err := repository.Manifest(t.Context(), tt.ref)
			if (err != nil) != tt.fails || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error = %v; want %v", err, tt.is)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("manifest (-want +got):\n%s", diff)
			}
		})
	}
}

func TestManifestOfLargestSize(t *testing.T) {
	server, repository := connect(t, testregistry.Options{}, nil)
	body := bytes.Repeat([]byte(" "), registry.MaxManifestSize)
	d := server.AddManifest(repositoryPath, "v1", v1.MediaTypeImageManifest, body)
	got, err := repository.Manifest(t.Context(), "v1")
	if err != nil || got.Digest != d || !bytes.Equal(got.Body, body) {
		t.Errorf("%s, %d bytes, error %v", got.Digest, len(got.Body), err)
	}
}

func TestBlob(t *testing.T) {
	for _, tt := range []struct {
		name  string
		size  int
		limit int64
		fault testregistry.Fault
		is    error
		fails bool
	}{
		{name: "small", size: 100, limit: 1000},
		{name: "empty", size: 0, limit: 0},
		{name: "as large as the limit", size: 100, limit: 100},
		{name: "larger than the limit", size: 101, limit: 100, fails: true},
		{name: "changed", size: 100, limit: 100, fault: testregistry.Fault{Flip: 1, At: 99}, is: blob.ErrCorrupt, fails: true},
		{name: "gone", size: 100, limit: 100, fault: testregistry.Fault{Status: 404}, is: blob.ErrNotFound, fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, repository := connect(t, testregistry.Options{Fault: onBlobs(1, tt.fault)}, nil)
			desc, want := addBlob(server, tt.size, 1)
			got, err := repository.Blob(t.Context(), desc, tt.limit)
			if (err != nil) != tt.fails || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error = %v; want %v", err, tt.is)
			}
			if err == nil && !bytes.Equal(got, want) {
				t.Errorf("got %d other bytes", len(got))
			}
		})
	}
}

// Descriptors come from manifests, so anything may be in them.
func TestStrangeDigests(t *testing.T) {
	server, repository := connect(t, testregistry.Options{}, nil)
	for _, d := range []digest.Digest{"", "sha256:", "../../v2/", "sha256:../../../x", "md5:d41d8cd98f00b204e9800998ecf8427e"} {
		if _, err := repository.Open(t.Context(), blob.Descriptor{Digest: d, Size: 10}, 0, 10); err == nil {
			t.Errorf("opening %q: no error", d)
		}
		if _, err := repository.Blob(t.Context(), blob.Descriptor{Digest: d}, 10); err == nil {
			t.Errorf("reading empty %q: no error", d)
		}
		if _, err := repository.Referrers(t.Context(), d); err == nil {
			t.Errorf("referrers of %q: no error", d)
		}
	}
	if c := server.Counts(); c.Total != 0 {
		t.Errorf("%d requests; want none", c.Total)
	}
}

func TestReferrers(t *testing.T) {
	subject := digest.FromString("subject")
	referrer := fmt.Appendf(nil, `{"artifactType":"application/x","subject":{"digest":%q}}`, subject)

	t.Run("API", func(t *testing.T) {
		server, repository := connect(t, testregistry.Options{Manner: testregistry.GHCR}, nil)
		d := server.AddManifest(repositoryPath, "", v1.MediaTypeImageManifest, referrer)
		m, err := repository.Referrers(t.Context(), subject)
		if err != nil || !bytes.Contains(m.Body, []byte(d)) || !bytes.Contains(m.Body, []byte("application/x")) {
			t.Errorf("got %s, error %v", m.Body, err)
		}
	})
	noAPI := func(r *http.Request, _ int) testregistry.Fault {
		if strings.Contains(r.URL.Path, "/referrers/") {
			return testregistry.Fault{Status: 404}
		}
		return testregistry.Fault{}
	}
	t.Run("tag", func(t *testing.T) {
		server, repository := connect(t, testregistry.Options{Fault: noAPI}, nil)
		server.AddManifest(repositoryPath, "sha256-"+subject.Encoded(), v1.MediaTypeImageIndex, []byte(`{}`))
		m, err := repository.Referrers(t.Context(), subject)
		if err != nil || string(m.Body) != "{}" || m.MediaType != v1.MediaTypeImageIndex {
			t.Errorf("got %+v, error %v", m, err)
		}
	})
	t.Run("none", func(t *testing.T) {
		_, repository := connect(t, testregistry.Options{Fault: noAPI}, nil)
		if _, err := repository.Referrers(t.Context(), subject); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("error = %v; want %v", err, blob.ErrNotFound)
		}
	})
}
