// SPDX-License-Identifier: Apache-2.0

// Package prepare makes an image's layers available before they are downloaded.
//
// One pull, in this package: [Preparer.Prepare] resolves the reference to a
// manifest by digest (resolve.go), decides what can be lazy (plan.go), gets an
// index for each such layer and mounts it (layers.go), and publishes the chain
// of records from which the runtime takes the layers (publish.go). Whatever
// cannot be served ends the chain: the runtime pulls it as it always did.
package prepare

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/credentials"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/refpattern"
	"github.com/holdfast/holdfast/internal/shared"
	"github.com/holdfast/holdfast/internal/sources"
)

// Policy says what is prepared and how.
type Policy struct {
	// Trusted registries are believed to serve bytes that match their digests:
	// their layers are published before they have been verified whole.
	Trusted refpattern.List
	// Include names the images that are prepared; if it is empty, all are.
	Include refpattern.List
	// Exclude names images that are left to the runtime, out of those.
	Exclude refpattern.List
	// TopLayerLimit is the size in compressed bytes up to which an image's top
	// layer is left to the runtime: image volumes need it in the main store.
	TopLayerLimit int64
	// StallTimeout ends a preparation that has made no progress for so long.
	StallTimeout time.Duration
	// IndexTrust is the least that an index must be worth for its layer to be
	// published before it has been verified whole.
	IndexTrust index.Trust
	// Build says that a layer without an index is read whole, verified, and
	// published; otherwise it is left.
	Build bool
	// RuntimeRoots are the main stores of the runtimes.
	RuntimeRoots []string
	// Grace is how long what no runtime refers to is kept; see [Preparer.Run].
	Grace time.Duration
}

// Config is what a Preparer works with.
type Config struct {
	Policy Policy
	// Sources says where images are looked for; Registry is where profiles are
	// published.
	Sources  *sources.Set
	Registry *registry.Client
	Layers   *layer.Set
	Store    *imagestore.Store
	// Pinned reports whether an image with that name is kept though nothing refers to
	// it; nil: none is.
	Pinned func(name string) bool
	// Kept keeps the credentials of pulls for the next process; may be nil.
	Kept *credentials.Kept
	// Indexes finds and keeps indexes of layers that carry none.
	Indexes *indexes.Finder
	// Images is the directory that keeps what has been prepared.
	Images string
	// Profiles says how profiles are recorded and used; zero: not at all.
	Profiles Profiles
	Logger   *slog.Logger
}

// Preparer prepares images. Its methods may be called concurrently.
type Preparer struct {
	policy   Policy
	sources  *sources.Set
	registry *registry.Client
	layers   *layer.Set
	store    *imagestore.Store
	kept     *credentials.Kept
	indexes  *indexes.Finder
	pinned   func(name string) bool
	images   *images
	log      *slog.Logger

	ctx        context.Context // of what goes on behind prepared images
	background errgroup.Group
	preparing  shared.Calls[*Result]      // by reference and credentials
	adding     shared.Calls[*layer.Layer] // by digest
	publishing chan struct{}              // holds one token: publish and remove take turns
	claims     claims
	profiles   Profiles
	recordings recordings
}

// New returns a Preparer. What it does in the background ends with ctx; see
// [Preparer.Wait].
func New(ctx context.Context, c Config) (*Preparer, error) {
	images, err := openImages(c.Images)
	if err != nil {
		return nil, err
	}
	p := &Preparer{
		policy: c.Policy, sources: c.Sources, registry: c.Registry, layers: c.Layers, store: c.Store, kept: c.Kept,
		indexes: c.Indexes, pinned: c.Pinned, images: images, log: c.Logger, ctx: ctx, publishing: make(chan struct{}, 1),
		profiles: c.Profiles,
	}
	return p, nil
}

