// SPDX-License-Identifier: Apache-2.0

// Package testregistry is an OCI registry for tests, demonstrations and
// benchmarks. It serves blobs from memory or from files, in the manner of a
// registry of one's choice: its token service, its redirects to an object
// store, its rate limit. It misbehaves on request, and it counts.
//
// It is not a registry for anything else: content is added by calls or, if
// Options.Push allows it, pushed; nothing is written to disk, and one account may
// read everything.
package testregistry

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Manner names the registry that is imitated.
type Manner int

// What the manners have in common with what they are named after.
const (
	// Plain asks for no credentials, unless Options.Private is set: then HTTP
	// basic authentication. It sends blobs itself.
	Plain Manner = iota
	// DockerHub has a token service on a host of its own that gives tokens to
	// everybody, useless ones to those who may not read. Blobs are redirected to
	// signed URLs. GET requests of manifests are counted towards a limit.
	DockerHub
	// Quay has its token service under /v2/auth and refuses strangers there.
	// Blobs are redirected to signed URLs that answer 403 once they have expired.
	Quay
	// GHCR wants a token even for public content and does not tell its lifetime.
	// Blobs are redirected.
	GHCR
	// ECR has HTTP basic authentication for the user "AWS", whose password
	// expires and is then answered with 403. Blobs are redirected to S3.
	ECR
)

// Push is who may push.
type Push int

const (
	// PushNever answers every push with status 405: the registry is read-only.
	PushNever Push = iota
	// PushDenied lets the account read, and denies pushes: with status 403, or by
	// tokens that are good for reading only.
	PushDenied
	// PushAllowed lets the account push. Where it takes no credentials, and no
	// tokens, to read, strangers may push too.
	PushAllowed
)

// Options configures a [Server]. The zero value is a plain, public registry
// over HTTP.
type Options struct {
	Manner Manner
	// Address is where the registry listens, host:port; "" is a free port of
	// 127.0.0.1. With the one of a server that was closed, the registry is back.
	Address string
	// TLS serves over HTTPS, and so HTTP/2, with a certificate for 127.0.0.1,
	// ::1 and localhost that Server.CA verifies.
	TLS bool
	// Private refuses those without credentials. ECR is always private.
	Private bool
	// Username and Password are the one account; the defaults are "user" ("AWS"
	// for ECR) and "secret". See also [Server.SetPassword].
	Username, Password string
	// IdentityToken is what the token service accepts as an OAuth2 refresh token.
	IdentityToken string
	// TokenLifetime and SignedLifetime bound what the token service and the
	// redirects hand out; the default is 5 minutes.
	TokenLifetime, SignedLifetime time.Duration
	// ManifestLimit is how many manifests DockerHub hands out before it answers
	// 429 with RetryAfter (in whole seconds); 0 means no limit.
	ManifestLimit int64
	RetryAfter    time.Duration
	// Push is who may push; by default nobody.
	Push Push
	// NoReferrers is a registry that knows nothing of referrers: it answers 404 to
	// who asks for them, and does not say that it noted the subject of a manifest.
	NoReferrers bool
	// Fault is asked about every request, counted from 1, on whichever of the
	// server's addresses. It is called by several goroutines.
	Fault func(r *http.Request, n int) Fault
}

// Server is a running registry. Its methods may be called at any time by
// several goroutines.
type Server struct {
	opts   Options
	traits traits
	ca     []byte

	registry, token, storage string // host:port each; token and storage may equal registry

	content  content
	counters counters
	accounts accounts
	uploads  uploads

	servers []*http.Server
	group   errgroup.Group
	ctx     context.Context // ends stalls on Close
	cancel  context.CancelFunc
	close   sync.Once
	err     error
}

// Start starts a registry, whose other addresses are free ports of 127.0.0.1. The
// caller closes it.
// Redirects and the token service of DockerHub name "localhost", which has to
// resolve to that address.
func Start(opts Options) (*Server, error) {
	s := &Server{opts: withDefaults(opts), traits: traitsOf(opts.Manner)}
	s.content.init()
	s.accounts.init(s.opts)
	s.uploads.init()
	s.ctx, s.cancel = context.WithCancel(context.Background())

	var tlsConfig *tls.Config
	if opts.TLS {
		certificate, ca, err := selfSigned(rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("making a certificate: %w", err)
		}
		s.ca = ca
		tlsConfig = &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2", "http/1.1"}}
	}
	var err error
	listen := func(address string, handler http.HandlerFunc) (host string) {
		if err == nil {
			host, err = s.serve(address, tlsConfig, s.observe(handler))
		}
		return host
	}
	s.registry = listen(s.opts.Address, s.serveRegistry)
	s.token, s.storage = s.registry, s.registry
	if s.traits.tokenHost {
		s.token = otherName(listen(freePort, s.serveToken))
	}
	if s.traits.redirect {
		s.storage = otherName(listen(freePort, s.serveStorage))
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

const freePort = "127.0.0.1:0"

func withDefaults(opts Options) Options {
	if opts.Address == "" {
		opts.Address = freePort
	}
	if opts.Username == "" {
		opts.Username = "user"
		if opts.Manner == ECR {
			opts.Username = "AWS"
		}
	}
	if opts.Password == "" {
		opts.Password = "secret"
	}
	if opts.TokenLifetime == 0 {
		opts.TokenLifetime = 5 * time.Minute
	}
	if opts.SignedLifetime == 0 {
		opts.SignedLifetime = 5 * time.Minute
	}
	opts.Private = opts.Private || opts.Manner == ECR
	return opts
}

// serve serves handler until Close, and returns where.
func (s *Server) serve(address string, config *tls.Config, handler http.Handler) (host string, err error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return "", err
	}
	server := &http.Server{
		Handler:           handler,
		TLSConfig:         config.Clone(), // net/http changes it
		ReadHeaderTimeout: time.Minute,
		// Faults and clients that try HTTPS first fill the log with noise.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	s.servers = append(s.servers, server)
	s.group.Go(func() error {
		var err error
		if config != nil {
			err = server.ServeTLS(listener, "", "")
		} else {
			err = server.Serve(listener)
		}
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	})
	return listener.Addr().String(), nil
}

// otherName makes an address look like that of another host: clients that follow
// Go's rules send credentials along to other ports of the same one.
func otherName(address string) string {
	return strings.Replace(address, "127.0.0.1", "localhost", 1)
}

// Close breaks all connections and waits until the server has ended.
func (s *Server) Close() error {
	s.close.Do(func() {
		s.cancel()
		for _, server := range s.servers {
			_ = server.Close() // reports what Serve reports too
		}
		s.err = s.group.Wait()
	})
	return s.err
}

// Host is the address of the registry as references begin with it: host:port.
func (s *Server) Host() string { return s.registry }

// URL is the address of the registry as a URL without a path.
func (s *Server) URL() string { return s.url(s.registry) }

// CA is the PEM certificate that verifies the server's; nil without TLS.
func (s *Server) CA() []byte { return s.ca }

func (s *Server) url(host string) string {
	if s.opts.TLS {
		return "https://" + host
	}
	return "http://" + host
}
