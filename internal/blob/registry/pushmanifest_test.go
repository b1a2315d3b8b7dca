// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestPushManifest(t *testing.T) {
	body := []byte(`{"schemaVersion":2}`)
	largest := append(bytes.Repeat([]byte(" "), registry.MaxManifestSize-len(body)), body...)
	d, sha512 := digest.FromBytes(body), digest.SHA512.FromBytes(body)
	for _, tt := range []struct {
		name string
		body []byte
		ref  string
		want digest.Digest // "": it fails
		is   error
	}{
		{name: "tag", body: body, ref: "v1", want: d},
		{name: "digest", body: body, ref: d.String(), want: d},
		{name: "nothing", body: body, want: d},
		{name: "largest", body: largest, ref: "v1", want: digest.FromBytes(largest)},
		{name: "too large", body: append(largest, ' '), ref: "v1"},
		{name: "digest of something else", body: body, ref: digest.FromString("x").String(), is: blob.ErrCorrupt},
		{name: "digest that the registry does not take", body: body, ref: sha512.String()},
		{name: "malformed tag", body: body, ref: "../v1"},
		{name: "malformed digest", body: body, ref: "sha256:1"},
		{name: "no JSON", body: []byte("{"), ref: "v1"},
		{name: "blob that is not there", body: fmt.Appendf(nil, `{"config":{"digest":%q}}`, d), ref: "v1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, repository := connect(t, testregistry.Options{Push: testregistry.PushAllowed}, nil)
			got, err := repository.PushManifest(t.Context(), v1.MediaTypeImageManifest, tt.body, tt.ref)
			if got != tt.want || (err == nil) != (tt.want != "") || tt.is != nil && !errors.Is(err, tt.is) {
				t.Fatalf("digest %q, error %v", got, err)
			}
			if err != nil {
				return
			}
			ref := tt.ref
			if ref == "" {
				ref = got.String()
			}
			m, err := repository.Manifest(t.Context(), ref)
			if err != nil || m.MediaType != v1.MediaTypeImageManifest || m.Digest != got || !bytes.Equal(m.Body, tt.body) {
				t.Errorf("got %s %s of %d bytes, error %v", m.MediaType, m.Digest, len(m.Body), err)
			}
			if c := server.Counts(); c.PutManifest != 1 {
				t.Errorf("%d manifests were uploaded; want 1", c.PutManifest)
			}
		})
	}
}

// referrersOf lists the referrers of a manifest.
func referrersOf(t *testing.T, repository *registry.Repository, subject digest.Digest) []v1.Descriptor {
	t.Helper()
	m, err := repository.Referrers(t.Context(), subject)
	if err != nil {
		t.Fatal(err)
	}
	var index v1.Index
	if err := json.Unmarshal(m.Body, &index); err != nil || index.MediaType != v1.MediaTypeImageIndex || index.SchemaVersion != 2 {
		t.Fatalf("%s: error %v", m.Body, err)
	}
	return index.Manifests
}

// Whoever pushes a manifest with a subject finds it among the subject's
// referrers, whether or not the registry knows what these are.
func TestPushReferrer(t *testing.T) {
	subject := digest.FromString("subject")
	for _, without := range []bool{false, true} {
		t.Run(fmt.Sprintf("without API %v", without), func(t *testing.T) {
			server, repository := connect(t, testregistry.Options{
				Manner: testregistry.GHCR, Push: testregistry.PushAllowed, NoReferrers: without,
			}, account(testregistry.GHCR))
			if without {
				if _, err := repository.Referrers(t.Context(), subject); !errors.Is(err, blob.ErrNotFound) {
					t.Errorf("before: error = %v; want %v", err, blob.ErrNotFound)
				}
			}
			server.AddBlob([]byte("{}"))
			var want []v1.Descriptor
			for i, fields := range []string{
				`"artifactType":"application/a","config":{"mediaType":"application/x","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}`,
				`"config":{"mediaType":"application/b","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}`,
			} {
				body := fmt.Appendf(nil, `{"schemaVersion":2,%s,"subject":{"digest":%q},"annotations":{"n":"%d"}}`, fields, subject, i)
				for range 2 { // the second time changes nothing
					d, err := repository.PushManifest(t.Context(), v1.MediaTypeImageManifest, body, "")
					if err != nil || d != digest.FromBytes(body) {
						t.Fatalf("digest %s, error %v", d, err)
					}
				}
				want = append(want, v1.Descriptor{
					MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Size: int64(len(body)),
					ArtifactType: "application/" + string(rune('a'+i)), Annotations: map[string]string{"n": fmt.Sprint(i)},
				})
			}
			byDigest := func(list []v1.Descriptor) map[digest.Digest]v1.Descriptor {
				m := map[digest.Digest]v1.Descriptor{}
				for _, d := range list {
					m[d.Digest] = d
				}
				return m
			}
			got := referrersOf(t, repository, subject)
			if diff := cmp.Diff(byDigest(want), byDigest(got)); diff != "" || len(got) != 2 {
				t.Errorf("%d referrers (-want +got):\n%s", len(got), diff)
			}
			_, err := repository.Manifest(t.Context(), "sha256-"+subject.Encoded())
			if (err == nil) != without {
				t.Errorf("the tag that stands in for the API: error = %v", err)
			}
		})
	}
}

