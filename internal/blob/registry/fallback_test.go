// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// ring is the node's credentials: it offers those that were not refused.
type ring struct {
	mu    sync.Mutex // protects the fields below
	has   []registry.Credentials
	asked int
}

func (k *ring) set(has ...registry.Credentials) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.has, k.asked = has, 0
}

func (k *ring) find(_ context.Context, _ string, refused []registry.Credentials) (registry.Credentials, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked++
	for _, c := range k.has {
		if !slices.Contains(refused, c) {
			return c, nil
		}
	}
	return registry.Credentials{}, nil
}

func (k *ring) config() registry.Config {
	return registry.Config{
		Credentials: k.find,
		Places:      func(string) []string { return []string{"/etc/node.json", "credential provider cloud"} },
	}
}

func wrong(manner testregistry.Manner, n int) registry.Credentials {
	return registry.Credentials{Username: account(manner).Username, Password: "hunter2" + strings.Repeat("!", n)}
}

// Credentials of a pull expire. Then those of the node are used, whichever are
// right, and the pull's are not shown again and again.
func TestNodesCredentialsAreTheFallback(t *testing.T) {
	for name, manner := range manners() {
		t.Run(name, func(t *testing.T) {
			given, stale, good := wrong(manner, 0), wrong(manner, 1), *account(manner)
			keys := &ring{}
			keys.set(stale, good)
			server := start(t, testregistry.Options{Manner: manner, Private: true})
			repository := open(t, newClient(t, keys.config(), server), server, &given)
			for i := range uint64(2) {
				desc, _ := addBlob(server, 100, i)
				if err := read(t, repository, desc, 10, 10); err != nil {
					t.Error(err)
				}
			}
			if keys.asked != 2 {
				t.Errorf("asked for credentials %d times; want 2", keys.asked)
			}

			// A new token is got with those that were right the last time.
			server.ExpireTokens()
			server.ResetCounts()
			keys.set(good)
			desc, _ := addBlob(server, 100, 2)
			if err := read(t, repository, desc, 10, 10); err != nil {
				t.Error(err)
			}
			if c := server.Counts(); c.Token > 1 {
				t.Errorf("%d tokens; want 1", c.Token)
			}
		})
	}
}

// A pull's credentials that are refused for a while are taken up again.
func TestGivenCredentialsComeBack(t *testing.T) {
	for name, manner := range manners() {
		t.Run(name, func(t *testing.T) {
			keys := &ring{}
			keys.set(wrong(manner, 0))
			server := start(t, testregistry.Options{Manner: manner, Private: true})
			repository := open(t, newClient(t, keys.config(), server), server, account(manner))
			for i, password := range []string{"secret", "something else", "secret", "secret"} {
				server.SetPassword(password)
				server.ExpireTokens()
				desc, _ := addBlob(server, 100, uint64(i))
				err := read(t, repository, desc, 10, 10)
				if want := password == "secret"; (err == nil) != want || err != nil && !errors.Is(err, blob.ErrUnauthorized) {
					t.Errorf("read %d: error = %v", i, err)
				}
				assertClean(t, err)
			}
		})
	}
}

// After a reboot there may be no credentials at all, until somebody puts some
// into a file: the next read then succeeds.
func TestMissingCredentials(t *testing.T) {
	for name, manner := range manners() {
		t.Run(name, func(t *testing.T) {
			keys := &ring{}
			server := start(t, testregistry.Options{Manner: manner, Private: true})
			client := newClient(t, keys.config(), server)
			host := server.Host()
			desc, _ := addBlob(server, 100, 1)
			for _, tt := range []struct {
				name  string
				given *registry.Credentials
				has   []registry.Credentials
				want  string
			}{
				{"none", nil, nil, "no credentials of a pull are known for HOST/team/app, and the node has none (looked in"},
				{"empty", &registry.Credentials{}, nil, "no credentials of a pull are known for HOST/team/app, and the node has none (looked in"},
				{"expired", ptr(wrong(manner, 0)), nil, "the credentials of the pull were refused (they may have expired) for HOST/team/app, and the node has none"},
				{"all wrong", ptr(wrong(manner, 0)), []registry.Credentials{wrong(manner, 1)}, "and those of the node were refused (looked in /etc/node.json, credential provider cloud): run `podman login HOST`"},
			} {
				t.Run(tt.name, func(t *testing.T) {
					keys.set(tt.has...)
					repository := open(t, client, server, tt.given)
					err := read(t, repository, desc, 10, 10)
					if !errors.Is(err, blob.ErrUnauthorized) || blob.IsTemporary(err) {
						t.Fatalf("error = %v; want %v", err, blob.ErrUnauthorized)
					}
					if want := strings.ReplaceAll(tt.want, "HOST", host); !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
						t.Errorf("error = %v\nwant %s", err, want)
					}
					assertClean(t, err)
					if repository.Authenticated() {
						t.Error("it says that credentials were accepted")
					}

					keys.set(*account(manner))
					if err := read(t, repository, desc, 10, 10); err != nil {
						t.Errorf("with credentials: %v", err)
					}
					if !repository.Authenticated() {
						t.Error("it does not say that credentials were accepted")
					}
				})
			}
		})
	}
}

