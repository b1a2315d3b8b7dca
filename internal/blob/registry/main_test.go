// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker/reference"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// repositoryPath is where the tests keep their content.
const repositoryPath = "team/app"

// start starts a registry for the test.
func start(t *testing.T, opts testregistry.Options) *testregistry.Server {
	t.Helper()
	server, err := testregistry.Start(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	return server
}

// newClient makes a client that knows nothing of the machine's configuration.
// For servers with TLS it has their certificate, the others are marked insecure.
func newClient(t *testing.T, config registry.Config, servers ...*testregistry.Server) *registry.Client {
	t.Helper()
	dir := t.TempDir()
	certs := filepath.Join(dir, "certs.d")
	conf := ""
	for _, server := range servers {
		if ca := server.CA(); ca != nil {
			write(t, filepath.Join(certs, server.Host(), "ca.crt"), ca)
			continue
		}
		conf += fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", server.Host())
	}
	if config.RegistriesConf == "" {
		config.RegistriesConf = filepath.Join(dir, "registries.conf")
		write(t, config.RegistriesConf, []byte(conf))
	}
	config.RegistriesConfDir = filepath.Join(dir, "registries.conf.d")
	if config.CertsDir == nil {
		config.CertsDir = []string{certs}
	}
	client := registry.New(config)
	t.Cleanup(client.Close)
	return client
}

func write(t *testing.T, path string, body []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, body, 0o600); err != nil {
		t.Fatal(err)
	}
}

func parse(t *testing.T, name string) reference.Named {
	t.Helper()
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// open returns the only endpoint of the test's repository on a server.
func open(t *testing.T, client *registry.Client, server *testregistry.Server, creds *registry.Credentials) *registry.Repository {
	t.Helper()
	list, err := client.Endpoints(parse(t, server.Host()+"/"+repositoryPath+":v1"), creds)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 {
		t.Fatalf("%d endpoints; want 1", len(list))
	}
	return list[0]
}

// connect starts a registry and returns the test's repository on it.
func connect(t *testing.T, opts testregistry.Options, creds *registry.Credentials) (*testregistry.Server, *registry.Repository) {
	t.Helper()
	server := start(t, opts)
	return server, open(t, newClient(t, registry.Config{StallTimeout: 20 * time.Second}, server), server, creds)
}

// account is the one that servers know by default, as a manner wants it.
func account(manner testregistry.Manner) *registry.Credentials {
	if manner == testregistry.ECR {
		return &registry.Credentials{Username: "AWS", Password: "secret"}
	}
	return &registry.Credentials{Username: "user", Password: "secret"}
}

func addBlob(server *testregistry.Server, n int, seed uint64) (blob.Descriptor, []byte) {
	b := blobtest.Bytes(n, seed)
	return blob.Descriptor{Digest: server.AddBlob(b), Size: int64(n)}, b
}

// manners are all there are, by name.
func manners() map[string]testregistry.Manner {
	return map[string]testregistry.Manner{
		"plain":  testregistry.Plain,
		"docker": testregistry.DockerHub,
		"quay":   testregistry.Quay,
		"ghcr":   testregistry.GHCR,
		"ecr":    testregistry.ECR,
	}
}

func TestConformance(t *testing.T) {
	for name, manner := range manners() {
		for _, tls := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s tls=%v", name, tls), func(t *testing.T) {
				blobtest.Run(t, func(t *testing.T, blobs map[digest.Digest][]byte) blob.Source {
					opts := testregistry.Options{Manner: manner, TLS: tls, Private: tls}
					server, repository := connect(t, opts, account(manner))
					for _, b := range blobs {
						server.AddBlob(b)
					}
					return repository
				})
			})
		}
	}
}
