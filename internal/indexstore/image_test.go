// SPDX-License-Identifier: Apache-2.0

package indexstore_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/indexstore"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// emptyObject is the config of the manifests.
const emptyObject = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"

// What SOCI itself is to read is what soci.MarshalIndex writes, byte for byte.
func TestManifestOfSOCI(t *testing.T) {
	server, repo := connect(t, testregistry.Options{Push: testregistry.PushAllowed})
	zstd := about(2, "zstd", "")
	zstd.Extended = true
	publish(t, indexstore.NewImage(repo, image(), ""), indexstore.Publication{
		Layers:  []indexstore.LayerDocuments{about(1, "one", "digests"), zstd, about(3, "three", "")},
		Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600)),
	})
	hex := func(s string) digest.Digest { return digest.FromString(s) }
	want := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
		`"config":{"mediaType":"application/vnd.amazon.soci.index.v1+json","digest":"%s","size":2},"layers":[`+
		`{"mediaType":"application/octet-stream","digest":"%s","size":3,"annotations":{`+
		`"com.amazon.soci.image-layer-digest":"%s","com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","com.amazon.soci.span-size":"4194304"}},`+
		`{"mediaType":"application/vnd.holdfast.ztoc.v1","digest":"%s","size":4,"annotations":{"io.holdfast.layer-digest":"%s"}},`+
		`{"mediaType":"application/octet-stream","digest":"%s","size":5,"annotations":{`+
		`"com.amazon.soci.image-layer-digest":"%s","com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","com.amazon.soci.span-size":"4194304"}},`+
		`{"mediaType":"application/vnd.holdfast.digests.v1","digest":"%s","size":7,"annotations":{"io.holdfast.layer-digest":"%s"}}],`+
		`"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"%s","size":123},`+
		`"annotations":{"com.amazon.soci.build-tool-identifier":"Holdfast","org.opencontainers.image.created":"2026-01-02T02:04:05Z"}}`,
		emptyObject, hex("one"), layer(1).Digest, hex("zstd"), layer(2).Digest, hex("three"), layer(3).Digest,
		hex("digests"), layer(1).Digest, image().Digest)
	m, err := repo.Manifest(t.Context(), hex(want).String())
	if err != nil {
		index, err2 := repo.Referrers(t.Context(), image().Digest)
		t.Fatalf("%v\nreferrers: %s, error %v", err, index.Body, err2)
	}
	if diff := cmp.Diff(want, string(m.Body)); diff != "" || m.MediaType != manifestType {
		t.Errorf("manifest (-want +got):\n%s", diff)
	}
	if c := server.Counts(); c.PutManifest != 1 || c.Upload != 2*5 {
		t.Errorf("%d manifests and %d requests for uploads; want 1 and 2 for each of 4 documents and the config", c.PutManifest, c.Upload)
	}
}

func TestManifestOfProfile(t *testing.T) {
	_, repo := connect(t, testregistry.Options{Push: testregistry.PushAllowed})
	publish(t, indexstore.NewImage(repo, image(), ""), indexstore.Publication{Image: image(), Profile: []byte("profile")})
	want := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.holdfast.profile.v1+json",`+
		`"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"%s","size":2,"data":"e30="},`+
		`"layers":[{"mediaType":"application/vnd.holdfast.profile.v1+json","digest":"%s","size":7}],`+
		`"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"%s","size":123}}`,
		emptyObject, digest.FromString("profile"), image().Digest)
	if _, err := repo.Manifest(t.Context(), digest.FromString(want).String()); err != nil {
		index, err2 := repo.Referrers(t.Context(), image().Digest)
		t.Errorf("%v\nreferrers: %s, error %v", err, index.Body, err2)
	}
}

// However many layers ask, together, the registry is asked once for each list
// and each manifest; and what several nodes publish is there once.
func TestRequests(t *testing.T) {
	server, repo := connect(t, testregistry.Options{Push: testregistry.PushAllowed})
	p := indexstore.Publication{Image: image(), Profile: []byte("profile"), Created: time.Unix(1, 0)}
	for n := range 10 {
		p.Layers = append(p.Layers, about(n, fmt.Sprint("ztoc ", n), fmt.Sprint("digests ", n)))
	}
	for range 2 {
		publish(t, indexstore.NewImage(repo, image(), ""), p)
	}
	place := indexstore.NewImage(repo, image(), "")
	server.ResetCounts()
	for range 2 {
		var g errgroup.Group
		for n := range 10 {
			g.Go(func() error {
				text, err := tryFetch(t.Context(), place, layer(n).Digest, indexstore.ZTOC)
				if text != fmt.Sprint("ztoc ", n) {
					t.Errorf("%d: %q", n, text)
				}
				return err
			})
			g.Go(func() error {
				text, err := tryFetch(t.Context(), place, layer(n).Digest, indexstore.Digests)
				if text != fmt.Sprint("digests ", n) {
					t.Errorf("%d: %q", n, text)
				}
				return err
			})
		}
		g.Go(func() error {
			_, err := tryFetch(t.Context(), place, image().Digest, indexstore.Profile)
			return err
		})
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if c := server.Counts(); c.Other != 1 || c.Manifest != 2 || c.Blob != 2*21 {
		t.Errorf("%d lists, %d manifests, %d blobs; want 1, 2, 42", c.Other, c.Manifest, c.Blob)
	}
}

// That there is nothing is asked once, too; that something went wrong is not kept.
func TestNothingIsKept(t *testing.T) {
	status := 503
	server, repo := connect(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
		if strings.Contains(r.URL.Path, "/referrers/") {
			return testregistry.Fault{Status: status}
		}
		return testregistry.Fault{}
	}})
	place := indexstore.NewImage(repo, image(), "")
	if _, err := tryFetch(t.Context(), place, layer(1).Digest, indexstore.ZTOC); !blob.IsTemporary(err) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error = %v; want a temporary one", err)
	}
	status = 404
	for range 3 {
		if _, err := tryFetch(t.Context(), place, layer(1).Digest, indexstore.ZTOC); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("error = %v; want %v", err, fs.ErrNotExist)
		}
	}
	if c := server.Counts(); c.Other != 2 || c.Manifest != 1 {
		t.Errorf("%d lists and %d tags were asked for; want 2 and 1", c.Other, c.Manifest)
	}
}

