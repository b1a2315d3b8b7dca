// SPDX-License-Identifier: Apache-2.0

// Package pins keeps images and artifacts on the node ahead of need: whole, in an OCI
// layout, which is the first of the node's sources and may be on a disk of its own.
// So they need no network, are not evicted, and start at once: images are also kept
// prepared.
//
// What is pinned are names; what a name means is looked up again from time to time,
// and a new image is fetched whole before its name moves to it. The one before stays
// as long as it is prepared, since containers may still read it.
package pins

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/refpattern"
	"github.com/holdfast/holdfast/internal/sources"
)

// Errors of requests.
var (
	ErrUnknown    = errors.New("not pinned")
	ErrConfigured = errors.New("pinned by the configuration: take it out of the setting pinned")
)

// Config is what a Pinner works with.
type Config struct {
	// Dir is the layout. It is made if Create is set; otherwise it has to be there: the
	// disk that it is on might not be mounted.
	Dir    string
	Create bool
	// State is the file that keeps the names that were pinned by request.
	State string
	// Configured are the names that the configuration pins.
	Configured []string
	// Interval is how often it is looked whether a tag has moved.
	Interval time.Duration
	Sources  *sources.Set
	// Registries are those that are trusted; see [sources.Set.Believes].
	Registries refpattern.List
	// Prepare prepares an image that has been fetched, and IsPrepared tells whether the
	// one with this manifest is.
	Prepare    func(ctx context.Context, ref reference.Named) error
	IsPrepared func(manifest digest.Digest) bool
	// Yield lets go first what is more urgent.
	Yield  func(ctx context.Context) error
	Logger *slog.Logger
}

// States of a pin.
const (
	Waiting  = "waiting"
	Fetching = "fetching"
	Pinned   = "pinned" // it is here
	Failed   = "failed" // and tried again
)

// Pin is a name that is pinned.
type Pin struct {
	Name  string `json:"name"`
	State string `json:"state"`
	// Configured means that the configuration pins it.
	Configured bool          `json:"configured,omitempty"`
	Digest     digest.Digest `json:"digest,omitempty"` // of the manifest that is here
	From       string        `json:"from,omitempty"`   // the source that it was fetched from
	Done       int64         `json:"done,omitempty"`   // bytes fetched of Total
	Total      int64         `json:"total,omitempty"`
	Checked    time.Time     `json:"checked,omitzero"` // when its name was last looked up
	Error      string        `json:"error,omitempty"`  // why the last try failed
}

// Pinner keeps what is pinned. Its methods may be called concurrently.
type Pinner struct {
	config Config
	wake   chan struct{}

	mu   sync.Mutex // protects the fields below
	pins map[string]*Pin
}

// maxState is how many bytes the file of names may have.
const maxState = 4 << 20

// New returns a Pinner for the names of the configuration and those that were pinned
// before.
func New(c Config) (*Pinner, error) {
	p := &Pinner{config: c, wake: make(chan struct{}, 1), pins: map[string]*Pin{}}
	var names []string
	err := atomicfile.ReadJSON(c.State, maxState, &names)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading what is pinned: %w", err)
	}
	for _, n := range names {
		p.pins[n] = &Pin{Name: n, State: Waiting}
	}
	for _, n := range c.Configured {
		ref, err := Parse(n)
		if err != nil {
			return nil, err
		}
		p.pins[ref.String()] = &Pin{Name: ref.String(), State: Waiting, Configured: true}
	}
	return p, nil
}

// Parse reads the name of an image or an artifact to pin: one with a registry, as for
// any other node.
func Parse(name string) (reference.Named, error) {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("name %q: %w", name, err)
	}
	return reference.TagNameOnly(ref), nil
}

// update changes a pin, if it is still one.
func (p *Pinner) update(name string, change func(*Pin)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pin := p.pins[name]; pin != nil {
		change(pin)
	}
}

// All returns what is pinned, by name.
func (p *Pinner) All() []Pin {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]Pin, 0, len(p.pins))
	for _, pin := range p.pins {
		all = append(all, *pin)
	}
	slices.SortFunc(all, func(a, b Pin) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// Has reports whether a name is pinned.
func (p *Pinner) Has(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pins[name] != nil
}

// Pin pins names, and has them looked up and fetched now. Those that are pinned
// already are looked up again.
func (p *Pinner) Pin(names ...string) error {
	refs, err := parseAll(names)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range refs {
		if pin := p.pins[n]; pin == nil {
			p.pins[n] = &Pin{Name: n, State: Waiting}
		} else if pin.State != Fetching {
			pin.State, pin.Error = Waiting, ""
		}
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return p.save()
}

// Unpin lets names go: [ErrUnknown] or [ErrConfigured] if one cannot, and then none.
func (p *Pinner) Unpin(names ...string) error {
	refs, err := parseAll(names)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range refs {
		switch pin := p.pins[n]; {
		case pin == nil:
			return fmt.Errorf("%s is %w", n, ErrUnknown)
		case pin.Configured:
			return fmt.Errorf("%s is %w", n, ErrConfigured)
		}
	}
	for _, n := range refs {
		delete(p.pins, n)
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return p.save()
}

func parseAll(names []string) ([]string, error) {
	refs := make([]string, len(names))
	for i, n := range names {
		ref, err := Parse(n)
		if err != nil {
			return nil, err
		}
		refs[i] = ref.String()
	}
	return refs, nil
}

// save writes the names that were pinned by request. The caller holds p.mu.
func (p *Pinner) save() error {
	names := []string{}
	for n, pin := range p.pins {
		if !pin.Configured {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	if err := atomicfile.WriteJSON(p.config.State, names, 0o600); err != nil {
		return fmt.Errorf("noting what is pinned: %w", err)
	}
	return nil
}

// open opens the layout for writing.
func (p *Pinner) open() (*ocidir.Writer, error) {
	if !p.config.Create {
		if _, err := os.Stat(p.config.Dir); err != nil {
			return nil, fmt.Errorf("the directory for pinned images has to be there already: %w", err)
		}
	} else if err := os.MkdirAll(p.config.Dir, 0o700); err != nil {
		return nil, err
	}
	return ocidir.Create(p.config.Dir)
}

// nameOf is the name that an entry of the layout was fetched under.
func nameOf(d v1.Descriptor) string { return d.Annotations[v1.AnnotationRefName] }
