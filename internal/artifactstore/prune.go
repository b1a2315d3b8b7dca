// SPDX-License-Identifier: Apache-2.0

package artifactstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
)

// unneededName is the file that tells since when nothing needs a blob, and maxUnneeded
// how many bytes of it are read.
const (
	unneededName = ".unneeded.json"
	maxUnneeded  = 16 << 20
)

// Decision is what becomes of a blob that no artifact of the store needs.
type Decision struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	Remove bool          `json:"remove"`
	Reason string        `json:"reason"`
}

// Prune removes the blobs that nothing has needed for a grace period, or tells what it
// would do. Readers on other nodes may still read what their containers have mounted.
func (s *Store) Prune(ctx context.Context, grace time.Duration, dry bool) ([]Decision, error) {
	since, sizes, err := s.unneeded(ctx)
	if err != nil {
		return nil, fmt.Errorf("pruning %s: what is needed is not known, so nothing goes (holdfast artifact verify tells what to do): %w", s.path, err)
	}
	all := []Decision{}
	for _, d := range slices.Sorted(maps.Keys(since)) {
		at := since[d]
		age := time.Since(at)
		one := Decision{Digest: d, Size: sizes[d], Remove: age >= grace, Reason: "no artifact has needed it for " + units.HumanDuration(age)}
		all = append(all, one)
		if !one.Remove || dry {
			continue
		}
		err := os.Remove(filepath.Join(s.Path(), v1.ImageBlobsDir, d.Algorithm().String(), d.Encoded()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return all, fmt.Errorf("pruning %s: %w", s.path, err)
		}
		delete(since, d)
	}
	if dry {
		return all, nil
	}
	return all, s.save(since)
}

// note notes since when nothing needs which blobs. Of a store with a manifest that cannot
// be read that is not known: then all clocks begin anew, since an artifact has to be
// addable to such a store, and removable from it.
func (s *Store) note(ctx context.Context) error {
	since, _, err := s.unneeded(ctx)
	if ctx.Err() != nil {
		return fmt.Errorf("noting what is not needed in %s: %w", s.path, context.Cause(ctx))
	}
	if err != nil {
		since = nil
	}
	return s.save(since)
}

// need stops the clocks of blobs that are about to be listed. It comes before the list:
// who is killed between that and note must not leave an old clock running.
func (s *Store) need(blobs []blob.Descriptor) error {
	noted := s.noted()
	before := len(noted)
	for _, b := range blobs {
		delete(noted, b.Digest)
	}
	if len(noted) == before {
		return nil
	}
	return s.save(noted)
}

// noted reads since when nothing needs which blobs. If the file is harmed their time
// begins anew.
func (s *Store) noted() map[digest.Digest]time.Time {
	var noted map[digest.Digest]time.Time
	if err := atomicfile.ReadJSON(filepath.Join(s.Path(), unneededName), maxUnneeded, &noted); err != nil {
		return nil
	}
	return noted
}

func (s *Store) save(since map[digest.Digest]time.Time) error {
	name := filepath.Join(s.Path(), unneededName)
	if _, err := os.Stat(name); len(since) == 0 && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := atomicfile.WriteJSON(name, since, 0o644); err != nil {
		return fmt.Errorf("noting what is not needed in %s: %w", s.path, err)
	}
	return nil
}

// unneeded returns the blobs that nothing needs, since when, and their sizes.
func (s *Store) unneeded(ctx context.Context) (map[digest.Digest]time.Time, map[digest.Digest]int64, error) {
	needed, err := s.Reachable(ctx, func(v1.Descriptor) bool { return true })
	if err != nil {
		return nil, nil, err
	}
	noted := s.noted()
	dir := filepath.Join(s.Path(), v1.ImageBlobsDir, digest.SHA256.String())
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	since, sizes := map[digest.Digest]time.Time{}, map[digest.Digest]int64{}
	for _, e := range entries {
		d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		if d.Validate() != nil || needed[d] {
			continue // not ours, or needed
		}
		info, err := e.Info()
		if err != nil {
			return nil, nil, err
		}
		at, ok := noted[d]
		if !ok || at.After(time.Now()) {
			at = time.Now().UTC()
		}
		since[d], sizes[d] = at, info.Size()
	}
	return since, sizes, nil
}
