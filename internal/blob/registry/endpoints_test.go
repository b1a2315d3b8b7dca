// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

const conf = `
[[registry]]
prefix = "example.com/team"
location = "internal.example.com/moved"
[[registry.mirror]]
location = "mirror.example.com/a"
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "mirror.example.com:5000/b"

[[registry]]
location = "bad.example.com"
blocked = true
`

func TestEndpoints(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registries.conf")
	write(t, path, []byte(conf))
	client := newClient(t, registry.Config{RegistriesConf: path})
	const digested = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for _, tt := range []struct {
		ref   string
		want  []string
		fails string
	}{
		{ref: "debian", want: []string{"docker.io/library/debian"}},
		{ref: "other.example.com:8080/x/y", want: []string{"other.example.com:8080/x/y"}},
		{ref: "example.com/team/app:v1", want: []string{"mirror.example.com:5000/b/app", "internal.example.com/moved/app"}},
		{ref: "example.com/team/app" + digested, want: []string{"mirror.example.com/a/app", "mirror.example.com:5000/b/app", "internal.example.com/moved/app"}},
		{ref: "bad.example.com/x", fails: "blocked"},
	} {
		list, err := client.Endpoints(parse(t, tt.ref), nil)
		if (err == nil) != (tt.fails == "") || err != nil && !strings.Contains(err.Error(), tt.fails) {
			t.Errorf("%s: error %v; want %q", tt.ref, err, tt.fails)
		}
		var got []string
		for _, repository := range list {
			got = append(got, repository.Name())
			if repository.String() != repository.Name() {
				t.Errorf("%s is also called %s", repository.Name(), repository)
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("endpoints of %s (-want +got):\n%s", tt.ref, diff)
		}
	}

	// What is in the file now counts.
	write(t, path, []byte("[[registry]]\nlocation = \"example.com\"\nblocked = true\n"))
	if _, err := client.Endpoints(parse(t, "example.com/team/app"), nil); err == nil {
		t.Error("a change of registries.conf went unnoticed")
	}
	write(t, path, []byte("[[registry"))
	if _, err := client.Endpoints(parse(t, "example.com/team/app"), nil); err == nil {
		t.Error("a damaged registries.conf went unnoticed")
	}
}

// Credentials are for the registry that the reference names, and not for its mirrors.
func TestCredentialsOfMirrors(t *testing.T) {
	var mu sync.Mutex // protects seen
	var seen []string
	mirror := start(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
		user, _, _ := r.BasicAuth()
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.URL.Path+" "+user)
		return testregistry.Fault{}
	}, Private: true, Username: "mirror"})
	primary := start(t, testregistry.Options{Private: true})
	desc, _ := addBlob(mirror, 100, 1)
	addBlob(primary, 100, 1)

	path := filepath.Join(t.TempDir(), "registries.conf")
	write(t, path, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n[[registry.mirror]]\nlocation = \"%s/cached\"\ninsecure = true\n",
		primary.Host(), mirror.Host()))
	client := newClient(t, registry.Config{
		RegistriesConf: path,
		Credentials: func(_ context.Context, repository string, _ []registry.Credentials) (registry.Credentials, error) {
			if repository != mirror.Host()+"/cached/"+repositoryPath {
				t.Errorf("asked for the credentials of %s", repository)
			}
			return registry.Credentials{Username: "mirror", Password: "secret"}, nil
		},
	})
	list, err := client.Endpoints(parse(t, primary.Host()+"/"+repositoryPath), account(testregistry.Plain))
	if err != nil || len(list) != 2 {
		t.Fatalf("%d endpoints, error %v", len(list), err)
	}
	for _, repository := range list {
		if err := read(t, repository, desc, 10, 10); err != nil {
			t.Error(err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	want := []string{"/v2/ ", "/v2/cached/" + repositoryPath + "/blobs/" + desc.Digest.String() + " mirror"}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("requests to the mirror (-want +got):\n%s", diff)
	}
}

func TestTLS(t *testing.T) {
	server := start(t, testregistry.Options{TLS: true})
	desc, _ := addBlob(server, 100, 1)
	dir := t.TempDir()
	certs := filepath.Join(dir, "certs.d")
	config := registry.Config{RegistriesConf: filepath.Join(dir, "registries.conf"), CertsDir: []string{filepath.Join(dir, "none"), certs}}
	write(t, config.RegistriesConf, nil)
	client := newClient(t, config)

	err := read(t, open(t, client, server, nil), desc, 10, 10)
	if err == nil || blob.IsTemporary(err) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("error without a CA = %v; want one about the certificate", err)
	}
	write(t, filepath.Join(certs, server.Host(), "ca.crt"), server.CA())
	if err := read(t, open(t, client, server, nil), desc, 10, 10); err != nil {
		t.Errorf("with a CA: %v", err)
	}
	write(t, filepath.Join(certs, server.Host(), "client.key"), []byte("no certificate for it"))
	if _, err := client.Endpoints(parse(t, server.Host()+"/x"), nil); err == nil {
		t.Error("no error with a key that has no certificate")
	}

	insecure := registry.Config{RegistriesConf: filepath.Join(dir, "insecure.conf")}
	write(t, insecure.RegistriesConf, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", server.Host()))
	if err := read(t, open(t, newClient(t, insecure), server, nil), desc, 10, 10); err != nil {
		t.Errorf("insecure: %v", err)
	}
}

// HTTP has to be allowed, on loopback too.
func TestHTTPIsNotTheDefault(t *testing.T) {
	server := start(t, testregistry.Options{})
	desc, _ := addBlob(server, 100, 1)
	err := read(t, open(t, newClient(t, registry.Config{}), server, nil), desc, 10, 10)
	if err == nil || blob.IsTemporary(err) {
		t.Errorf("error = %v; want a permanent one", err)
	}
	if c := server.Counts(); c.Total != 0 {
		t.Errorf("%d requests over HTTP", c.Total)
	}
}

func TestRegistryIsDown(t *testing.T) {
	server := start(t, testregistry.Options{TLS: true})
	client := newClient(t, registry.Config{}, server)
	repository := open(t, client, server, nil)
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	desc := blob.Descriptor{Digest: "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", Size: 100}
	if err := read(t, repository, desc, 10, 10); !blob.IsTemporary(err) || errors.Is(err, blob.ErrNotFound) {
		t.Errorf("error = %v; want a temporary one", err)
	}
}