// Wait returns when all work has ended, also that whose callers have left.
// Prepare must not be called any more.
func (p *Preparer) Wait() {
	p.preparing.Wait()
	p.adding.Wait()
	_ = p.background.Wait()
}

// Action says what becomes of a layer.
type Action string

// The actions.
const (
	// Lazy: the layer is mounted, its content comes when it is read.
	Lazy Action = "lazy"
	// Fetched: the layer is mounted, all of it has been fetched and verified.
	Fetched Action = "fetched"
	// Left: the layer is left to the runtime.
	Left Action = "left to the runtime"
)

// LayerResult is what became of one layer.
type LayerResult struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"` // compressed bytes
	DiffID digest.Digest `json:"diffID"`
	// ChainID is the id of the layer's record in the image store, "" if left.
	ChainID string `json:"chainID,omitempty"`
	Action  Action `json:"action"`
	// Reason says why the action is not lazy, or what the index came from.
	Reason string `json:"reason,omitempty"`
}

// Result is what became of an image.
type Result struct {
	Reference string        `json:"reference"`
	Digest    digest.Digest `json:"digest"` // of the platform's manifest
	Layers    []LayerResult `json:"layers"`
	// Reason says why all of the image is left to the runtime, if it is.
	Reason   string        `json:"reason,omitempty"`
	Duration time.Duration `json:"duration"` // nanoseconds
}

// Lazy counts the layers that the runtime need not download.
func (r *Result) Lazy() int {
	n := 0
	for _, l := range r.Layers {
		if l.Action != Left {
			n++
		}
	}
	return n
}

// Event reports progress with one layer.
type Event struct {
	Layer digest.Digest `json:"layer"`
	// Done of Total bytes have been fetched. Total is 0 if not known.
	Done  int64 `json:"done"`
	Total int64 `json:"total"`
}

// Request asks for an image to be prepared.
type Request struct {
	Reference reference.Named // with tag or digest
	// Credentials for the reference's own registry; nil if none were given.
	Credentials *registry.Credentials
	// Offline leaves out registries: what attached layouts do not have is missing.
	Offline bool
	// FromRegistry means that the runtime has the manifest from a registry, not from an
	// attached layout: what a tag names there counts.
	FromRegistry bool
	// Progress is called, one call at a time, while layers are fetched; may be nil.
	// Who joins a preparation that is under way gets no events.
	Progress func(Event)
}

// Prepare prepares an image and returns when its layers are published. Callers
// that ask for the same image at the same time, with the same credentials,
// share the work. An error leaves nothing published that was not before.
func (p *Preparer) Prepare(ctx context.Context, req Request) (*Result, error) {
	start := time.Now()
	ref := reference.TagNameOnly(req.Reference)
	if p.policy.Exclude.Match(ref) || len(p.policy.Include) > 0 && !p.policy.Include.Match(ref) {
		return &Result{Reference: ref.String(), Reason: "excluded by the configuration"}, nil
	}
	progress, stop := untilStopped(req.Progress)
	defer stop() // others may go on with what this caller began
	req.Progress = progress
	key := fmt.Sprintf("%s %v %t %t", ref, credentialsKey(req.Credentials), req.Offline, req.FromRegistry)
	res, err := p.preparing.Do(ctx, key, func(ctx context.Context) (*Result, error) {
		w := newWatchdog(ctx, p.policy.StallTimeout)
		defer w.stop()
		return p.prepare(w.ctx, ref, req, w)
	})
	if err != nil {
		return nil, fmt.Errorf("preparing %s: %w", ref, err)
	}
	done := *res
	done.Duration = time.Since(start)
	return &done, nil
}

