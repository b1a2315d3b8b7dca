// SPDX-License-Identifier: Apache-2.0

package artifacts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/filelock"
	"github.com/holdfast/holdfast/internal/shards"
)

const (
	// lockPatience is how long readers may hold the lock.
	lockPatience = 10 * time.Second
	// grace is how long what is not listed any more stays: a runtime may have looked it
	// up, and be about to mount it.
	grace = 2 * time.Minute
)

// create makes one directory of the composed store, with all that its readers open.
func create(dir string) error {
	dir = filepath.Join(dir, artifactstore.Subdirectory)
	if err := os.MkdirAll(filepath.Join(dir, v1.ImageBlobsDir, string(digest.SHA256)), 0o700); err != nil {
		return fmt.Errorf("creating artifact store: %w", err)
	}
	for _, d := range []string{dir, filepath.Join(dir, v1.ImageBlobsDir, string(digest.SHA256))} {
		if err := atomicfile.Clean(d); err != nil {
			return fmt.Errorf("creating artifact store: %w", err)
		}
	}
	lock, err := os.OpenFile(filepath.Join(dir, artifactstore.LockName), os.O_CREATE|os.O_RDWR, 0o644) //nolint:gosec // as its readers make it
	if err == nil {
		err = lock.Close()
	}
	if err == nil {
		err = atomicfile.Write(filepath.Join(dir, v1.ImageLayoutFile), []byte(`{"imageLayoutVersion":"`+v1.ImageLayoutVersion+`"}`), 0o644)
	}
	if err != nil {
		return fmt.Errorf("creating artifact store: %w", err)
	}
	return nil
}

// shard is what one of the directories is to hold.
type shard struct {
	manifests []v1.Descriptor
	digests   map[digest.Digest]bool
	small     map[digest.Digest][]byte
	links     map[digest.Digest]string
}

// composition is what the composed store is to hold.
type composition struct {
	shards   [shards.Count]*shard
	status   []Status
	shadowed map[string]int
}

// compose writes the store: of each name what the first store has that offers it.
func (m *Manager) compose(ctx context.Context, withoutUs bool) error {
	m.composing.Lock()
	defer m.composing.Unlock()
	c := m.plan(withoutUs)
	for i, dir := range shards.Directories(m.config.Dir) {
		if err := m.write(ctx, filepath.Join(dir, artifactstore.Subdirectory), c.shards[i]); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.composed, m.shadowed = c.status, c.shadowed
	return nil
}

// write writes one of the directories.
func (m *Manager) write(ctx context.Context, dir string, s *shard) error {
	blobs := filepath.Join(dir, v1.ImageBlobsDir, string(digest.SHA256))
	for d, body := range s.small {
		if err := place(filepath.Join(blobs, d.Encoded()), body); err != nil {
			return err
		}
	}
	for d, target := range s.links {
		if _, here := s.small[d]; here {
			continue
		}
		if err := link(filepath.Join(blobs, d.Encoded()), target); err != nil {
			return err
		}
	}
	body, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: s.manifests})
	if err != nil {
		return fmt.Errorf("encoding index: %w", err)
	}
	if err := m.writeIndex(ctx, dir, body); err != nil {
		return err
	}
	return m.tidy(blobs, s)
}

// writeIndex replaces the index while no reader looks.
func (m *Manager) writeIndex(ctx context.Context, dir string, body []byte) error {
	name := filepath.Join(dir, v1.ImageIndexFile)
	if have, err := os.ReadFile(name); err == nil && string(have) == string(body) {
		return nil
	}
	lock, err := os.OpenFile(filepath.Join(dir, artifactstore.LockName), os.O_CREATE|os.O_RDWR, 0o644) //nolint:gosec // as its readers make it
	if err != nil {
		return fmt.Errorf("locking artifact store: %w", err)
	}
	defer lock.Close() //nolint:errcheck // ends the lock
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), lockPatience, errors.New("a reader does not let go of it"))
	defer cancel()
	if err := filelock.Wait(ctx, lock); err != nil {
		return fmt.Errorf("locking artifact store: %w", err)
	}
	if err := atomicfile.Write(name, body, 0o644); err != nil {
		return fmt.Errorf("writing index of artifact store: %w", err)
	}
	return nil
}

