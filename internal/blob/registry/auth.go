// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/holdfast/holdfast/internal/blob"
)

const (
	maxHosts       = 256
	maxControlBody = 1 << 20
)

// turn lets one goroutine at a time pass; unlike a mutex, waiting for it ends
// with the context.
type turn chan struct{}

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turn) release() { <-t }

// hostKey names what a ping is about.
type hostKey struct {
	name     string
	insecure bool
}

// host is what repositories on the same registry share: the answer to a ping.
type host struct {
	turn      turn // protects challenge
	challenge *transport.Challenge
}

func (c *Client) host(key hostKey) *host {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.hosts[key]
	if h == nil {
		if len(c.hosts) >= maxHosts {
			clear(c.hosts) // whoever uses one keeps it; the others are asked anew
		}
		h = &host{turn: make(turn, 1)}
		c.hosts[key] = h
	}
	return h
}

// ping asks the registry how to authenticate, once. The result must not be changed.
func (h *host) ping(ctx context.Context, registry name.Registry, t http.RoundTripper) (*transport.Challenge, error) {
	if err := h.turn.take(ctx); err != nil {
		return nil, err
	}
	defer h.turn.release()
	if h.challenge == nil {
		challenge, err := transport.Ping(ctx, registry, t)
		if err != nil {
			return nil, err
		}
		h.challenge = challenge
	}
	return h.challenge, nil
}

// grant is what a request to the registry needs: the scheme, and the value of
// the Authorization header, which may be empty.
type grant struct {
	scheme  string
	header  string
	expires time.Time // zero if that is not known
}

func (g *grant) usable() bool {
	return g != nil && (g.expires.IsZero() || time.Now().Before(g.expires))
}

// authorize returns the grant of the repository and gets one if there is none
// that is good for anything. One that the registry refused is named by refused,
// and challenge is what it said then, if anything; the result is nil if there is
// nothing else to show.
func (r *Repository) authorize(ctx context.Context, refused *grant, challenge *transport.Challenge) (*grant, error) {
	if g := r.grant.Load(); g.usable() && g != refused {
		return g, nil
	}
	if err := r.turn.take(ctx); err != nil {
		return nil, err
	}
	defer r.turn.release()
	if g := r.grant.Load(); g.usable() && g != refused {
		return g, nil // somebody else got it meanwhile
	}
	timed, cancel := context.WithTimeout(ctx, r.client.config.StallTimeout)
	defer cancel()
	control := &controlTransport{base: r.meter, repository: r}
	g, err := r.negotiate(timed, control, refused, challenge)
	if err != nil {
		return nil, fmt.Errorf("authenticating to %s: %w", r.registry, r.authError(ctx, err, control.retryAfter()))
	}
	if g != nil {
		r.grant.Store(g)
	}
	return g, nil
}

// negotiate does what the challenge asks for.
func (r *Repository) negotiate(ctx context.Context, t http.RoundTripper, refused *grant, challenge *transport.Challenge) (*grant, error) {
	if challenge == nil {
		var err error
		if challenge, err = r.host.ping(ctx, r.registry, t); err != nil {
			return nil, err
		}
	}
	g := &grant{scheme: "https"}
	if challenge.Insecure {
		g.scheme = "http"
	}
	switch strings.ToLower(challenge.Scheme) {
	case "":
	case "basic":
		credentials, err := r.credentials(ctx)
		if err != nil {
			return nil, err
		}
		if credentials.Username != "" {
			pair := credentials.Username + ":" + credentials.Password
			g.header = "Basic " + base64.StdEncoding.EncodeToString([]byte(pair))
		}
	case "bearer":
		if err := r.exchange(ctx, t, challenge, g); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("the registry wants %q, which is not supported", shorten(challenge.Scheme))
	}
	if refused != nil && g.header == refused.header {
		return nil, nil
	}
	return g, nil
}

// exchange gets a token from the service that the challenge names.
func (r *Repository) exchange(ctx context.Context, t http.RoundTripper, challenge *transport.Challenge, g *grant) error {
	credentials, err := r.credentials(ctx)
	if err != nil {
		return err
	}
	scopes := []string{"repository:" + r.path + ":pull"}
	if scope := challenge.Parameters["scope"]; scope != "" && !slices.Contains(scopes, scope) {
		// Some token services look at the first scope only.
		scopes = []string{scope, scopes[0]}
	}
	began := time.Now()
	token, err := transport.Exchange(ctx, r.realmRegistry(challenge), credentials.authenticator(), t, scopes, challenge)
	if err != nil {
		return err
	}
	g.header = "Bearer " + cmp.Or(token.AccessToken, token.Token)
	if token.ExpiresIn > 0 {
		// A little early, so that it is still good when it arrives.
		lifetime := min(time.Duration(token.ExpiresIn), 1<<20) * time.Second
		g.expires = began.Add(lifetime - lifetime/10)
	}
	return nil
}

