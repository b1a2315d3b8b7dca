// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestCredentials(t *testing.T) {
	wrong := &registry.Credentials{Username: "AWS", Password: "hunter2"}
	for name, manner := range manners() {
		t.Run(name, func(t *testing.T) {
			for _, tt := range []struct {
				name    string
				creds   *registry.Credentials
				private bool
				want    error
			}{
				{"right", account(manner), true, nil},
				{"right but not needed", account(manner), false, nil},
				{"wrong", wrong, true, blob.ErrUnauthorized},
				{"none", nil, true, blob.ErrUnauthorized},
				{"none, explicitly", &registry.Credentials{}, true, blob.ErrUnauthorized},
			} {
				t.Run(tt.name, func(t *testing.T) {
					server, repository := connect(t, testregistry.Options{Manner: manner, Private: tt.private}, tt.creds)
					desc, _ := addBlob(server, 100, 1)
					err := read(t, repository, desc, 10, 10)
					if !errors.Is(err, tt.want) || blob.IsTemporary(err) {
						t.Errorf("error = %v; want %v", err, tt.want)
					}
					assertClean(t, err)
				})
			}
		})
	}
}

// assertClean checks that an error tells no secret of these tests.
func assertClean(t *testing.T, err error) {
	t.Helper()
	for ; err != nil; err = errors.Unwrap(err) {
		for _, secret := range []string{"hunter2", "secret", "refresh-me", "X-Signature", "Basic ", "Bearer "} {
			if strings.Contains(err.Error(), secret) {
				t.Errorf("error %q contains %q", err, secret)
			}
		}
	}
}

func TestIdentityToken(t *testing.T) {
	for _, token := range []string{"refresh-me", "hunter2"} {
		server, repository := connect(t, testregistry.Options{
			Manner: testregistry.Quay, Private: true, IdentityToken: "refresh-me",
		}, &registry.Credentials{IdentityToken: token})
		desc, _ := addBlob(server, 100, 1)
		err := read(t, repository, desc, 10, 10)
		if want := token == "refresh-me"; (err == nil) != want {
			t.Errorf("error with %s = %v", token, err)
		}
		assertClean(t, err)
	}
}

