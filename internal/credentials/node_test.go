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
	"sync"
	"testing"
	"testing/synctest"
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

func TestProvider(t *testing.T) {
	p := newPlace(t)
	p.providers(t, "cloud", answering)
	n := NewNode(p.Config)
	p.answer(t, scopeRegistry, "1h", login(1))
	for _, repository := range []string{"a.example/one", "a.example/two", "b.example/one"} {
		if got := find(t, n, repository); got != login(1) {
			t.Errorf("%s: %s", repository, password(got))
		}
	}
	if got := find(t, n, "example.org/app"); got != (registry.Credentials{}) {
		t.Errorf("an image that is not the provider's: %s", password(got))
	}
	if diff := cmp.Diff([]string{"a.example/one", "b.example/one"}, p.requests(t)); diff != "" {
		t.Errorf("asked for (-want +got):\n%s", diff)
	}
	// Files come first: asking them costs nothing.
	write(t, p.AuthFile, authJSON("c.example", login(2)))
	if got := find(t, n, "c.example/app"); got != login(2) || len(p.requests(t)) != 2 {
		t.Errorf("%s, requests %v", password(got), p.requests(t))
	}
	if got := find(t, n, "c.example/app", login(2)); got != login(1) {
		t.Errorf("after a refusal: %s", password(got))
	}
}

func TestProviderAnswersAreCached(t *testing.T) {
	for _, tt := range []struct {
		scope, duration string
		after           time.Duration
		want            []string // requests
	}{
		{scopeImage, "1h", time.Minute, []string{"a.example/1", "a.example/2", "b.example/1"}},
		{scopeRegistry, "1h", time.Minute, []string{"a.example/1", "b.example/1"}},
		{scopeGlobal, "1h", time.Minute, []string{"a.example/1"}},
		{scopeGlobal, "1h", 2 * time.Hour, []string{"a.example/1", "a.example/1"}},
		{scopeGlobal, "0s", time.Second, []string{"a.example/1"}},
		{scopeGlobal, "0s", time.Minute, []string{"a.example/1", "a.example/1"}},
	} {
		t.Run(fmt.Sprint(tt.scope, tt.duration, tt.after), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPlace(t)
				p.providers(t, "cloud", answering)
				p.answer(t, tt.scope, tt.duration, login(1))
				n := NewNode(p.Config)
				for _, image := range []string{"a.example/1", "a.example/2", "b.example/1"} {
					find(t, n, image)
				}
				time.Sleep(tt.after)
				if got := find(t, n, "a.example/1"); got != login(1) {
					t.Errorf("got %s", password(got))
				}
				if diff := cmp.Diff(tt.want, p.requests(t)); diff != "" {
					t.Errorf("requests (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// What the registry refused is asked for again, but not all the time.
func TestProviderIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlace(t)
		p.providers(t, "cloud", answering)
		p.answer(t, scopeGlobal, "12h", login(1))
		n := NewNode(p.Config)
		find(t, n, "a.example/1")
		p.answer(t, scopeGlobal, "12h", login(2))
		for range 3 {
			if got := find(t, n, "a.example/1", login(1)); got != (registry.Credentials{}) {
				t.Errorf("at once: %s", password(got))
			}
		}
		time.Sleep(holdOff)
		if got := find(t, n, "a.example/1", login(1)); got != login(2) {
			t.Errorf("a little later: %s", password(got))
		}
		if got := find(t, n, "a.example/1"); got != login(2) {
			t.Errorf("then: %s", password(got))
		}
		if len(p.requests(t)) != 2 {
			t.Errorf("requests %v", p.requests(t))
		}
	})
}

func TestProviderFails(t *testing.T) {
	for name, tt := range map[string]struct{ script, want string }{
		"exit":        {"echo hunter2; echo hunter2 >&2; exit 3", "running credential provider cloud: exit status 3"},
		"no JSON":     {"echo hunter2", "its answer is not a CredentialProviderResponse"},
		"nothing":     {"cat > /dev/null", "its answer is not a CredentialProviderResponse"},
		"endless":     {"while :; do echo hunter2hunter2hunter2hunter2hunter2hunter2hunter2hunter2hunter2; done", "more than 1048576 bytes"},
		"reads not":   {"exec <&-; cat $DIR/none; exit 4", "exit status 4"},
		"interpreter": {"", "cloud"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			p.providers(t, "cloud", tt.script, "other", answering)
			if name == "interpreter" {
				write(t, filepath.Join(p.ProviderDir, "cloud"), "#!/no/such/program\n")
			}
			p.answer(t, scopeGlobal, "1h", login(1))
			n := NewNode(p.Config)
			if got := find(t, n, "a.example/1"); got != login(1) { // of the next provider
				t.Errorf("got %s", password(got))
			}
			_, err := n.Find(t.Context(), "a.example/1", []registry.Credentials{login(1)})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !blob.IsTemporary(err) {
				t.Fatalf("error = %v; want %s", err, tt.want)
			}
			assertClean(t, err.Error())
		})
	}
}

// A plugin that hangs is ended, with what it started, and callers need not wait.
func TestProviderHangs(t *testing.T) {
	p := newPlace(t)
	p.providers(t, "cloud", "echo $$ > $DIR/pid; read x < "+fifo(t, p.dir)+" & wait")
	n := NewNode(p.Config)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := n.Find(ctx, "a.example/1", nil); !errors.Is(err, context.Canceled) {
			t.Errorf("error = %v", err)
		}
	})
	pid := filepath.Join(p.dir, "pid")
	for started := false; !started; {
		data, err := os.ReadFile(pid)
		started = err == nil && strings.HasSuffix(string(data), "\n")
		time.Sleep(time.Millisecond)
	}
	cancel()
	wg.Wait()
	n.providers.running.Wait()
	data, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/proc/" + strings.TrimSpace(string(data))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the plugin still runs: %v", err)
	}
}

func TestProviderTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), pluginTimeout)
		defer cancel()
		time.Sleep(pluginTimeout)
		p := newPlace(t)
		p.providers(t, "cloud", answering)
		list, err := readConfig(p.ProviderConfig)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := list[0].run(ctx, p.ProviderDir, "a.example/1"); err == nil || !strings.Contains(err.Error(), "no answer within 1m") {
			t.Errorf("error = %v", err)
		}
	})
}

// Callers who want the same share a run.
func TestProviderRunsOnce(t *testing.T) {
	p := newPlace(t)
	p.providers(t, "cloud", answering)
	p.answer(t, scopeImage, "1h", login(1))
	n := NewNode(p.Config)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() { find(t, n, "a.example/1") })
	}
	wg.Wait()
	if r := p.requests(t); len(r) != 1 {
		t.Errorf("requests %v", r)
	}
}

func TestProviderConfigIsReadAnew(t *testing.T) {
	p := newPlace(t)
	p.providers(t, "cloud", answering)
	p.answer(t, scopeImage, "1h", login(1))
	good, err := os.ReadFile(p.ProviderConfig)
	if err != nil {
		t.Fatal(err)
	}
	n := NewNode(p.Config)
	for name, text := range map[string]string{
		"damaged": "kind: [hunter2",
		"other":   "kind: Pod",
		"large":   strings.Repeat("#", maxConfig+1),
	} {
		write(t, p.ProviderConfig, text)
		_, err := n.Find(t.Context(), "a.example/1", nil)
		if err == nil || !strings.Contains(err.Error(), p.ProviderConfig) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: error = %v", name, err)
		}
	}
	write(t, p.ProviderConfig, string(good))
	if got := find(t, n, "a.example/1"); got != login(1) {
		t.Errorf("got %s", password(got))
	}
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
