// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/holdfast/holdfast/internal/blob"
)

// maxRefused bounds how many credentials a registry gets to see for one request.
const maxRefused = 8

// attempt is what one request has been through: which credentials were shown for
// it, and what the registry said.
type attempt struct {
	push      bool                 // it takes the right to push
	last      *grant               // refused by the registry
	challenge *transport.Challenge // what it said then, if anything
	doubtful  []Credentials        // one token of theirs was refused; it may have expired
	refused   []Credentials        // not to be shown again
	refusal   error                // the last one
	lookup    error                // why none could be looked up
	asked     bool                 // the registry knows of credentials at all
}

// mayShow reports whether a grant has not been refused, nor what it comes from.
func (a *attempt) mayShow(g *grant) bool { return g != a.last && !slices.Contains(a.refused, g.of) }

// refuseGrant notes an answer that refuses a grant, and closes it. A refused
// token says something about its credentials only if a new one is refused too,
// or with status 403.
func (r *Repository) refuseGrant(ctx context.Context, a *attempt, g *grant, resp *http.Response) {
	if c := r.challengeOf(ctx, resp); c != nil {
		a.challenge = c
	}
	a.refusal = r.statusError(resp)
	a.last = g
	switch {
	case strings.HasPrefix(g.header, "Basic "), resp.StatusCode == http.StatusForbidden, slices.Contains(a.doubtful, g.of):
		r.refuse(a, g.of)
	default:
		a.doubtful = append(a.doubtful, g.of)
	}
}

// refuse notes that credentials are good for nothing, here. That they may not
// push says nothing about reading.
func (r *Repository) refuse(a *attempt, c Credentials) {
	a.refused = append(a.refused, c)
	if !a.push && r.given != nil && c == *r.given {
		r.doubted.Store(true)
	}
}

// accept notes that the registry took a grant for reading.
func (r *Repository) accept(a *attempt, g *grant, status int) {
	if a.push || g.header == "" || g.of == (Credentials{}) || !isSuccess(status) {
		return
	}
	r.authenticated.Store(true)
	if r.given != nil && g.of == *r.given {
		r.doubted.Store(false)
	}
}

// next returns what to show next: the credentials that were given, what is
// looked up, and at last none, since what is public may be read by strangers. If
// all of it has been refused, it returns false.
func (r *Repository) next(ctx context.Context, a *attempt) (Credentials, bool, error) {
	if len(a.refused) >= maxRefused {
		return Credentials{}, false, nil
	}
	untried := func(c Credentials) bool { return !slices.Contains(a.refused, c) }
	given := r.given != nil && untried(*r.given)
	if given && !r.doubted.Load() {
		return *r.given, true, nil
	}
	if lookup := r.client.config.Credentials; lookup != nil {
		var c Credentials
		c, a.lookup = lookup(ctx, r.name, slices.Clone(a.refused))
		if ctx.Err() != nil {
			return Credentials{}, false, ctx.Err()
		}
		if a.lookup == nil && c != (Credentials{}) && untried(c) {
			return c, true, nil
		}
	}
	if given {
		return *r.given, true, nil
	}
	return Credentials{}, untried(Credentials{}), nil
}

// missing explains, in one line, a refusal after which nothing is left to show:
// what was tried, where more was looked for, and what to do.
func (r *Repository) missing(a *attempt) error {
	if !a.asked {
		return a.refusal
	}
	if a.push {
		return fmt.Errorf("%w: no credentials are known that may push to %s", a.refusal, r.name)
	}
	pull := "no credentials of a pull are known"
	if r.given != nil {
		pull = "the credentials of the pull were refused (they may have expired)"
	}
	node := "the node has none"
	if slices.ContainsFunc(a.refused, func(c Credentials) bool {
		return c != (Credentials{}) && (r.given == nil || c != *r.given)
	}) {
		node = "those of the node were refused"
	}
	if places := r.places(); len(places) > 0 {
		node += " (looked in " + strings.Join(places, ", ") + ")"
	}
	if a.lookup != nil {
		node += fmt.Sprintf(" (looking them up: %s)", r.scrub(a.lookup.Error()))
	}
	host, _, _ := strings.Cut(r.name, "/")
	advice := fmt.Sprintf("run `podman login %s` as root, or see the settings auth_files and credential_provider_config", host)
	err := fmt.Errorf("%w: %s for %s, and %s: %s", a.refusal, pull, r.name, node, advice)
	if blob.IsTemporary(a.lookup) {
		return blob.Temporary(err) // a provider of credentials may answer the next time
	}
	return err
}

func (r *Repository) places() []string {
	if r.client.config.Places == nil {
		return nil
	}
	return r.client.config.Places(r.name)
}
