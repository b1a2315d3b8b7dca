// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// Bounds of what a node keeps: what was written longest ago goes first.
const (
	maxFiles = 1000
	maxBytes = 256 << 20
)

// Store keeps one file an image: <dir>/<hex of the manifest digest>.json, the
// document. Its methods may be called concurrently.
type Store struct {
	dir string
	mu  sync.Mutex // held while files change
}

// OpenStore opens the store in a directory, which it makes if need be.
func OpenStore(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating profile directory: %w", err)
	}
	if err := atomicfile.Clean(dir); err != nil {
		return nil, err
	}
	return &Store{dir: dir}, nil
}

func (s *Store) name(image digest.Digest) string {
	return filepath.Join(s.dir, image.Encoded()+".json")
}

// Load returns the profile of an image: [fs.ErrNotExist] if there is none,
// [ErrInvalid] if it is damaged.
func (s *Store) Load(image digest.Digest) (*Profile, error) {
	if err := image.Validate(); err != nil {
		return nil, fmt.Errorf("profile of image %q: %w", clip(string(image)), err)
	}
	f, err := os.Open(s.name(image))
	if err != nil {
		return nil, fmt.Errorf("profile of image %s: %w", image, err)
	}
	defer f.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("profile of image %s: %w", image, err)
	}
	return Check(data, image)
}

// Check reads the document of an image.
func Check(data []byte, image digest.Digest) (*Profile, error) {
	p, err := Decode(data)
	if err == nil && p.Image != image {
		err = fmt.Errorf("it is one of %s: %w", p.Image, ErrInvalid)
	}
	if err != nil {
		return nil, fmt.Errorf("profile of image %s: %w", image, err)
	}
	return p, nil
}

// Save keeps a profile, in the place of one of the same image.
func (s *Store) Save(p *Profile) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.save(p)
}

// Add adds a recording to what is kept of its image, and returns what is kept then.
func (s *Store) Add(recorded *Profile) (*Profile, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := recorded
	old, err := s.Load(recorded.Image)
	switch {
	case err == nil:
		p = Merge(old, recorded)
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrInvalid):
		return nil, err
	}
	return p, s.save(p)
}

func (s *Store) save(p *Profile) error {
	if err := p.check(); err != nil {
		return fmt.Errorf("keeping profile of image %q: %w", clip(string(p.Image)), err)
	}
	data, err := p.Encode()
	if err != nil {
		return err
	}
	if err := atomicfile.Write(s.name(p.Image), data, 0o600); err != nil {
		return err
	}
	return s.trim(maxFiles, maxBytes)
}

// Drop removes the profile of an image: [fs.ErrNotExist] if there is none.
func (s *Store) Drop(image digest.Digest) error {
	if err := image.Validate(); err != nil {
		return fmt.Errorf("profile of image %q: %w", clip(string(image)), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.Remove(s.name(image)); err != nil {
		return fmt.Errorf("dropping profile of image %s: %w", image, err)
	}
	return nil
}

// trim removes the oldest files beyond so many, and so many bytes.
func (s *Store) trim(files int, bytes int64) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("trimming profiles: %w", err)
	}
	var kept []fs.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil && !strings.HasPrefix(e.Name(), ".") {
			kept = append(kept, info)
		}
	}
	slices.SortFunc(kept, func(a, b fs.FileInfo) int {
		return cmp.Or(b.ModTime().Compare(a.ModTime()), cmp.Compare(a.Name(), b.Name()))
	})
	for i, info := range kept {
		if bytes -= info.Size(); i < files && bytes >= 0 {
			continue
		}
		if err := os.Remove(filepath.Join(s.dir, info.Name())); err != nil {
			return fmt.Errorf("trimming profiles: %w", err)
		}
	}
	return nil
}