// realmRegistry is the registry for whose token service Exchange checks the
// realm. It refuses realms on private addresses, lest a registry make us ask
// services inside of the network, except on the registry itself; but a registry
// in a private network may well have its token service on another port.
func (r *Repository) realmRegistry(challenge *transport.Challenge) name.Registry {
	realm, err := url.Parse(challenge.Parameters["realm"])
	if err != nil {
		return r.registry // Exchange tells
	}
	own := url.URL{Host: r.registry.RegistryStr()}
	if realm.Hostname() != own.Hostname() {
		return r.registry
	}
	registry, err := name.NewRegistry(realm.Host)
	if err != nil {
		return r.registry
	}
	return registry
}

// credentials returns those that were given, or looks some up.
func (r *Repository) credentials(ctx context.Context) (Credentials, error) {
	if r.given != nil {
		r.shown.Store(r.given)
		return *r.given, nil
	}
	if r.client.config.Credentials == nil {
		return Credentials{}, nil
	}
	credentials, err := r.client.config.Credentials(ctx, r.name)
	if err != nil {
		return Credentials{}, fmt.Errorf("looking up credentials: %w", err)
	}
	r.shown.Store(&credentials)
	return credentials, nil
}

// challengeOf reads the challenge of a refusal; nil if it holds none. The
// library only parses challenges as part of a ping, so it gets to see one.
func (r *Repository) challengeOf(ctx context.Context, resp *http.Response) *transport.Challenge {
	if resp.StatusCode != http.StatusUnauthorized || resp.Header.Get("WWW-Authenticate") == "" {
		return nil
	}
	challenge, err := transport.Ping(ctx, r.registry, roundTripperFunc(func(req *http.Request) (*http.Response, error) {
		return &http.Response{
			StatusCode: resp.StatusCode,
			Header:     http.Header{"Www-Authenticate": resp.Header.Values("WWW-Authenticate")},
			Body:       http.NoBody,
			Request:    req,
		}, nil
	}))
	if err != nil {
		return nil
	}
	challenge.Insecure = resp.Request.URL.Scheme == "http"
	return challenge
}

type roundTripperFunc func(*http.Request) (*http.Response, error)

func (f roundTripperFunc) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// authError tells what an error of a ping, of the token service or of the
// lookup means. The library's errors are not kept: they quote URLs and answers.
func (r *Repository) authError(ctx context.Context, err error, after time.Duration) error {
	var answer *transport.Error
	var failed *url.Error
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &answer):
		text := fmt.Sprintf("answered %d %s", answer.StatusCode, http.StatusText(answer.StatusCode))
		if len(answer.Errors) > 0 {
			text += fmt.Sprintf(": %q", r.scrub(string(answer.Errors[0].Code)+": "+answer.Errors[0].Message))
		}
		if answer.StatusCode == http.StatusNotFound {
			return errors.New(text) // the service is not there, which says nothing about blobs
		}
		return classify(answer.StatusCode, after, text)
	case errors.Is(err, context.DeadlineExceeded):
		return blob.Temporary(errors.New("no answer in time"))
	case errors.As(err, &failed) && !isMismatch(err):
		return blob.Temporary(errors.New(r.scrub(err.Error())))
	default:
		return errors.New(r.scrub(err.Error()))
	}
}

// controlTransport carries pings and requests to token services. It bounds what
// is read of the answers, and notes when a server asks for patience.
type controlTransport struct {
	base       http.RoundTripper
	repository *Repository
	after      atomic.Int64 // nanoseconds
}

func (t *controlTransport) retryAfter() time.Duration { return time.Duration(t.after.Load()) }

func (t *controlTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.repository.checkScheme(req.URL); err != nil {
		return nil, err
	}
	resp, err := t.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 400 {
		t.after.Store(int64(retryAfter(resp.Header, time.Now())))
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxControlBody), resp.Body}
	return resp, nil
}