// plan decides which store answers for which name.
func (m *Manager) plan(withoutUs bool) *composition {
	c := &composition{shadowed: map[string]int{}}
	for i := range c.shards {
		c.shards[i] = &shard{
			manifests: []v1.Descriptor{}, digests: map[digest.Digest]bool{}, small: map[digest.Digest][]byte{}, links: map[digest.Digest]string{},
		}
	}
	names := map[string]bool{}
	take := func(e *entry) {
		if names[e.name] {
			c.shadowed[e.from]++
			return
		}
		if s := c.shards[shards.Of(e.name)]; s.digests[e.manifest.Digest] && strings.Contains(e.name, "@") {
			return // by another digest it would not be found
		}
		listed, err := c.shards[shards.Of(e.name)].add(e)
		if err != nil { // Parse has read it before
			m.config.Logger.Error("making a manifest for another name", "artifact", e.name, "err", err)
			return
		}
		names[e.name] = true
		c.status = append(c.status, e.status(listed))
	}
	for _, a := range m.stores {
		entries, _ := a.offers()
		for _, e := range entries {
			take(e)
		}
	}
	for _, e := range m.lazyEntries(withoutUs) {
		take(e)
	}
	return c
}

// add lists an artifact, and returns the digest by which it is listed.
func (s *shard) add(e *entry) (digest.Digest, error) {
	listed := e.manifest
	if s.digests[listed.Digest] {
		var err error
		if listed, err = artifactstore.Alias(listed, e.name); err != nil {
			return "", err
		}
	}
	s.digests[listed.Digest] = true
	s.manifests = append(s.manifests, v1.Descriptor{
		MediaType: v1.MediaTypeImageManifest, Digest: listed.Digest, Size: int64(len(listed.Body)),
		Annotations: map[string]string{v1.AnnotationRefName: e.name},
	})
	s.small[listed.Digest] = listed.Body
	for d, body := range e.small {
		s.small[d] = body
	}
	for d, target := range e.files {
		if s.links[d] == "" {
			s.links[d] = target
		}
	}
	return listed.Digest, nil
}

// status is that of an artifact that is listed.
func (e *entry) status(listed digest.Digest) Status {
	s := Status{
		Name: e.name, Digest: e.artifact.Original, Type: e.artifact.Type(), Size: e.artifact.Size(), Local: e.artifact.Size(),
		From: e.from, State: InStore,
	}
	if listed != s.Digest {
		s.Listed = listed
	}
	if e.lazy != nil {
		s.State = Lazy
	}
	return s
}

// place writes a small blob.
func place(name string, body []byte) error {
	info, err := os.Lstat(name)
	if err == nil && info.Mode().IsRegular() && info.Size() == int64(len(body)) {
		return nil // names are digests, and nobody else writes here
	}
	if err := atomicfile.Write(name, body, 0o644); err != nil {
		return fmt.Errorf("writing to artifact store: %w", err)
	}
	return nil
}

// link makes a link, or has one lead elsewhere from now on.
func link(name, target string) error {
	if have, err := os.Readlink(name); err == nil && have == target {
		return nil
	}
	temp := name + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("linking into artifact store: %w", err)
	}
	if err := os.Symlink(target, temp); err != nil {
		return fmt.Errorf("linking into artifact store: %w", err)
	}
	if err := os.Rename(temp, name); err != nil {
		return fmt.Errorf("linking into artifact store: %w", err)
	}
	return nil
}

// tidy removes what has not been listed for the grace period. The caller holds
// m.composing.
func (m *Manager) tidy(blobs string, s *shard) error {
	have, err := os.ReadDir(blobs)
	if err != nil {
		return fmt.Errorf("tidying up artifact store: %w", err)
	}
	for _, e := range have {
		d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		if _, small := s.small[d]; small || s.links[d] != "" {
			delete(m.unlisted, filepath.Join(blobs, e.Name()))
			continue
		}
		name := filepath.Join(blobs, e.Name())
		since, known := m.unlisted[name]
		switch {
		case !known:
			m.unlisted[name] = time.Now()
		case time.Since(since) > grace:
			delete(m.unlisted, name)
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("tidying up artifact store: %w", err)
			}
		}
	}
	return nil
}
