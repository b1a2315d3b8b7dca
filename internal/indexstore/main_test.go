// SPDX-License-Identifier: Apache-2.0

package indexstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker/reference"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/indexstore"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	repositoryPath = "team/app"
	manifestType   = "application/vnd.oci.image.manifest.v1+json"
	gzipLayer      = "application/vnd.oci.image.layer.v1.tar+gzip"
	zstdLayer      = "application/vnd.oci.image.layer.v1.tar+zstd"
	sociV1         = "application/vnd.amazon.soci.index.v1+json"
	sociV2         = "application/vnd.amazon.soci.index.v2+json"
	profileType    = "application/vnd.holdfast.profile.v1+json"
	limit          = 1 << 20
)

// connect starts a registry and returns the test's repository on it.
func connect(t *testing.T, opts testregistry.Options) (*testregistry.Server, *registry.Repository) {
	t.Helper()
	server, err := testregistry.Start(opts)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "registries.conf")
	text := fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", server.Host())
	if err := os.WriteFile(conf, text, 0o600); err != nil {
		t.Fatal(err)
	}
	client := registry.New(registry.Config{
		RegistriesConf: conf, RegistriesConfDir: filepath.Join(dir, "none"), CertsDir: []string{}, StallTimeout: 20 * time.Second,
	})
	t.Cleanup(func() {
		client.Close()
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	ref, err := reference.ParseNormalizedNamed(server.Host() + "/" + repositoryPath)
	if err != nil {
		t.Fatal(err)
	}
	list, err := client.Endpoints(ref, &registry.Credentials{Username: "user", Password: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	return server, list[0]
}

// image is what the tests publish about.
func image() indexstore.Subject {
	return indexstore.Subject{MediaType: manifestType, Digest: digest.FromString("image"), Size: 123}
}

// layer is the n-th one.
func layer(n int) indexstore.Subject {
	return indexstore.Subject{MediaType: gzipLayer, Digest: digest.FromString(fmt.Sprint("layer ", n)), Size: 1000}
}

// about is documents about a layer; "" is none.
func about(n int, ztoc, digests string) indexstore.LayerDocuments {
	l := indexstore.LayerDocuments{Layer: layer(n), SpanSize: 4 << 20}
	if ztoc != "" {
		l.ZTOC = bytes.NewReader([]byte(ztoc))
	}
	if digests != "" {
		l.Digests = bytes.NewReader([]byte(digests))
	}
	return l
}

func publish(t *testing.T, place indexstore.Place, p indexstore.Publication) {
	t.Helper()
	if err := place.Publish(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

// fetch returns a document; "" is none.
func fetch(t *testing.T, place indexstore.Place, subject digest.Digest, kind indexstore.Kind) string {
	t.Helper()
	text, err := tryFetch(t.Context(), place, subject, kind)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return text
}

func tryFetch(ctx context.Context, place indexstore.Place, subject digest.Digest, kind indexstore.Kind) (string, error) {
	var b bytes.Buffer
	if err := place.Fetch(ctx, subject, kind, limit, &b); err != nil {
		return "", err
	}
	return b.String(), nil
}

// want checks what a place has about layers and the image.
func want(t *testing.T, place indexstore.Place, documents map[indexstore.Kind]string, subject digest.Digest) {
	t.Helper()
	for _, kind := range []indexstore.Kind{indexstore.ZTOC, indexstore.Digests, indexstore.Profile} {
		if got := fetch(t, place, subject, kind); got != documents[kind] {
			t.Errorf("%s of %s is %q; want %q", kind, subject, got, documents[kind])
		}
	}
}
