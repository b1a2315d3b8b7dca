// SPDX-License-Identifier: Apache-2.0

// Package sources says where images are looked for, in the order of the
// configuration: attached OCI layouts, other registries, the image's own one with
// its mirrors. Manifests, blobs, indexes and profiles alike come from the first
// that has them.
//
// A layout that hangs or is not there holds nobody up for long: it is asked last
// for a while. What is attached can also be served to the runtimes of the node: see
// [Set.Manifest].
package sources

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/refpattern"
)

const (
	// patience is how long a layout may take to answer for a manifest.
	patience = 3 * time.Second
	// rest is how long one that did not is asked last.
	rest = 30 * time.Second
)

// ErrOffline means that there is no attached source to ask, and registries may not
// be asked.
var ErrOffline = errors.New("no OCI layout is among the sources, and registries are not asked when offline")

// Config is what a Set works with.
type Config struct {
	Places []Place
	// Trusted are those of Places whose images are believed before they have been
	// verified whole.
	Trusted []Place
	// Pins is where pinned images are, "" if there are none: the first source.
	Pins string
	// Offline leaves out all registries.
	Offline  bool
	Registry *registry.Client
	// Loopback is HOST:PORT where the layouts are served to runtimes; "" if they are
	// not. It is no source itself.
	Loopback string
}

// Set is the sources of a node. Its methods may be called concurrently.
type Set struct {
	config  Config
	layouts map[Place]*ocidir.Layout
	pins    *ocidir.Layout // nil if there is none

	mu   sync.Mutex // protects the fields below
	rest map[Place]time.Time
}

// New returns the sources; none of them is asked yet.
func New(c Config) *Set {
	if c.Pins != "" {
		c.Places = append([]Place{Place(c.Pins)}, c.Places...)
	}
	s := &Set{config: c, layouts: map[Place]*ocidir.Layout{}, rest: map[Place]time.Time{}}
	for _, p := range c.Places {
		if path, ok := p.Path(); ok {
			s.layouts[p] = ocidir.New(path)
		}
	}
	s.pins = s.layouts[Place(c.Pins)]
	return s
}

// Origin is a place that an image may be read from.
type Origin struct {
	Place Place
	// Layout or Repository is set.
	Layout     *ocidir.Layout
	Repository *registry.Repository
	// Trusted means that the configuration trusts all of the layout's images.
	Trusted bool
	pins    bool
}

// Reader reads manifests, small blobs, and what refers to an image.
type Reader interface {
	image.Reader
	blob.Source
	Referrers(ctx context.Context, d digest.Digest) (blob.Manifest, error)
}

// Reader is what the origin is read with.
func (o Origin) Reader() Reader {
	if o.Layout != nil {
		return o.Layout
	}
	return o.Repository
}

func (o Origin) String() string { return o.Reader().String() }

// Origins returns the places where an image may be, in the order in which to ask
// them, but those that did not answer lately last. It asks none of them.
// Credentials are for the registry that ref names; see [registry.Client.Endpoints].
func (s *Set) Origins(ref reference.Named, creds *registry.Credentials, offline bool) ([]Origin, error) {
	offline = offline || s.config.Offline
	var list, last []Origin
	for _, p := range s.config.Places {
		if l := s.layouts[p]; l != nil {
			if l == s.pins && !pinned(s.config.Pins) {
				continue
			}
			o := Origin{Place: p, Layout: l, Trusted: slices.Contains(s.config.Trusted, p), pins: l == s.pins}
			if s.resting(p) {
				last = append(last, o)
			} else {
				list = append(list, o)
			}
			continue
		}
		if offline {
			continue
		}
		all, err := s.repositories(p, ref, creds)
		if err != nil {
			return nil, fmt.Errorf("finding registries: %w", err)
		}
		for _, r := range all {
			list = append(list, Origin{Place: p, Repository: r})
		}
	}
	list = append(list, last...)
	if len(list) == 0 {
		return nil, ErrOffline
	}
	return list, nil
}

// pinned reports whether anything was ever pinned: a source that is not there would be
// asked for every chunk.
func pinned(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, v1.ImageIndexFile))
	return err == nil
}

func (s *Set) repositories(p Place, ref reference.Named, creds *registry.Credentials) ([]*registry.Repository, error) {
	if p != Registry {
		there, err := p.in(ref)
		if err != nil {
			return nil, err
		}
		ref, creds = there, nil
	}
	all, err := s.config.Registry.Endpoints(ref, creds)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(r *registry.Repository) bool {
		return s.config.Loopback != "" && strings.HasPrefix(r.Name(), s.config.Loopback+"/")
	}), nil
}

// Pinned reports whether an origin is where pinned images are.
func (o Origin) Pinned() bool { return o.pins }

// Load reads the image that a reference names from one of its origins.
func (s *Set) Load(ctx context.Context, o Origin, ref reference.Named, p image.Platform) (*image.Image, error) {
	if o.Layout == nil {
		return image.Load(ctx, o.Repository, image.TagOrDigest(ref), p)
	}
	asking, cancel := context.WithTimeoutCause(ctx, patience, errSlow)
	defer cancel()
	d, err := o.Layout.Resolve(asking, ref)
	if err != nil {
		return nil, s.judge(ctx, o.Place, err)
	}
	img, err := image.Load(asking, o.Layout, d.String(), p)
	return img, s.judge(ctx, o.Place, err)
}

// Believes reports whether an image that an origin has under this name counts as
// one that the configuration trusts, which names registries and layouts. A pinned
// image counts as it did where it was fetched. Who writes to any other layout may call
// an image whatever he likes: its name says nothing.
func (s *Set) Believes(ctx context.Context, o Origin, ref reference.Named, registries refpattern.List) bool {
	if o.Layout == nil {
		return registries.Match(ref)
	}
	if !o.pins {
		return o.Trusted
	}
	desc, err := o.Layout.Listed(ctx, ref)
	if err != nil {
		return false
	}
	from := Place(desc.Annotations[FromAnnotation])
	if _, isLayout := from.Path(); isLayout {
		return slices.Contains(s.config.Trusted, from)
	}
	return from != "" && registries.Match(ref)
}

// The annotations of pinned images: the place where one was fetched, and whether
// that needed credentials.
const (
	FromAnnotation    = "dev.holdfast.pin.from"
	PrivateAnnotation = "dev.holdfast.pin.private"
)

var errSlow = blob.Temporary(fmt.Errorf("it did not answer within %s", patience))

// judge notes whether a layout answers.
func (s *Set) judge(ctx context.Context, p Place, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case errors.Is(err, errSlow) && ctx.Err() == nil:
		s.rest[p] = time.Now().Add(rest)
	case err == nil:
		delete(s.rest, p)
	}
	return err
}

func (s *Set) resting(p Place) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.rest[p])
}

// Sources are the places that blobs are read from, in the order of the origins.
func Sources(origins []Origin) []blob.Source {
	var all []blob.Source
	for _, o := range origins {
		if o.Layout != nil {
			all = append(all, o.Layout)
		} else {
			all = append(all, image.Patient(o.Repository, len(origins)))
		}
	}
	return all
}
