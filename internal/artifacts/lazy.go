// SPDX-License-Identifier: Apache-2.0

package artifacts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/sources"
)

// lazy is an artifact that is read from its registry.
type lazy struct {
	ref        reference.Named
	configured bool   // the configuration names it
	pattern    string // the pattern of the configuration that names it, if one does
	prepared   bool   // by request
	creds      *registry.Credentials

	manifest blob.Manifest           // of digest "" as long as it is not known
	artifact *artifactstore.Artifact // of manifest
	config   []byte                  // its configuration; nil if it is too large to keep here
	from     string
	checked  time.Time
	err      error
}

// isImage reports whether a pattern names an image besides artifacts: nobody has asked
// for it.
func (l *lazy) isImage() bool {
	return l.pattern != "" && !l.configured && !l.prepared && errors.Is(l.err, artifactstore.ErrImage)
}

// record is what is kept of one.
type record struct {
	Name     string    `json:"name"`
	Prepared bool      `json:"prepared,omitempty"`
	Pattern  string    `json:"pattern,omitempty"`
	Manifest []byte    `json:"manifest,omitempty"`
	Config   []byte    `json:"config,omitempty"`
	From     string    `json:"from,omitempty"`
	Checked  time.Time `json:"checked,omitzero"`
}

func (r record) restore() (*lazy, error) {
	ref, err := Parse(r.Name)
	if err != nil {
		return nil, err
	}
	l := &lazy{ref: ref, pattern: r.Pattern, prepared: r.Prepared, from: r.From, checked: r.Checked}
	if r.Manifest == nil {
		return l, nil
	}
	m := blob.Manifest{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(r.Manifest), Body: r.Manifest}
	if l.artifact, err = artifactstore.Parse(m); err != nil {
		return nil, err
	}
	l.manifest = m
	if digest.FromBytes(r.Config) == l.artifact.Config.Digest {
		l.config = r.Config
	}
	return l, nil
}

// save writes what is lazy. The caller holds m.mu.
func (m *Manager) save() error {
	kept := []record{}
	for name, l := range m.lazy {
		kept = append(kept, record{
			Name: name, Prepared: l.prepared, Pattern: l.pattern, Manifest: l.manifest.Body, Config: l.config, From: l.from, Checked: l.checked,
		})
	}
	slices.SortFunc(kept, func(a, b record) int { return cmp.Compare(a.Name, b.Name) })
	if err := atomicfile.WriteJSON(m.config.State, kept, 0o600); err != nil {
		return fmt.Errorf("noting which artifacts are lazy: %w", err)
	}
	return nil
}

// Parse reads the name of an artifact: one with a registry and a tag, or a digest.
func Parse(name string) (reference.Named, error) {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("artifact %q: %w", name, err)
	}
	return artifactstore.CheckName(reference.TagNameOnly(ref).String())
}

// want notes that an artifact is wanted, and returns it. The caller holds m.mu, or
// nobody else knows m.
func (m *Manager) want(ref reference.Named, configured bool) *lazy {
	l := m.lazy[ref.String()]
	if l == nil {
		l = &lazy{ref: ref}
		m.lazy[ref.String()] = l
	}
	l.configured = l.configured || configured
	return l
}

// Prepare looks an artifact up, and offers it from then on; of what is looked up already
// it looks whether the tag has moved. Credentials may be nil.
func (m *Manager) Prepare(ctx context.Context, ref reference.Named, creds *registry.Credentials) error {
	m.mu.Lock()
	_, known := m.lazy[ref.String()]
	l := m.want(ref, false)
	was := l.prepared
	l.prepared = true
	if creds != nil {
		l.creds = creds
	}
	m.mu.Unlock()
	err := m.resolve(ctx, l)
	m.mu.Lock()
	if err != nil && !known {
		delete(m.lazy, ref.String())
	} else if err != nil {
		l.prepared = was
	}
	err = errors.Join(err, m.save())
	m.mu.Unlock()
	if err != nil {
		return fmt.Errorf("preparing artifact %s: %w", ref, err)
	}
	return m.compose(ctx, false)
}

// Fetch fetches all of an artifact that was prepared, and waits for that.
func (m *Manager) Fetch(ctx context.Context, ref reference.Named) error {
	m.mu.Lock()
	l := m.lazy[ref.String()]
	var wanted []blob.Descriptor
	if l != nil && l.artifact != nil {
		wanted = l.artifact.Blobs()
	}
	m.mu.Unlock()
	if l == nil {
		return fmt.Errorf("artifact %s is %w", ref, ErrUnknown)
	}
	for _, d := range wanted {
		if b, ok := m.config.Blobs.Get(d.Digest); ok && !b.State().Verified {
			if err := b.Fetch(ctx); err != nil {
				return fmt.Errorf("fetching artifact %s: %w", ref, err)
			}
		}
	}
	return m.compose(ctx, false)
}

