// SPDX-License-Identifier: Apache-2.0

// Package artifacts keeps the composed artifact store of a node, which CRI-O reads
// artifacts from: made of the configured stores in their order, each with its filter,
// and of artifacts that are read lazily from their registries.
//
// One artifact, from a store to a container: [attached.look] finds it listed and whole
// (scan.go) -> [Manager.compose] decides which of the stores answers for its name, and
// writes its manifest and links to its files (compose.go) -> CRI-O lists it, and mounts
// the files that the links lead to. One that is only in a registry is looked up by
// [Manager.resolve] (lookup.go), and its files are package lazyblob's.
//
// It is in the run directory: it is made anew at each start, and gone after a boot, so
// that nothing in it can be stale. What a runtime reads there to list artifacts is local:
// no store behind it can hold it up but for the files themselves, nor take it down.
package artifacts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/refpattern"
	"github.com/holdfast/holdfast/internal/shards"
	"github.com/holdfast/holdfast/internal/sources"
)

// Errors of requests.
var (
	ErrUnknown    = errors.New("not prepared")
	ErrConfigured = errors.New("named by the configuration: take it out of the setting artifacts")
)

// Config is what a Manager works with.
type Config struct {
	// Dir is the composed store: see [Directories].
	Dir string
	// State is the file that keeps what is lazy.
	State  string
	Stores []Store
	// Names are the lazy artifacts of the configuration, and patterns of them.
	Names []string
	// Interval is how often it is looked whether a tag has moved.
	Interval time.Duration
	Sources  *sources.Set
	// Registries are those that are trusted; see [sources.Set.Believes]. Of others only
	// chunk lists that were made here are used.
	Registries refpattern.List
	Indexes    *indexes.Finder
	// IndexTrust is what a chunk list has to be worth.
	IndexTrust index.Trust
	Blobs      *lazyblob.Set
	// Wake, which has room for an element, has one when something has changed that is
	// composed, such as a blob.
	Wake   chan struct{}
	Logger *slog.Logger
}

// Manager keeps the composed store. Its methods may be called concurrently.
type Manager struct {
	config Config
	stores []*attached

	composing sync.Mutex           // held while the composed store is written; protects the field below
	unlisted  map[string]time.Time // files that are not listed, since when

	mu       sync.Mutex // protects the fields below
	lazy     map[string]*lazy
	composed []Status
	shadowed map[string]int              // by store
	failures map[string]string           // of patterns
	missing  map[digest.Digest]time.Time // lazy blobs that nothing needs, since when
}

// maxState is how many bytes the file of lazy artifacts may have.
const maxState = 256 << 20

// New returns a Manager for the stores and the artifacts of the configuration, and those
// that were prepared before.
func New(c Config) (*Manager, error) {
	m := &Manager{
		config: c, unlisted: map[string]time.Time{}, lazy: map[string]*lazy{}, shadowed: map[string]int{},
		failures: map[string]string{}, missing: map[digest.Digest]time.Time{},
	}
	for _, s := range c.Stores {
		m.stores = append(m.stores, newAttached(s))
	}
	var kept []record
	err := atomicfile.ReadJSON(c.State, maxState, &kept)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		// Better without than not at all: they are looked up again.
		c.Logger.Error("reading which artifacts are lazy", "err", err)
	}
	for _, r := range kept {
		l, err := r.restore()
		if err != nil {
			c.Logger.Warn("forgetting a lazy artifact", "artifact", r.Name, "err", err)
			continue
		}
		m.lazy[l.ref.String()] = l
	}
	return m, m.configure()
}

// Changed has the store composed anew.
func (m *Manager) Changed() {
	select {
	case m.config.Wake <- struct{}{}:
	default:
	}
}

// Run keeps the composed store until ctx ends.
func (m *Manager) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	for _, a := range m.stores {
		running.Go(func() { a.run(ctx, m.Changed) })
	}
	running.Go(func() { m.lookUp(ctx) })
	const tidy = 15 * time.Second
	for {
		if err := m.compose(ctx, false); err != nil && ctx.Err() == nil {
			m.config.Logger.Error("composing the artifact store", "dir", m.config.Dir, "err", err)
		}
		m.sweep()
		select {
		case <-m.config.Wake:
		case <-time.After(tidy):
		case <-ctx.Done():
			return nil
		}
	}
}