func ptr[T any](v T) *T { return &v }

// Some registries answer 403 to a token that does not allow the repository.
func TestForbiddenTokens(t *testing.T) {
	var mu sync.Mutex // protects users
	users := map[string]int{}
	server := start(t, testregistry.Options{Manner: testregistry.GHCR, Fault: func(r *http.Request, _ int) testregistry.Fault {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path == "/token" {
			user, _, _ := r.BasicAuth()
			users[user]++
		}
		if strings.Contains(r.URL.Path, "/blobs/") && users["user"] == 0 {
			return testregistry.Fault{Status: http.StatusForbidden}
		}
		return testregistry.Fault{}
	}})
	client := newClient(t, registry.Config{
		Credentials: func(_ context.Context, _ string, refused []registry.Credentials) (registry.Credentials, error) {
			if len(refused) == 0 {
				return registry.Credentials{}, nil
			}
			return *account(testregistry.GHCR), nil
		},
	}, server)
	repository := open(t, client, server, nil)
	desc, _ := addBlob(server, 100, 1)
	if err := read(t, repository, desc, 10, 10); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if users[""] != 1 || users["user"] != 1 {
		t.Errorf("tokens for %v; want one for a stranger and one for the user", users)
	}
}

// What nobody is asked credentials for says nothing about them.
func TestForbiddenWithoutChallenge(t *testing.T) {
	server := start(t, testregistry.Options{Fault: onBlobs(1, testregistry.Fault{Status: http.StatusForbidden})})
	keys := &ring{}
	repository := open(t, newClient(t, keys.config(), server), server, account(testregistry.Plain))
	desc, _ := addBlob(server, 100, 1)
	err := read(t, repository, desc, 10, 10)
	if !errors.Is(err, blob.ErrUnauthorized) || strings.Contains(err.Error(), "pull") || keys.asked != 0 {
		t.Errorf("error = %v, asked %d times", err, keys.asked)
	}
	if err := read(t, repository, desc, 10, 10); err != nil || repository.Authenticated() {
		t.Errorf("error = %v, authenticated %v", err, repository.Authenticated())
	}
}

// However many credentials there are, a request ends.
func TestEndlessCredentials(t *testing.T) {
	for name, manner := range manners() {
		t.Run(name, func(t *testing.T) {
			server := start(t, testregistry.Options{Manner: manner, Private: true})
			client := newClient(t, registry.Config{
				Credentials: func(_ context.Context, _ string, refused []registry.Credentials) (registry.Credentials, error) {
					return wrong(manner, len(refused)), nil
				},
			}, server)
			desc, _ := addBlob(server, 100, 1)
			err := read(t, open(t, client, server, nil), desc, 10, 10)
			if !errors.Is(err, blob.ErrUnauthorized) {
				t.Errorf("error = %v", err)
			}
			assertClean(t, err)
			if c := server.Counts(); c.Total > 20 {
				t.Errorf("%d requests", c.Total)
			}
		})
	}
}

// Readers that are refused together share what is found next.
func TestFallbackIsShared(t *testing.T) {
	given := wrong(testregistry.Quay, 0)
	keys := &ring{}
	keys.set(*account(testregistry.Quay))
	server := start(t, testregistry.Options{Manner: testregistry.Quay, Private: true, TokenLifetime: time.Hour})
	repository := open(t, newClient(t, keys.config(), server), server, &given)
	var wg sync.WaitGroup
	for i := range uint64(20) {
		desc, _ := addBlob(server, 100, i)
		wg.Go(func() {
			if err := read(t, repository, desc, 10, 10); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if c := server.Counts(); c.Token != 2 || keys.asked != 1 {
		t.Errorf("%d tokens, asked %d times; want 2 and 1", c.Token, keys.asked)
	}
}
