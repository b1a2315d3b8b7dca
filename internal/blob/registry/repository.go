// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/pkg/sysregistriesv2"

	"github.com/holdfast/holdfast/internal/blob"
)

// MaxManifestSize is the size in bytes of the largest manifest that is read,
// the same as that of go.podman.io/image.
const MaxManifestSize = 4 << 20

// dockerHub is where images named docker.io really are.
const dockerHub = "registry-1.docker.io"

// Repository is one repository at one registry. It may be used by several
// goroutines at once; they share its token and the redirects it was given.
type Repository struct {
	client    *Client
	name      string          // host/path, as references have it
	named     reference.Named // the same
	path      string          // without the host
	namespace string          // for a proxy of several registries
	registry  name.Registry
	insecure  bool
	given     *Credentials // nil: there are none
	host      *host
	meter     *meter
	traffic   traffic

	turn      turn // for those who want to change a grant
	grant     atomic.Pointer[grant]
	pushGrant atomic.Pointer[grant]
	shown     atomic.Pointer[Credentials] // last, to keep them out of errors

	doubted       atomic.Bool // given was refused: look others up first
	authenticated atomic.Bool

	mu        sync.Mutex                 // protects the fields below
	redirects map[digest.Digest]*url.URL // where blobs were found last
}

var _ blob.Source = (*Repository)(nil)

func (c *Client) repository(source sysregistriesv2.PullSource, given *Credentials) (*Repository, error) {
	domain := reference.Domain(source.Reference)
	transport, err := c.transports.get(domain, source.Endpoint.Insecure)
	if err != nil {
		return nil, err
	}
	if domain == "docker.io" {
		domain = dockerHub
	}
	registry, err := name.NewRegistry(domain)
	if source.Endpoint.Insecure {
		registry, err = name.NewRegistry(domain, name.Insecure)
	}
	if err != nil {
		return nil, err
	}
	r := &Repository{
		client:    c,
		name:      source.Reference.Name(),
		named:     reference.TrimNamed(source.Reference),
		path:      reference.Path(source.Reference),
		namespace: source.Endpoint.NamespaceProxy,
		registry:  registry,
		insecure:  source.Endpoint.Insecure,
		host:      c.host(hostKey{domain, source.Endpoint.Insecure}),
		turn:      make(turn, 1),
		redirects: make(map[digest.Digest]*url.URL),
	}
	if given != nil && *given != (Credentials{}) {
		credentials := *given
		r.given = &credentials
	}
	r.meter = &meter{base: transport, userAgent: c.config.UserAgent, counters: [2]*traffic{&c.traffic, &r.traffic}}
	return r, nil
}

// Name returns the host and the path of the repository, as references have them.
func (r *Repository) Name() string { return r.name }

func (r *Repository) String() string { return r.name }

// Authenticated reports whether a request has succeeded that showed somebody's
// credentials. If none has, what was read is public.
func (r *Repository) Authenticated() bool { return r.authenticated.Load() }

// Stats returns what went over the network for this Repository. A ping that
// several share counts where it was made.
func (r *Repository) Stats() Stats { return r.traffic.stats() }

// Manifest reads a manifest or an index by tag or by digest. Its digest is
// verified against the one asked for, or the one that the registry tells, if it
// does; a difference is [blob.ErrCorrupt]. More than MaxManifestSize is an error.
// The other errors are those of [blob.Source].
func (r *Repository) Manifest(ctx context.Context, tagOrDigest string) (blob.Manifest, error) {
	m, err := r.manifest(ctx, tagOrDigest)
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("reading manifest %q of %s: %w", tagOrDigest, r.name, err)
	}
	return m, nil
}

func (r *Repository) manifest(ctx context.Context, ref string) (blob.Manifest, error) {
	want, err := digest.Parse(ref)
	if err != nil {
		want = ""
		if _, err := reference.WithTag(r.named, ref); err != nil {
			return blob.Manifest{}, err
		}
	}
	m, header, err := r.document(ctx, "manifests/"+ref)
	if err != nil {
		return blob.Manifest{}, err
	}
	if want == "" {
		if told, err := digest.Parse(header.Get("Docker-Content-Digest")); err == nil {
			want = told
		}
	}
	if want != "" {
		if got := want.Algorithm().FromBytes(m.Body); got != want {
			return blob.Manifest{}, fmt.Errorf("it has digest %s, not %s: %w", got, want, blob.ErrCorrupt)
		}
		m.Digest = want
	}
	return m, nil
}