// What is under the tag that stands in for the list may be anything.
func TestPushReferrerWithStrangeTag(t *testing.T) {
	subject := digest.FromString("subject")
	body := fmt.Appendf(nil, `{"subject":{"digest":%q}}`, subject)
	tag := "sha256-" + subject.Encoded()
	large := fmt.Appendf(nil, `{"manifests":[{"mediaType":%q}]}`, strings.Repeat("x", registry.MaxManifestSize-50))
	for _, tt := range []struct {
		name      string
		mediaType string
		tag       string
		fails     bool
	}{
		{"index", v1.MediaTypeImageIndex, `{"manifests":[]}`, false},
		{"index of somebody who is terse", v1.MediaTypeImageIndex, `{}`, false},
		{"manifest", v1.MediaTypeImageManifest, `{}`, true},
		{"manifest that is called an index", v1.MediaTypeImageIndex, `{"mediaType":"` + v1.MediaTypeImageManifest + `"}`, true},
		{"no JSON", v1.MediaTypeImageIndex, `{`, true},
		{"full", v1.MediaTypeImageIndex, string(large), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, repository := connect(t, testregistry.Options{Push: testregistry.PushAllowed, NoReferrers: true}, nil)
			before := server.AddManifest(repositoryPath, tag, tt.mediaType, []byte(tt.tag))
			_, err := repository.PushManifest(t.Context(), v1.MediaTypeImageManifest, body, "")
			if (err != nil) != tt.fails {
				t.Fatalf("error = %v", err)
			}
			if !tt.fails {
				if got := referrersOf(t, repository, subject); len(got) != 1 || got[0].Digest != digest.FromBytes(body) {
					t.Errorf("referrers %v", got)
				}
				return
			}
			if m, err := repository.Manifest(t.Context(), tag); err != nil || m.Digest != before {
				t.Errorf("the tag has changed: %v, error %v", m, err)
			}
		})
	}
	t.Run("subject that is none", func(t *testing.T) {
		_, repository := connect(t, testregistry.Options{Push: testregistry.PushAllowed, NoReferrers: true}, nil)
		if _, err := repository.PushManifest(t.Context(), v1.MediaTypeImageManifest, []byte(`{"subject":{"digest":"sha256:../x"}}`), ""); err == nil {
			t.Error("no error")
		}
	})
}

// The registry of these tests might share a misunderstanding with the client;
// this one is by others.
func TestPushToAnotherImplementation(t *testing.T) {
	for _, api := range []bool{false, true} {
		other := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(api)))
		t.Cleanup(other.Close)
		host := strings.TrimPrefix(other.URL, "http://")
		conf := filepath.Join(t.TempDir(), "registries.conf")
		write(t, conf, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", host))
		list, err := newClient(t, registry.Config{RegistriesConf: conf}).Endpoints(parse(t, host+"/"+repositoryPath), nil)
		if err != nil {
			t.Fatal(err)
		}
		repository := list[0]
		config, _, err := push(t, repository, []byte("{}"))
		if err != nil {
			t.Fatal(err)
		}
		layer, _, err := push(t, repository, bytes.Repeat([]byte("layer"), 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		if _, opened, err := push(t, repository, []byte("{}")); err != nil || opened != 0 {
			t.Errorf("once more: error %v, opened %d times", err, opened)
		}
		subject, err := repository.PushManifest(t.Context(), v1.MediaTypeImageManifest,
			fmt.Appendf(nil, `{"schemaVersion":2,"config":{"digest":%q,"size":2}}`, config.Digest), "v1")
		if err != nil {
			t.Fatal(err)
		}
		body := fmt.Appendf(nil, `{"schemaVersion":2,"artifactType":"application/x","config":{"digest":%q,"size":2},"layers":[{"digest":%q,"size":%d}],"subject":{"digest":%q}}`,
			config.Digest, layer.Digest, layer.Size, subject)
		d, err := repository.PushManifest(t.Context(), v1.MediaTypeImageManifest, body, "")
		if err != nil {
			t.Fatal(err)
		}
		if got := referrersOf(t, repository, subject); len(got) != 1 || got[0].Digest != d {
			t.Errorf("referrers %v", got)
		}
		if m, err := repository.Manifest(t.Context(), d.String()); err != nil || !bytes.Equal(m.Body, body) {
			t.Errorf("manifest %v, error %v", m, err)
		}
	}
}
