// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
)

// place is a node's file system.
type place struct {
	dir string
	Config
}

func newPlace(t *testing.T) place {
	t.Helper()
	dir := t.TempDir()
	p := place{dir, Config{
		AuthFile:  filepath.Join(dir, "auth.json"),
		AuthFiles: []string{filepath.Join(dir, "kubelet.json"), filepath.Join(dir, "docker.json")},
		// Those of the machine that runs the test do not count.
		RegistriesConf: filepath.Join(dir, "registries.conf"), RegistriesConfDir: filepath.Join(dir, "registries.conf.d"),
	}}
	write(t, p.RegistriesConf, "")
	return p
}

// authJSON is a file for one registry or repository.
func authJSON(key string, c registry.Credentials) string {
	auth := base64.StdEncoding.EncodeToString([]byte(c.Username + ":" + c.Password))
	return fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, key, auth)
}

// providers configures plugins: name and script of each.
func (p *place) providers(t *testing.T, scripts ...string) {
	t.Helper()
	p.ProviderConfig, p.ProviderDir = filepath.Join(p.dir, "providers.yaml"), filepath.Join(p.dir, "bin")
	config := "kind: CredentialProviderConfig\napiVersion: kubelet.config.k8s.io/v1\nproviders:\n"
	for i := 0; i < len(scripts); i += 2 {
		config += fmt.Sprintf("- {name: %s, matchImages: [\"*.example\"], defaultCacheDuration: 1h, "+
			"apiVersion: credentialprovider.kubelet.k8s.io/v1, args: [one], env: [{name: DIR, value: %q}]}\n", scripts[i], p.dir)
		write(t, filepath.Join(p.ProviderDir, scripts[i]), "#!/bin/sh\n"+scripts[i+1])
	}
	write(t, p.ProviderConfig, config)
}

// answering is a plugin that notes its request and prints the file "answer".
const answering = "cat >> $DIR/requests; echo >> $DIR/requests; cat $DIR/answer\n"

func (p *place) answer(t *testing.T, scope, duration string, c registry.Credentials) {
	t.Helper()
	body, err := json.Marshal(map[string]any{
		"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
		"cacheKeyType": scope, "cacheDuration": duration,
		"auth": map[string]any{"*.example": map[string]string{"username": c.Username, "password": c.Password}},
	})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(p.dir, "answer"), string(body))
}

// requests are the images that plugins were asked about.
func (p *place) requests(t *testing.T) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(p.dir, "requests"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var images []string
	for line := range strings.Lines(string(data)) {
		var r struct{ Kind, APIVersion, Image string }
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.Kind != "CredentialProviderRequest" || r.APIVersion != "credentialprovider.kubelet.k8s.io/v1" {
			t.Errorf("request %q", line)
		}
		images = append(images, r.Image)
	}
	return images
}

func find(t *testing.T, n *Node, repository string, refused ...registry.Credentials) registry.Credentials {
	t.Helper()
	c, err := n.Find(t.Context(), repository, refused)
	if err != nil {
		t.Errorf("%s: %v", repository, err)
	}
	return c
}

func TestFiles(t *testing.T) {
	p := newPlace(t)
	n := NewNode(p.Config)
	check := func(repository string, want registry.Credentials, refused ...registry.Credentials) {
		t.Helper()
		if got := find(t, n, repository, refused...); got != want {
			t.Errorf("%s: %s; want %s", repository, password(got), password(want))
		}
	}
	check("quay.io/team/app", registry.Credentials{})

	// What is put there later, or is rotated, counts at once.
	write(t, p.AuthFiles[1], authJSON("quay.io", login(3)))
	check("quay.io/team/app", login(3))
	write(t, p.AuthFiles[0], authJSON("quay.io/team", login(2)))
	check("quay.io/team/app", login(2))
	write(t, p.AuthFile, authJSON("quay.io", login(1)))
	check("quay.io/team/app", login(1))
	write(t, p.AuthFile, authJSON("quay.io", login(9)))
	check("quay.io/team/app", login(9))

	// What the registry refused does not hide what comes after it.
	check("quay.io/team/app", login(2), login(9))
	check("quay.io/team/app", login(3), login(9), login(2))
	check("quay.io/team/app", registry.Credentials{}, login(9), login(2), login(3))

	// A file that is damaged does not hide the others.
	write(t, p.AuthFile, "{hunter2")
	check("quay.io/team/app", login(2))
	_, err := n.Find(t.Context(), "ghcr.io/app", nil)
	if err == nil || !strings.Contains(err.Error(), p.AuthFile) || blob.IsTemporary(err) {
		t.Errorf("error = %v; want one about %s", err, p.AuthFile)
	} else {
		assertClean(t, err.Error())
	}
	if _, err := n.Find(t.Context(), "No Repository", nil); err == nil {
		t.Error("no error for what is no repository")
	}
}

func TestDockerHub(t *testing.T) {
	p := newPlace(t)
	write(t, p.AuthFiles[1], authJSON("https://index.docker.io/v1/", login(1)))
	if got := find(t, NewNode(p.Config), "docker.io/library/debian"); got != login(1) {
		t.Errorf("got %s", password(got))
	}
}

// Both Docker and kubelet let files name credential helpers.
func TestCredentialHelpers(t *testing.T) {
	p := newPlace(t)
	write(t, filepath.Join(p.dir, "docker-credential-cloud"), "#!/bin/sh\n"+
		`echo "{\"Username\":\"user1\",\"Secret\":\"hunter2-1\"}"`)
	t.Setenv("PATH", p.dir+":"+os.Getenv("PATH"))
	write(t, p.AuthFiles[0], `{"credHelpers":{"quay.io":"cloud"}}`)
	n := NewNode(p.Config)
	if got := find(t, n, "quay.io/app"); got != login(1) {
		t.Errorf("got %s", password(got))
	}

	// One that hangs holds up nobody who leaves.
	write(t, filepath.Join(p.dir, "docker-credential-cloud"), "#!/bin/sh\nread x < "+fifo(t, p.dir))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := n.Find(ctx, "quay.io/app", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error = %v", err)
	}
	write(t, filepath.Join(p.dir, "fifo"), "end\n")
	n.lookups.Wait()
}

func TestPlaces(t *testing.T) {
	p := newPlace(t)
	write(t, p.AuthFile, "{}")
	files := []string{p.AuthFile, p.AuthFiles[0] + " (does not exist)", p.AuthFiles[1] + " (does not exist)"}
	check := func(repository string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(append(files[:3:3], want...), NewNode(p.Config).Places(repository)); diff != "" {
			t.Errorf("places (-want +got):\n%s", diff)
		}
	}
	check("quay.io/x", "no credential providers are configured")
	p.ProviderConfig = filepath.Join(p.dir, "providers.yaml")
	check("quay.io/x", p.ProviderConfig+" (cannot be read)")
	write(t, p.ProviderConfig, goodConfig)
	check("a.cloud.example/x", "credential provider cloud", "credential provider pods (not asked: it wants the service account of a pod)")
	check("quay.io/x", "no credential provider of "+p.ProviderConfig+" is for this image")

	p.AuthFile = ""
	files[0] = "the files of podman login"
	check("registry.example/team/x", "credential provider cloud")
}