// add adds an index by somebody else, with one ZTOC for layer 1.
func add(server *testregistry.Server, config, ztoc, created string, subject digest.Digest) digest.Digest {
	annotations := ""
	if created != "" {
		annotations = fmt.Sprintf(`,"annotations":{"org.opencontainers.image.created":%q}`, created)
	}
	if subject != "" {
		annotations += fmt.Sprintf(`,"subject":{"digest":%q}`, subject)
	}
	d := server.AddBlob([]byte(ztoc))
	return server.AddManifest(repositoryPath, "", manifestType, fmt.Appendf(nil,
		`{"schemaVersion":2,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[{"mediaType":"application/octet-stream","digest":%q,"size":%d,"annotations":{"com.amazon.soci.image-layer-digest":%q}}]%s}`,
		config, emptyObject, d, len(ztoc), layer(1).Digest, annotations))
}

// Of several indexes the newest counts, and one that says when it was made is
// newer than one that does not.
func TestNewest(t *testing.T) {
	for _, tt := range []struct {
		name    string
		created []string // "" is not told
		want    string   // index of it; "" is any
	}{
		{"one", []string{""}, "0"},
		{"dated and not", []string{"", "2020-01-01T00:00:00Z", ""}, "1"},
		{"several", []string{"2024-01-01T00:00:00Z", "2025-01-01T00:00:00+01:00", "2023-01-01T00:00:00Z"}, "1"},
		{"nonsense", []string{"tomorrow", "1970-01-01T00:00:00Z"}, "1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, repo := connect(t, testregistry.Options{})
			for i, created := range tt.created {
				add(server, sociV1, fmt.Sprint(i), created, image().Digest)
			}
			if got := fetch(t, indexstore.NewImage(repo, image(), ""), layer(1).Digest, indexstore.ZTOC); got != tt.want {
				t.Errorf("got %q; want %q", got, tt.want)
			}
		})
	}
}

// An index that the image names is the only one that counts.
func TestBound(t *testing.T) {
	server, repo := connect(t, testregistry.Options{Push: testregistry.PushAllowed})
	publish(t, indexstore.NewImage(repo, image(), ""), indexstore.Publication{
		Image: image(), Profile: []byte("profile"), Layers: []indexstore.LayerDocuments{about(1, "referrer", "x"), about(2, "referrer", "")},
	})
	bound := indexstore.NewImage(repo, image(), add(server, sociV2, "bound", "", ""))
	want(t, bound, map[indexstore.Kind]string{indexstore.ZTOC: "bound"}, layer(1).Digest)
	want(t, bound, nil, layer(2).Digest)
	want(t, bound, map[indexstore.Kind]string{indexstore.Profile: "profile"}, image().Digest)

	want(t, indexstore.NewImage(repo, image(), digest.FromString("gone")), nil, layer(1).Digest)
	for name, d := range map[string]digest.Digest{
		"index of version 1": add(server, sociV1, "x", "", ""),
		"no digest":          "sha256:../x",
	} {
		place := indexstore.NewImage(repo, image(), d)
		if text, err := tryFetch(t.Context(), place, layer(1).Digest, indexstore.ZTOC); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %q, error %v", name, text, err)
		}
	}
}

// Credentials that may not push are a refusal, and nothing is there afterwards.
func TestReadOnlyCredentials(t *testing.T) {
	for _, push := range []testregistry.Push{testregistry.PushNever, testregistry.PushDenied} {
		for _, manner := range []testregistry.Manner{testregistry.Plain, testregistry.Quay} {
			_, repo := connect(t, testregistry.Options{Manner: manner, Private: true, Push: push})
			for _, place := range []indexstore.Place{indexstore.NewImage(repo, image(), ""), indexstore.NewRepository(repo)} {
				for _, p := range []indexstore.Publication{
					{Image: image(), Layers: []indexstore.LayerDocuments{about(1, "x", "y")}},
					{Image: image(), Profile: []byte("x")},
				} {
					err := place.Publish(t.Context(), p)
					if !errors.Is(err, blob.ErrUnauthorized) || strings.Contains(err.Error(), "secret") {
						t.Errorf("%s: error = %v", place, err)
					}
				}
				want(t, place, nil, layer(1).Digest)
				want(t, place, nil, image().Digest)
			}
		}
	}
}

func TestOtherImage(t *testing.T) {
	_, repo := connect(t, testregistry.Options{Push: testregistry.PushAllowed})
	place := indexstore.NewImage(repo, image(), "")
	other := indexstore.Subject{MediaType: manifestType, Digest: digest.FromString("other"), Size: 1}
	if err := place.Publish(t.Context(), indexstore.Publication{Image: other, Profile: []byte("x")}); err == nil {
		t.Error("no error")
	}
	want(t, place, nil, other.Digest)
}
