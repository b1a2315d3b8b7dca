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
	expires time.Time   // zero if that is not known
	of      Credentials // whose it is
}

func (g *grant) usable() bool {
	return g != nil && (g.expires.IsZero() || time.Now().Before(g.expires))
}

// authorize returns the grant of the repository and gets one if there is none
// that this attempt may show. The error says what is missing if all credentials
// there are have been refused.
func (r *Repository) authorize(ctx context.Context, a *attempt) (*grant, error) {
	kept := r.kept(a)
	if g := kept.Load(); g.usable() && a.mayShow(g) {
		return g, nil
	}
	if err := r.turn.take(ctx); err != nil {
		return nil, err
	}
	defer r.turn.release()
	if g := kept.Load(); g.usable() && a.mayShow(g) {
		return g, nil // somebody else got it meanwhile
	}
	g, err := r.negotiate(ctx, a)
	if err != nil {
		return nil, fmt.Errorf("authenticating to %s: %w", r.registry, err)
	}
	if g == nil {
		return nil, r.missing(a)
	}
	kept.Store(g)
	return g, nil
}

// kept is where the grant for such an attempt is kept. Those for reading never
// ask for the right to push: some token services give nothing to whoever asks
// for too much.
func (r *Repository) kept(a *attempt) *atomic.Pointer[grant] {
	if a.push {
		return &r.pushGrant
	}
	return &r.grant
}

// negotiate does what the challenge asks for, with one credential after the
// other until one is good for a grant. It returns nil if none is.
func (r *Repository) negotiate(ctx context.Context, a *attempt) (*grant, error) {
	control := &controlTransport{base: r.meter, repository: r}
	challenge := a.challenge
	if challenge == nil {
		timed, cancel := context.WithTimeout(ctx, r.client.config.StallTimeout)
		defer cancel()
		var err error
		if challenge, err = r.host.ping(timed, r.registry, control); err != nil {
			return nil, r.authError(ctx, err, control.retryAfter())
		}
	}
	if challenge.Scheme == "" && a.last == nil {
		return newGrant(challenge), nil
	}
	a.asked = challenge.Scheme != ""
	for a.asked {
		c, ok, err := r.next(ctx, a)
		if err != nil || !ok {
			return nil, err
		}
		r.shown.Store(&c)
		g, err := r.show(ctx, control, challenge, c, a.push)
		switch {
		case errors.Is(err, blob.ErrUnauthorized):
			r.refuse(a, c)
			a.refusal = fmt.Errorf("authenticating to %s: %w", r.registry, err)
		case err != nil:
			return nil, err
		case a.last != nil && g.header == a.last.header, g.header == "" && len(a.refused) > 0:
			r.refuse(a, c) // it would be the same again, or less
		default:
			return g, nil
		}
	}
	return nil, nil
}

func newGrant(challenge *transport.Challenge) *grant {
	if challenge.Insecure {
		return &grant{scheme: "http"}
	}
	return &grant{scheme: "https"}
}

// show makes a grant out of credentials.
func (r *Repository) show(ctx context.Context, t *controlTransport, challenge *transport.Challenge, c Credentials, push bool) (*grant, error) {
	g := newGrant(challenge)
	g.of = c
	switch strings.ToLower(challenge.Scheme) {
	case "basic":
		if c.Username != "" {
			g.header = "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password))
		}
		return g, nil
	case "bearer":
		timed, cancel := context.WithTimeout(ctx, r.client.config.StallTimeout)
		defer cancel()
		if err := r.exchange(timed, t, challenge, g, push); err != nil {
			return nil, r.authError(ctx, err, t.retryAfter())
		}
		return g, nil
	default:
		return nil, fmt.Errorf("the registry wants %q, which is not supported", shorten(challenge.Scheme))
	}
}

// exchange gets a token from the service that the challenge names.
func (r *Repository) exchange(ctx context.Context, t http.RoundTripper, challenge *transport.Challenge, g *grant, push bool) error {
	scopes := []string{"repository:" + r.path + ":pull"}
	if push {
		scopes[0] += ",push"
	}
	if scope := challenge.Parameters["scope"]; scope != "" && !slices.Contains(scopes, scope) {
		// Some token services look at the first scope only.
		scopes = []string{scope, scopes[0]}
		if push && !strings.Contains(scope, "push") {
			slices.Reverse(scopes) // it is what a read in between was told
		}
	}
	began := time.Now()
	token, err := transport.Exchange(ctx, r.realmRegistry(challenge), g.of.authenticator(), t, scopes, challenge)
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

// authError tells what an error of a ping or of the token service means. The
// library's errors are not kept: they quote URLs and answers.
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
		switch c := r.shown.Load(); {
		case answer.StatusCode == http.StatusNotFound:
			return errors.New(text) // the service is not there, which says nothing about blobs
		case answer.StatusCode == http.StatusBadRequest && c != nil && c.IdentityToken != "":
			// So are refresh tokens refused: RFC 6749, section 5.2.
			return fmt.Errorf("%s: %w", text, blob.ErrUnauthorized)
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
