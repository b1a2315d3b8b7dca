// SPDX-License-Identifier: Apache-2.0

// Package registry reads manifests and ranges of blobs from OCI registries, and
// pushes blobs and manifests.
//
// A [Client] serves the whole process. It turns an image reference into the
// endpoints that registries.conf names for it, mirrors first, and each of these
// is a [Repository]: a [blob.Source] that authenticates itself, follows
// redirects to object stores and remembers them.
//
// What it does not do: it tries every request once (package retry is for
// patience), asks no other endpoint, and does not verify ranges of blobs.
//
// Invariants: credentials go to the endpoint they are for and to the token
// service it names, never along with a redirect. No error and no log line holds
// a credential or the query of a URL. What a server sends is read within limits.
package registry

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"go.podman.io/image/v5/types"
)

// Config configures a [Client]. The zero value is what the system's own
// container tools use, anonymously.
type Config struct {
	// RegistriesConf and RegistriesConfDir replace the system's registries.conf
	// and registries.conf.d.
	RegistriesConf, RegistriesConfDir string
	// CertsDir lists the directories that hold CA and client certificates in a
	// directory per host; the first that knows the host is used. The default is
	// /etc/containers/certs.d and /etc/docker/certs.d.
	CertsDir []string
	// Credentials finds the next credentials to try for a repository
	// ("host/path") when none were given for it, or when those were refused; nil
	// means that there are none. What the registry has refused is passed, so that
	// others are found, or the same place is asked anew. The zero value says that
	// there are no more. An error does not keep strangers from what is public. It
	// may be called concurrently.
	Credentials func(ctx context.Context, repository string, refused []Credentials) (Credentials, error)
	// Places says where Credentials looks, for errors about missing ones; it may
	// be nil. An empty result means that nothing is configured.
	Places func(repository string) []string
	// UserAgent is what the client calls itself.
	UserAgent string
	// StallTimeout is how long a server may send nothing, before the headers of
	// an answer or within its body, until the request fails with a temporary
	// error. The default is 30 seconds.
	StallTimeout time.Duration
	// Logger gets the decisions a user may wonder about, at debug level.
	// The default discards them.
	Logger *slog.Logger
}

// Client reads from registries. It may be used by several goroutines at once,
// and should be shared: it keeps connections.
type Client struct {
	config     Config
	transports transports
	traffic    traffic

	mu    sync.Mutex // protects the fields below
	hosts map[hostKey]*host
}

// New returns a client. Close releases what it keeps.
func New(config Config) *Client {
	if config.CertsDir == nil {
		config.CertsDir = []string{"/etc/containers/certs.d", "/etc/docker/certs.d"}
	}
	if config.UserAgent == "" {
		config.UserAgent = "holdfast"
	}
	if config.StallTimeout <= 0 {
		config.StallTimeout = 30 * time.Second
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	return &Client{
		config:     config,
		transports: transports{certsDirs: config.CertsDir, headerTimeout: config.StallTimeout},
		hosts:      make(map[hostKey]*host),
	}
}

// Close closes idle connections. Readers that are open stay usable.
func (c *Client) Close() { c.transports.closeIdle() }

// Stats returns what went over the network since the client was made.
func (c *Client) Stats() Stats { return c.traffic.stats() }

// Endpoints returns the repositories an image may be read from, in the order in
// which to try them: the mirrors that registries.conf names for the reference,
// then its primary location. The file is read anew by every call. There is no
// request before the first read.
//
// Credentials are used for endpoints on the host that ref names. The others,
// or all if creds is nil, use Config.Credentials, and so do those whose registry
// refuses creds.
func (c *Client) Endpoints(ref reference.Named, creds *Credentials) ([]*Repository, error) {
	sources, err := c.pullSources(ref)
	if err != nil {
		return nil, fmt.Errorf("finding registries for %s: %w", ref.Name(), err)
	}
	list := make([]*Repository, 0, len(sources))
	for _, source := range sources {
		var own *Credentials
		if reference.Domain(source.Reference) == reference.Domain(ref) {
			own = creds
		}
		repository, err := c.repository(source, own)
		if err != nil {
			return nil, fmt.Errorf("setting up access to %s: %w", source.Reference.Name(), err)
		}
		list = append(list, repository)
	}
	return list, nil
}

func (c *Client) pullSources(ref reference.Named) ([]sysregistriesv2.PullSource, error) {
	system := &types.SystemContext{
		SystemRegistriesConfPath:    c.config.RegistriesConf,
		SystemRegistriesConfDirPath: c.config.RegistriesConfDir,
	}
	// The library keeps what it parsed for the life of the process.
	if _, err := sysregistriesv2.TryUpdatingCache(system); err != nil {
		return nil, fmt.Errorf("reading registries.conf: %w", err)
	}
	registry, err := sysregistriesv2.FindRegistry(system, ref.Name())
	if err != nil {
		return nil, fmt.Errorf("reading registries.conf: %w", err)
	}
	if registry == nil {
		return []sysregistriesv2.PullSource{{Reference: ref}}, nil
	}
	if registry.Blocked {
		return nil, fmt.Errorf("registry %s is blocked in %s", registry.Prefix, sysregistriesv2.ConfigurationSourceDescription(system))
	}
	return registry.PullSourcesFromReference(ref)
}
