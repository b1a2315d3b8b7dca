// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// Image is an image that has been prepared.
type Image struct {
	References []string      `json:"references"` // names it was prepared under, newest last
	Digest     digest.Digest `json:"digest"`     // of the platform's manifest
	Layers     []LayerResult `json:"layers"`
	Prepared   time.Time     `json:"prepared"` // when it was asked for last
	// UnusedSince is when the last runtime ceased to refer to it. It is zero while
	// one does, and Prepared as long as none has since then.
	UnusedSince time.Time `json:"unusedSince,omitzero"`
	// Repositories are those that it was prepared from: unlike its names they stay
	// with it.
	Repositories []string `json:"repositories,omitempty"`
	// Private means that its registry wanted credentials for it.
	Private bool `json:"private,omitempty"`
}

// label is what the image is called in front of people.
func (i Image) label() string {
	if len(i.References) == 0 {
		return i.Digest.String()
	}
	return strings.Join(i.References, ", ")
}

// chain returns the ids of the image's records, base first.
func (i Image) chain() []string {
	var ids []string
	for _, l := range i.Layers {
		if l.ChainID != "" {
			ids = append(ids, l.ChainID)
		}
	}
	return ids
}

// has reports whether the image has been given a layer: one that was left to the
// runtime is the runtime's.
func (i Image) has(d digest.Digest) bool {
	return slices.ContainsFunc(i.Layers, func(l LayerResult) bool { return l.Digest == d && l.Action != Left })
}

const maxImageFile = 16 << 20 // bytes of an image's file that are read

// images keeps one file an image: <dir>/<hex of the manifest digest>.json.
type images struct{ dir string }

func openImages(dir string) (*images, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating image directory: %w", err)
	}
	if err := atomicfile.Clean(dir); err != nil {
		return nil, err
	}
	return &images{dir}, nil
}

func (s *images) name(d digest.Digest) string { return filepath.Join(s.dir, d.Encoded()+".json") }

// all returns the images, oldest first. A file that cannot be read is an error:
// its layers would look unused.
func (s *images) all() ([]Image, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("reading prepared images: %w", err)
	}
	var all []Image
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".json" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		var i Image
		if err := atomicfile.ReadJSON(filepath.Join(s.dir, e.Name()), maxImageFile, &i); err != nil {
			return nil, fmt.Errorf("reading prepared images: %w", err)
		}
		all = append(all, i)
	}
	slices.SortStableFunc(all, func(a, b Image) int { return a.Prepared.Compare(b.Prepared) })
	return all, nil
}

// stamp differs from an earlier one if an image was written or removed since.
func (s *images) stamp() string {
	info, err := os.Stat(s.dir)
	if err != nil {
		return err.Error()
	}
	return info.ModTime().String()
}

// add records an image that has been prepared from a repository. A name that moves
// to it leaves other images.
func (s *images) add(res *Result, repository string, private bool) error {
	all, err := s.all()
	if err != nil {
		return err
	}
	img := Image{Digest: res.Digest, Layers: res.Layers, Private: private}
	for _, other := range all {
		if other.Digest == res.Digest {
			img.References, img.Repositories = other.References, other.Repositories
			continue
		}
		if i := slices.Index(other.References, res.Reference); i >= 0 {
			other.References = slices.Delete(other.References, i, i+1)
			if err := s.write(other); err != nil {
				return err
			}
		}
	}
	if !slices.Contains(img.References, res.Reference) {
		img.References = append(img.References, res.Reference)
	}
	if !slices.Contains(img.Repositories, repository) {
		img.Repositories = append(img.Repositories, repository)
	}
	return s.touch(img)
}

// touch records that an image was asked for.
func (s *images) touch(i Image) error {
	i.Prepared = time.Now().UTC()
	i.UnusedSince = i.Prepared
	return s.write(i)
}

func (s *images) write(i Image) error {
	return atomicfile.WriteJSON(s.name(i.Digest), i, 0o600)
}

func (s *images) remove(d digest.Digest) error {
	if err := os.Remove(s.name(d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing prepared image: %w", err)
	}
	return nil
}