// Start composes what is there, before runtimes start. It does not wait long for stores:
// what they have comes later.
func (m *Manager) Start(ctx context.Context) error {
	for _, dir := range shards.Directories(m.config.Dir) {
		if err := create(dir); err != nil {
			return err
		}
	}
	const atMost = 2 * patience
	soon, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	var looking sync.WaitGroup
	for _, a := range m.stores {
		looking.Go(func() { a.look(soon) })
	}
	looking.Wait()
	return m.compose(ctx, false)
}

// Suspend leaves in the composed store only what can be read without the daemon.
func (m *Manager) Suspend(ctx context.Context) error { return m.compose(ctx, true) }

// StoreStatus is how a store is.
type StoreStatus struct {
	Path string `json:"path"`
	// Error is why it cannot be read; "" if it can.
	Error     string `json:"error,omitempty"`
	Artifacts int    `json:"artifacts"` // that pass the filter and are whole
	Filtered  int    `json:"filtered"`
	// Shadowed is how many have a name that an earlier store answers for.
	Shadowed int `json:"shadowed"`
	// Problems are what is wrong with what it lists: a few of them.
	Problems []string `json:"problems,omitempty"`

	slow bool
}

// Status is an artifact that is composed, or to be.
type Status struct {
	Name   string        `json:"name"`
	Digest digest.Digest `json:"digest,omitempty"`
	// Listed is the digest that runtimes see, if it is another: see [artifactstore.Alias].
	Listed digest.Digest `json:"listed,omitempty"`
	Type   string        `json:"type,omitempty"`
	Size   int64         `json:"size"`  // of its files, in bytes
	Local  int64         `json:"local"` // of them, in bytes, on this node or in an attached store
	// From is the store that answers for it, or where it is read from.
	From  string `json:"from,omitempty"`
	State string `json:"state"`
	// Configured means that the configuration names it.
	Configured bool             `json:"configured,omitempty"`
	Error      string           `json:"error,omitempty"`
	Checked    time.Time        `json:"checked,omitzero"` // when its name was last looked up
	Blobs      []lazyblob.State `json:"blobs,omitempty"`
}

// States of an artifact.
const (
	InStore  = "in store" // whole, in a store
	Lazy     = "lazy"     // read when it is needed
	Complete = "complete" // it was lazy
	Waiting  = "waiting"  // to be looked up
	Failed   = "failed"   // could not be looked up, and will be again
)

// All is the composed store.
type All struct {
	// Directories are what additional_artifact_stores of CRI-O is to list.
	Directories []string          `json:"directories"`
	Stores      []StoreStatus     `json:"stores"`
	Artifacts   []Status          `json:"artifacts"`
	Patterns    map[string]string `json:"patterns,omitempty"` // those that could not be looked up, and why
}

// Status tells what is composed, and which store answers for it.
func (m *Manager) Status() All {
	all := All{Directories: shards.Directories(m.config.Dir), Stores: []StoreStatus{}, Artifacts: []Status{}}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.stores {
		_, s := a.offers()
		s.Shadowed = m.shadowed[a.Path]
		all.Stores = append(all.Stores, s)
	}
	seen := map[string]bool{}
	for _, s := range m.composed {
		seen[s.Name] = true
		if l := m.lazy[s.Name]; l != nil && s.State == Lazy {
			s = l.status(m.config.Blobs)
		}
		all.Artifacts = append(all.Artifacts, s)
	}
	for name, l := range m.lazy {
		if !seen[name] && !l.isImage() {
			all.Artifacts = append(all.Artifacts, l.status(m.config.Blobs))
		}
	}
	slices.SortFunc(all.Artifacts, func(a, b Status) int { return cmp.Compare(a.Name, b.Name) })
	if len(m.failures) > 0 {
		all.Patterns = map[string]string{}
		for p, why := range m.failures {
			all.Patterns[p] = why
		}
	}
	return all
}

// configure notes what the configuration names.
func (m *Manager) configure() error {
	for _, l := range m.lazy {
		l.configured = false
	}
	for _, n := range m.config.Names {
		if IsPattern(n) {
			if _, err := parsePattern(n); err != nil {
				return err
			}
			continue
		}
		ref, err := Parse(n)
		if err != nil {
			return err
		}
		m.want(ref, true)
	}
	return nil
}

func (m *Manager) String() string { return fmt.Sprintf("artifact store %s", m.config.Dir) }
