// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// What preparing an image of two layers takes: the manifest, the config, and of
// each layer the footer and the index before it. Whoever reads both at once, by
// a good guess, saves two requests.
func TestRequestsOfPrepare(t *testing.T) {
	tests := map[testregistry.Manner]testregistry.Counts{
		testregistry.Plain:     {Total: 7, Ping: 1, Manifest: 1, Blob: 5, BlobBytes: 10 + 4*100},
		testregistry.DockerHub: {Total: 11, Ping: 1, Token: 1, Manifest: 1, Blob: 3, Storage: 5, Unauthorized: 1, BlobBytes: 10 + 4*100},
		testregistry.Quay:      {Total: 11, Ping: 1, Token: 1, Manifest: 1, Blob: 3, Storage: 5, Unauthorized: 1, BlobBytes: 10 + 4*100},
		testregistry.GHCR:      {Total: 11, Ping: 1, Token: 1, Manifest: 1, Blob: 3, Storage: 5, Unauthorized: 1, BlobBytes: 10 + 4*100},
		testregistry.ECR:       {Total: 10, Ping: 1, Manifest: 1, Blob: 3, Storage: 5, Unauthorized: 1, BlobBytes: 10 + 4*100},
	}
	for name, manner := range manners() {
		t.Run(name, func(t *testing.T) {
			server := start(t, testregistry.Options{Manner: manner})
			config, _ := addBlob(server, 10, 1)
			layers := make([]blob.Descriptor, 2)
			layers[0], _ = addBlob(server, 10_000, 2)
			layers[1], _ = addBlob(server, 20_000, 3)
			server.AddManifest(repositoryPath, "v1", v1.MediaTypeImageManifest, []byte(`{}`))

			client := newClient(t, registry.Config{}, server)
			repository := open(t, client, server, account(manner))
			if _, err := repository.Manifest(t.Context(), "v1"); err != nil {
				t.Fatal(err)
			}
			if _, err := repository.Blob(t.Context(), config, 100); err != nil {
				t.Fatal(err)
			}
			for _, layer := range layers {
				for _, offset := range []int64{layer.Size - 100, layer.Size - 300} {
					if err := read(t, repository, layer, offset, 100); err != nil {
						t.Fatal(err)
					}
				}
			}
			if diff := cmp.Diff(tests[manner], server.Counts()); diff != "" {
				t.Errorf("requests (-want +got):\n%s", diff)
			}

			// A failed attempt to speak HTTPS is a request as well.
			if got, want := client.Stats().Requests, tests[manner].Total+1; got != want {
				t.Errorf("the client counted %d requests; want %d", got, want)
			}
			if diff := cmp.Diff(client.Stats(), repository.Stats()); diff != "" {
				t.Errorf("stats (-client +repository):\n%s", diff)
			}
			if client.Stats().Bytes < 10+4*100 {
				t.Errorf("the client counted %d bytes", client.Stats().Bytes)
			}
		})
	}
}

// Repositories of one client share the ping.
func TestPingIsShared(t *testing.T) {
	server := start(t, testregistry.Options{Manner: testregistry.Quay})
	desc, _ := addBlob(server, 100, 1)
	client := newClient(t, registry.Config{}, server)
	for range 3 {
		if err := read(t, open(t, client, server, nil), desc, 0, 10); err != nil {
			t.Fatal(err)
		}
	}
	if c := server.Counts(); c.Ping != 1 || c.Token != 3 {
		t.Errorf("%d pings and %d tokens; want 1 and 3", c.Ping, c.Token)
	}
}

// read reads a range and drops it.
func read(t *testing.T, src blob.Source, desc blob.Descriptor, offset, length int64) error {
	t.Helper()
	rc, err := src.Open(t.Context(), desc, offset, length)
	if err != nil {
		return err
	}
	defer rc.Close()
	n, err := io.Copy(io.Discard, rc)
	if err == nil && n != length {
		t.Errorf("got %d bytes and no error; want %d", n, length)
	}
	return err
}
