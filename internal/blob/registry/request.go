// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strings"
)

const maxRedirects = 5

// request is what a registry is asked.
type request struct {
	method   string
	resource string   // of the repository
	url      *url.URL // instead of resource: where the registry said to go on
	header   http.Header
	push     bool                    // it takes the right to push
	body     func() (*upload, error) // opens what goes along, each time that it is sent; may be nil
}

// get asks the registry for something in the repository, as send does.
func (r *Repository) get(ctx context.Context, resource string, header http.Header) (*http.Response, error) {
	return r.send(ctx, request{method: http.MethodGet, resource: resource, header: header})
}

// send asks the registry. If it refuses, send authenticates anew and asks again,
// as long as there are credentials to try. The answer may have any other status;
// the caller closes it. ctx governs the body too.
func (r *Repository) send(ctx context.Context, req request) (*http.Response, error) {
	a := attempt{push: req.push}
	for {
		g, err := r.authorize(ctx, &a)
		if err != nil {
			return nil, err
		}
		u := req.url
		if u == nil {
			u = r.resource(g.scheme, req.resource)
		}
		resp, err := r.follow(ctx, g, u, req)
		if err != nil {
			return nil, err
		}
		if !r.refuses(resp) {
			r.accept(&a, g, resp.StatusCode)
			return resp, nil
		}
		r.refuseGrant(ctx, &a, g, resp)
	}
}

// refuses reports whether the registry wants other credentials.
func (r *Repository) refuses(resp *http.Response) bool {
	return r.isRegistry(resp.Request.URL) &&
		(resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden)
}

// follow sends a request and follows redirects. Only the registry itself gets
// to see the grant, which may be nil if the URL is not the registry's.
// http.Client is not used because it would send it to subdomains and other
// ports as well, and puts whole URLs into its errors.
func (r *Repository) follow(ctx context.Context, g *grant, u *url.URL, req request) (*http.Response, error) {
	for range maxRedirects + 1 {
		if err := r.checkScheme(u); err != nil {
			return nil, err
		}
		out := (&http.Request{Method: req.method, URL: u, Host: u.Host, Header: make(http.Header)}).WithContext(ctx)
		maps.Copy(out.Header, req.header)
		if g != nil && g.header != "" && r.isRegistry(u) && u.Scheme == g.scheme {
			out.Header.Set("Authorization", g.header)
		}
		resp, err := r.roundTrip(ctx, out, req.body)
		if err != nil {
			return nil, err
		}
		if !isRedirect(req.method, resp.StatusCode) {
			return resp, nil
		}
		next, err := resp.Location()
		drain(resp)
		if err != nil {
			return nil, errors.New("the redirect has no usable location")
		}
		u = next
	}
	return nil, fmt.Errorf("more than %d redirects", maxRedirects)
}

// isRedirect reports whether the same is to be asked elsewhere. After most
// redirects of what changes something, a GET would have to follow.
func isRedirect(method string, status int) bool {
	switch status {
	case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther:
		return method == http.MethodGet || method == http.MethodHead
	default:
		return false
	}
}

// checkScheme refuses what is neither HTTPS nor, where it is allowed, HTTP. The
// library would fall back to HTTP for private addresses without being told to.
func (r *Repository) checkScheme(u *url.URL) error {
	switch {
	case u.Scheme == "https":
		return nil
	case u.Scheme != "http":
		return fmt.Errorf("%q is not a scheme for a registry", u.Scheme)
	case !r.insecure && r.isRegistry(u):
		return errors.New("HTTP is not allowed for this registry (see insecure in registries.conf)")
	default:
		return nil
	}
}

// isRegistry reports whether a URL points to the registry, and not to where it
// redirects.
func (r *Repository) isRegistry(u *url.URL) bool {
	return strings.EqualFold(withPort(u.Host, u.Scheme), withPort(r.registry.RegistryStr(), u.Scheme))
}

func withPort(host, scheme string) string {
	if _, _, err := net.SplitHostPort(host); err == nil {
		return host
	}
	port := "443"
	if scheme == "http" {
		port = "80"
	}
	return net.JoinHostPort(strings.Trim(host, "[]"), port)
}