// Referrers reads the index of the manifests that refer to the one with the
// given digest: from the referrers API, or where the registry has none from
// the tag that stands in for it. It is [blob.ErrNotFound] if there is neither.
// The digest of the result is computed, not verified.
// See https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-referrers.
func (r *Repository) Referrers(ctx context.Context, d digest.Digest) (blob.Manifest, error) {
	if err := d.Validate(); err != nil {
		return blob.Manifest{}, err
	}
	m, _, err := r.document(ctx, "referrers/"+d.String())
	if errors.Is(err, blob.ErrNotFound) {
		m, err = r.manifest(ctx, referrersTag(d))
	}
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("reading referrers of %s in %s: %w", d, r.name, err)
	}
	return m, nil
}

// document reads a manifest or something of that kind.
func (r *Repository) document(ctx context.Context, resource string) (blob.Manifest, http.Header, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	accept := []string{
		v1.MediaTypeImageManifest,
		v1.MediaTypeImageIndex,
		"application/vnd.docker.distribution.manifest.v2+json",
		"application/vnd.docker.distribution.manifest.list.v2+json",
	}
	resp, err := r.get(ctx, resource, http.Header{"Accept": {strings.Join(accept, ", ")}}) //nolint:bodyclose // stream or statusError closes it
	if err != nil {
		return blob.Manifest{}, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return blob.Manifest{}, nil, r.statusError(resp)
	}
	stream := r.stream(ctx, cancel, resp, unknownLength, "")
	defer stream.Close() //nolint:errcheck // read only; a broken stream shows in Read
	body, err := io.ReadAll(io.LimitReader(stream, MaxManifestSize+1))
	if err != nil {
		return blob.Manifest{}, nil, err
	}
	if len(body) > MaxManifestSize {
		return blob.Manifest{}, nil, fmt.Errorf("it is larger than %d bytes", MaxManifestSize)
	}
	mediaType, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		mediaType = "" // the body may say
	}
	return blob.Manifest{MediaType: mediaType, Digest: digest.FromBytes(body), Body: body}, resp.Header, nil
}

// Blob reads a small blob whole and verifies it: a config, an index. A blob of
// more than limit bytes is an error, one that is not what its digest says is
// [blob.ErrCorrupt]. The other errors are those of [blob.Source].
func (r *Repository) Blob(ctx context.Context, desc blob.Descriptor, limit int64) ([]byte, error) {
	if desc.Size > limit {
		return nil, fmt.Errorf("reading blob %s: its %d bytes are more than %d", desc.Digest, desc.Size, limit)
	}
	rc, err := r.Open(ctx, desc, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	defer rc.Close() //nolint:errcheck // read only; a broken stream shows in Read
	body, err := io.ReadAll(rc)
	if err != nil {
		return nil, err
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("reading blob %q: %w", desc.Digest, err)
	}
	if got := desc.Digest.Algorithm().FromBytes(body); got != desc.Digest {
		return nil, fmt.Errorf("reading blob %s from %s: it has digest %s: %w", desc.Digest, r.name, got, blob.ErrCorrupt)
	}
	return body, nil
}

// resource returns the URL of something in the repository, or, with a slash before it,
// in the registry.
func (r *Repository) resource(scheme, resource string) *url.URL {
	resource, query, _ := strings.Cut(resource, "?")
	u := &url.URL{Scheme: scheme, Host: r.registry.RegistryStr(), Path: path.Join("/v2", r.path, resource), RawQuery: query}
	if strings.HasPrefix(resource, "/") {
		u.Path = path.Join("/v2", resource)
	}
	if strings.HasSuffix(resource, "/") {
		u.Path += "/"
	}
	if r.namespace != "" {
		values := u.Query()
		values.Set("ns", r.namespace)
		u.RawQuery = values.Encode()
	}
	return u
}