// Remove lets go of artifacts that were prepared by request: [ErrUnknown] or
// [ErrConfigured] if one cannot, and then none. What containers read stays for them.
func (m *Manager) Remove(ctx context.Context, names ...string) error {
	m.mu.Lock()
	for _, n := range names {
		switch l := m.lazy[n]; {
		case l == nil:
			m.mu.Unlock()
			return fmt.Errorf("artifact %s is %w", n, ErrUnknown)
		case l.configured || l.pattern != "":
			m.mu.Unlock()
			return fmt.Errorf("artifact %s is %w", n, ErrConfigured)
		}
	}
	for _, n := range names {
		delete(m.lazy, n)
	}
	err := m.save()
	m.mu.Unlock()
	return errors.Join(err, m.compose(ctx, false))
}

// RestoreSources tells blobs that were opened where they are read from.
func (m *Manager) RestoreSources() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lazy {
		if l.artifact == nil {
			continue
		}
		origins, err := m.config.Sources.Origins(l.ref, l.creds, false)
		if err != nil {
			m.config.Logger.Warn("finding sources of a lazy artifact", "artifact", l.ref.String(), "err", err)
			continue
		}
		for _, d := range l.artifact.Blobs() {
			if b, ok := m.config.Blobs.Get(d.Digest); ok {
				b.AddSources(sources.Sources(origins))
			}
		}
	}
}

// lazyEntries are the lazy artifacts that can be read. withoutUs takes only those that
// need no daemon for it.
func (m *Manager) lazyEntries(withoutUs bool) []*entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []*entry
	for name, l := range m.lazy {
		if l.artifact == nil {
			continue
		}
		e := &entry{
			name: name, manifest: l.manifest, artifact: l.artifact, from: l.from, lazy: l,
			files: map[digest.Digest]string{}, small: map[digest.Digest][]byte{},
		}
		if l.config != nil {
			e.small[l.artifact.Config.Digest] = l.config
		}
		if e.addLazy(m.config.Blobs, withoutUs) {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b *entry) int { return cmp.Compare(a.name, b.name) })
	return all
}

// addLazy adds where the files of an artifact are, and reports whether all can be read.
func (e *entry) addLazy(blobs *lazyblob.Set, withoutUs bool) bool {
	for _, d := range e.artifact.Blobs() {
		if _, here := e.small[d.Digest]; here {
			continue
		}
		b, ok := blobs.Get(d.Digest)
		if !ok || b.Bad() != nil {
			return false
		}
		path := b.Path()
		if withoutUs && filepath.Dir(filepath.Dir(path)) != blobs.Root {
			return false
		}
		e.files[d.Digest] = path
	}
	return true
}

// status tells how far a lazy artifact is. The caller holds Manager.mu.
func (l *lazy) status(blobs *lazyblob.Set) Status {
	s := Status{Name: l.ref.String(), State: Waiting, Configured: l.configured || l.pattern != "", From: l.from, Checked: l.checked}
	if l.err != nil {
		s.Error, s.State = l.err.Error(), Failed
	}
	if l.artifact == nil {
		return s
	}
	s.Digest, s.Type, s.Size, s.State = l.artifact.Original, l.artifact.Type(), l.artifact.Size(), Complete
	for _, d := range l.artifact.Blobs() {
		if d.Digest == l.artifact.Config.Digest {
			continue
		}
		b, ok := blobs.Get(d.Digest)
		if !ok {
			s.State = Failed
			continue
		}
		state := b.State()
		s.Blobs = append(s.Blobs, state)
		s.Local += state.Local
		if !state.Verified {
			s.State = Lazy
		}
		if state.Error != "" && s.Error == "" {
			s.Error = state.Error
		}
	}
	return s
}

// sweep lets go of blobs that no artifact has needed for the grace period, and that no
// container has mounted.
func (m *Manager) sweep() {
	m.mu.Lock()
	needed := map[digest.Digest]bool{}
	for _, l := range m.lazy {
		if l.artifact != nil {
			for _, d := range l.artifact.Blobs() {
				needed[d.Digest] = true
			}
		}
	}
	var gone []digest.Digest
	for _, b := range m.config.Blobs.All() {
		d := b.Descriptor().Digest
		if needed[d] {
			delete(m.missing, d)
		} else if since, known := m.missing[d]; !known {
			m.missing[d] = time.Now()
		} else if time.Since(since) > grace {
			gone = append(gone, d)
		}
	}
	m.mu.Unlock()
	for _, d := range gone {
		removed, err := m.config.Blobs.Remove(d)
		if err != nil {
			m.config.Logger.Warn("removing a blob that no artifact needs", "blob", d.String(), "err", err)
		} else if removed {
			m.config.Logger.Info("removed a blob that no artifact needs", "blob", d.String())
		}
		m.mu.Lock()
		if removed {
			delete(m.missing, d)
		} else {
			m.missing[d] = time.Now()
		}
		m.mu.Unlock()
	}
}