func (p *Preparer) prepare(ctx context.Context, ref reference.Named, req Request, w *watchdog) (*Result, error) {
	if res, ok := p.prepared(ctx, ref, req); ok {
		return res, nil
	}
	img, err := p.resolve(ctx, ref, req)
	if err != nil {
		return nil, err
	}
	release, err := p.claim(ctx, img)
	if err != nil {
		return nil, err
	}
	defer release()
	w.progress()
	img.profile = p.findProfile(img)
	res := &Result{Reference: ref.String(), Digest: img.Manifest.Digest}
	plans := p.plan(img)
	p.log.Debug("resolved image", "image", ref.String(), "digest", img.Manifest.Digest.String(), "layers", len(plans))
	if img.Config.NoCommand() {
		res.Reason = "the image has no entrypoint and no command, it is probably mounted as a volume"
		leaveAll(plans, res.Reason)
	}
	early := make(chan struct{})
	go func() {
		defer close(early)
		p.publishEarly(ctx, img, plans)
	}()
	p.prepareLayers(ctx, img, plans, w.watch(req.Progress))
	<-early
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	cutChain(plans)
	for _, l := range plans {
		res.Layers = append(res.Layers, l.LayerResult)
	}
	if res.Lazy() == 0 {
		return res, nil
	}
	p.record(img.Manifest.Digest, plans)
	p.background.Go(func() error {
		p.readAhead(img, plans)
		return nil
	})
	p.publishIndexes(img, plans)
	p.keep(res.Reference, req.Credentials)
	if err := p.publish(ctx, img, res); err != nil {
		return nil, err
	}
	return res, nil
}

// keep keeps the credentials of a pull: its layers are read long after it.
func (p *Preparer) keep(name string, creds *registry.Credentials) {
	if creds == nil {
		return
	}
	if err := p.kept.Put(name, *creds); err != nil {
		p.log.Warn("keeping credentials", "image", name, "err", err)
	}
}

// forget forgets the credentials for images that are not prepared any more.
func (p *Preparer) forget(references ...string) {
	if err := p.kept.Forget(references...); err != nil {
		p.log.Warn("forgetting credentials", "err", err)
	}
}

// prepared answers for an image that has been prepared under the digest that the
// reference names, without a network. A tag may have moved.
func (p *Preparer) prepared(ctx context.Context, ref reference.Named, req Request) (*Result, bool) {
	byDigest, ok := ref.(reference.Digested)
	if !ok {
		return nil, false
	}
	done, err := p.takeTurn(ctx)
	if err != nil {
		return nil, false
	}
	defer done()
	img, err := p.Find(byDigest.Digest().String())
	if err != nil {
		return nil, false
	}
	origins, err := p.sources.Origins(ref, req.Credentials, req.Offline)
	if err != nil {
		return nil, false
	}
	for i, l := range img.Layers {
		if l.Action == Left && i == len(img.Layers)-1 && l.Size <= p.policy.TopLayerLimit {
			continue
		}
		if l.Action == Left {
			return nil, false // the reason may be gone
		}
		have, ok := p.layers.Get(l.Digest)
		if !ok || have.Verdict().Err() != nil {
			return nil, false
		}
		have.Device().AddSources(sources.Sources(origins))
	}
	if err := p.images.touch(img); err != nil {
		return nil, false // it may be collected before the runtime has it
	}
	for _, name := range img.References {
		if named, err := reference.ParseNormalizedNamed(name); err == nil && named.Name() == ref.Name() {
			p.keep(name, req.Credentials)
		}
	}
	return &Result{Reference: ref.String(), Digest: img.Digest, Layers: img.Layers}, true
}

// cutChain leaves all layers above one that is left: a record needs its parent's.
func cutChain(plans []*plan) {
	cut := false
	for _, l := range plans {
		switch {
		case l.Action == Left:
			cut = true
		case cut:
			l.leave("a layer below is left to the runtime")
		}
	}
}

// credentialsKey tells callers with different credentials apart, without
// keeping the credentials.
func credentialsKey(c *registry.Credentials) digest.Digest {
	if c == nil {
		return ""
	}
	return digest.FromString(c.Username + "\x00" + c.Password + "\x00" + c.IdentityToken)
}
