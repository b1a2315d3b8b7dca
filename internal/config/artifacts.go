// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"path/filepath"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/refpattern"
)

// ArtifactStore is an artifact store that is offered to the runtimes of the node.
type ArtifactStore struct {
	Path   string         `toml:"path"`
	Filter ArtifactFilter `toml:"filter"`
	Verify bool           `toml:"verify"`
}

// ArtifactFilter says what of a store is offered.
type ArtifactFilter struct {
	References refpattern.List `toml:"references"`
	Types      []string        `toml:"types"`
	MaxSize    Bytes           `toml:"max_size"`
}

// Artifacts is the filter as package artifacts has it.
func (f ArtifactFilter) Artifacts() artifacts.Filter {
	return artifacts.Filter{References: f.References, Types: f.Types, MaxSize: int64(f.MaxSize)}
}

// maxArtifactStores bounds what is looked at all the time.
const maxArtifactStores = 32

func (c *Config) validateArtifacts() error {
	if len(c.ArtifactStores) > maxArtifactStores {
		return fmt.Errorf("artifact_stores: want at most %d", maxArtifactStores)
	}
	seen := map[string]bool{}
	for _, s := range c.ArtifactStores {
		if !filepath.IsAbs(s.Path) || s.Path != filepath.Clean(s.Path) || s.Path == "/" {
			return fmt.Errorf("artifact_stores: path %q: want an absolute path without . or .. segments", s.Path)
		}
		if s.Path == c.ArtifactStorePath() {
			return fmt.Errorf("artifact_stores: %s is the store that is made of the others", s.Path)
		}
		if seen[s.Path] {
			return fmt.Errorf("artifact_stores: %s is there twice", s.Path)
		}
		seen[s.Path] = true
		if err := s.Filter.Artifacts().Validate(); err != nil {
			return fmt.Errorf("artifact_stores: filter of %s: %w", s.Path, err)
		}
	}
	for _, name := range c.Artifacts {
		if err := artifacts.CheckName(name); err != nil {
			return fmt.Errorf("artifacts: %w", err)
		}
	}
	return nil
}

// ArtifactPath is where the files of lazy artifacts are kept.
func (c *Config) ArtifactPath() string {
	if c.ArtifactRoot != "" {
		return c.ArtifactRoot
	}
	return filepath.Join(c.Root, "artifacts")
}

// ArtifactStorePath is the composed artifact store, which runtimes list in
// additional_artifact_stores.
func (c *Config) ArtifactStorePath() string { return filepath.Join(c.RunRoot, "artifact-store") }
