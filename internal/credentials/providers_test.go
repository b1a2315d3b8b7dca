// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"context"
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