// Tokens may end at any time. Whoever is refused gets a new one, together.
func TestTokensExpire(t *testing.T) {
	server, repository := connect(t, testregistry.Options{Manner: testregistry.GHCR, Private: true}, account(testregistry.GHCR))
	var descs []blob.Descriptor
	for i := range 20 {
		desc, _ := addBlob(server, 100, uint64(i))
		descs = append(descs, desc)
	}
	if err := read(t, repository, descs[0], 0, 1); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		server.ResetCounts()
		server.ExpireTokens()
		server.ExpireRedirects()
		var wg sync.WaitGroup
		for _, desc := range descs {
			wg.Go(func() {
				if err := read(t, repository, desc, 10, 10); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if c := server.Counts(); c.Token != 1 || c.Ping != 0 {
			t.Errorf("%d tokens and %d pings; want 1 and 0", c.Token, c.Ping)
		}
	}
}

// A token service may hand out what the registry does not take.
func TestTokensAreNeverGood(t *testing.T) {
	server, repository := connect(t, testregistry.Options{Manner: testregistry.Quay, TokenLifetime: time.Nanosecond}, nil)
	desc, _ := addBlob(server, 100, 1)
	err := read(t, repository, desc, 10, 10)
	if !errors.Is(err, blob.ErrUnauthorized) {
		t.Errorf("error = %v; want %v", err, blob.ErrUnauthorized)
	}
	if c := server.Counts(); c.Token != 2 {
		t.Errorf("%d tokens; want one and a second attempt", c.Token)
	}
}

// The credentials of ECR expire. Those that are looked up are looked up again.
func TestPasswordChanges(t *testing.T) {
	var password atomic.Value
	password.Store("secret")
	server := start(t, testregistry.Options{Manner: testregistry.ECR})
	var asked []string
	client := newClient(t, registry.Config{
		Credentials: func(_ context.Context, repository string, _ []registry.Credentials) (registry.Credentials, error) {
			asked = append(asked, repository)
			return registry.Credentials{Username: "AWS", Password: password.Load().(string)}, nil
		},
	}, server)
	repository := open(t, client, server, nil)
	for i, next := range []string{"secret", "hunter2", "hunter2"} {
		password.Store(next)
		server.SetPassword(next)
		desc, _ := addBlob(server, 100, uint64(i))
		if err := read(t, repository, desc, 10, 10); err != nil {
			t.Errorf("with password %d: %v", i, err)
		}
	}
	if want := server.Host() + "/" + repositoryPath; len(asked) != 2 || asked[0] != want {
		t.Errorf("asked for %q; want two times %q", asked, want)
	}

	// What cannot be helped is not asked a second time.
	server.SetPassword("something else")
	server.ResetCounts()
	desc, _ := addBlob(server, 100, 99)
	err := read(t, repository, desc, 10, 10)
	if !errors.Is(err, blob.ErrUnauthorized) {
		t.Errorf("error = %v; want %v", err, blob.ErrUnauthorized)
	}
	assertClean(t, err)
	if c := server.Counts(); c.Total != 1 {
		t.Errorf("%d requests; want 1", c.Total)
	}
}

// A lookup that fails is an error for those who need it: strangers may still
// read what is public.
func TestLookupFails(t *testing.T) {
	for _, tt := range []struct {
		name    string
		private bool
		lookup  error
	}{
		{"public", false, errors.New("the file is damaged")},
		{"private", true, errors.New("the file is damaged")},
		{"private, and the next lookup may succeed", true, blob.Temporary(errors.New("the file is damaged"))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := start(t, testregistry.Options{Manner: testregistry.Quay, Private: tt.private})
			client := newClient(t, registry.Config{
				Credentials: func(context.Context, string, []registry.Credentials) (registry.Credentials, error) {
					return registry.Credentials{}, tt.lookup
				},
			}, server)
			desc, _ := addBlob(server, 100, 1)
			err := read(t, open(t, client, server, nil), desc, 10, 10)
			if !tt.private {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, blob.ErrUnauthorized) || !strings.Contains(err.Error(), "the file is damaged") ||
				blob.IsTemporary(err) != blob.IsTemporary(tt.lookup) {
				t.Errorf("error = %v", err)
			}
		})
	}
}

// The storage of the test registry refuses requests with an Authorization
// header, so that every test with redirects shows that none is sent. This one
// shows that the check is made.
func TestStorageRefusesCredentials(t *testing.T) {
	server := start(t, testregistry.Options{Manner: testregistry.GHCR, Fault: func(r *http.Request, _ int) testregistry.Fault {
		if strings.HasPrefix(r.URL.Path, "/store/") {
			r.Header.Set("Authorization", "Bearer x")
		}
		return testregistry.Fault{}
	}})
	desc, _ := addBlob(server, 100, 1)
	err := read(t, open(t, newClient(t, registry.Config{}, server), server, nil), desc, 10, 10)
	if err == nil || !strings.Contains(err.Error(), "400") {
		t.Errorf("error = %v; want one about status 400", err)
	}
	assertClean(t, err)
}

func TestCredentialsDoNotPrint(t *testing.T) {
	for _, c := range []registry.Credentials{
		{Username: "user", Password: "hunter2"},
		{Username: "user", IdentityToken: "hunter2"},
		{Password: "hunter2"},
	} {
		encoded, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []string{
			c.String(), c.LogValue().String(), string(encoded),
			fmt.Sprint(c), fmt.Sprintf("%v %+v %#v %s %q", c, c, c, c, c), fmt.Sprintf("%v %+v %#v", &c, &c, &c),
		} {
			if strings.Contains(s, "hunter2") {
				t.Errorf("printed as %q", s)
			}
		}
	}
}
