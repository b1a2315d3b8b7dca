// SPDX-License-Identifier: Apache-2.0

// Package config holds the daemon's settings: their names, their meaning and
// their defaults, in one place. [Default] documents each; `holdfast config
// default` prints the same text.
package config

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/docker/go-units"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/refpattern"
	"github.com/holdfast/holdfast/internal/sources"
)

// DefaultPath is where the daemon's settings are looked for.
const DefaultPath = "/etc/holdfast/config.toml"

// DefaultFile is a configuration file with every setting at its default, and
// what it means.
//
//go:embed default.toml
var DefaultFile string

// Config is the daemon's settings. See default.toml for what each means.
type Config struct {
	Root         string          `toml:"root"`
	RunRoot      string          `toml:"runroot"`
	ImageStore   string          `toml:"image_store"`
	Socket       string          `toml:"socket"`
	LogLevel     string          `toml:"log_level"`
	RuntimeRoots []string        `toml:"runtime_roots"`
	Runtimes     []string        `toml:"runtimes"`
	CacheLimit   Share           `toml:"cache_limit"`
	Trusted      refpattern.List `toml:"trusted"`
	Include      refpattern.List `toml:"include"`
	Exclude      refpattern.List `toml:"exclude"`

	TopLayerLimit Bytes    `toml:"top_layer_limit"`
	ReadTimeout   Duration `toml:"read_timeout"`
	StallTimeout  Duration `toml:"stall_timeout"`
	HookTimeout   Duration `toml:"hook_timeout"`
	Mount         string   `toml:"mount"`
	ReadAhead     Bytes    `toml:"read_ahead"`

	RegistriesConf    string `toml:"registries_conf"`
	RegistriesConfDir string `toml:"registries_conf_dir"`
	AuthFile          string `toml:"auth_file"`
	MaxFetches        int    `toml:"max_fetches"`

	GCGrace                  Duration `toml:"gc_grace"`
	Fill                     Pace     `toml:"fill"`
	Profile                  string   `toml:"profile"`
	ProfileSettle            Duration `toml:"profile_settle"`
	AuthFiles                []string `toml:"auth_files"`
	CredentialProviderConfig string   `toml:"credential_provider_config"`
	CredentialProviderBinDir string   `toml:"credential_provider_bin_dir"`

	Sources        []sources.Place `toml:"sources"`
	TrustedSources []sources.Place `toml:"trusted_sources"`
	SourceRegistry string          `toml:"source_registry"`
	Offline        bool            `toml:"offline"`

	Pinned      []string `toml:"pinned"`
	PinRoot     string   `toml:"pin_root"`
	PinInterval Duration `toml:"pin_interval"`

	ArtifactStores   []ArtifactStore `toml:"artifact_stores"`
	Artifacts        []string        `toml:"artifacts"`
	ArtifactRoot     string          `toml:"artifact_root"`
	ArtifactLimit    Share           `toml:"artifact_limit"`
	ArtifactInterval Duration        `toml:"artifact_interval"`

	Index Index `toml:"index"`
}

// Index is the settings for layers that carry no index.
type Index struct {
	Stores  []index.Place `toml:"stores"`
	Publish []index.Place `toml:"publish"`
	Trust   index.Trust   `toml:"trust"`
	Build   bool          `toml:"build"`
}

// Bytes is a size, written with a unit: "8MiB".
type Bytes int64

// UnmarshalText reads a size such as "8MiB" or "1GB" (both are powers of 1024).
func (b *Bytes) UnmarshalText(text []byte) error {
	n, err := units.RAMInBytes(string(text))
	if err != nil {
		return fmt.Errorf("size %q: want a number with a unit, such as 8MiB", text)
	}
	*b = Bytes(n)
	return nil
}

// MarshalText writes the size with a unit.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(units.BytesSize(float64(b))), nil }

// Share is a size, "100GiB", or a part of something, "50%"; "" is none.
type Share struct {
	Bytes   Bytes
	Percent float64 // if Bytes is 0
}

// UnmarshalText reads a size or a percentage.
func (s *Share) UnmarshalText(text []byte) error {
	*s = Share{}
	if len(text) == 0 {
		return nil
	}
	number, percent := strings.CutSuffix(string(text), "%")
	if !percent {
		return s.Bytes.UnmarshalText(text)
	}
	p, err := strconv.ParseFloat(number, 64)
	if err != nil || !(p >= 0 && p <= 100) {
		return fmt.Errorf("share %q: want a size such as 100GiB or a percentage such as 50%%", text)
	}
	s.Percent = p
	return nil
}

// MarshalText writes the size with a unit, or the percentage.
func (s Share) MarshalText() ([]byte, error) {
	switch {
	case s.Percent > 0:
		return []byte(strconv.FormatFloat(s.Percent, 'g', -1, 64) + "%"), nil
	case s.Bytes > 0:
		return s.Bytes.MarshalText()
	}
	return nil, nil
}

// Of is the share's size in bytes, 0 if it is none.
func (s Share) Of(total int64) int64 {
	if s.Percent > 0 {
		return int64(float64(total) / 100 * s.Percent)
	}
	return int64(s.Bytes)
}

// Duration is a time span, written with a unit: "2m".
type Duration time.Duration

// UnmarshalText reads a time span such as "90s" or "2m".
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("time span %q: want a number with a unit, such as 90s or 2m", text)
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes the time span with units.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// MarshalJSON writes the settings under the names that they have in a file.
func (c Config) MarshalJSON() ([]byte, error) {
	text, err := toml.Marshal(fileForm(c))
	if err != nil {
		return nil, fmt.Errorf("encoding configuration: %w", err)
	}
	var named map[string]any
	if err := toml.Unmarshal(text, &named); err != nil {
		return nil, fmt.Errorf("encoding configuration: %w", err)
	}
	return json.Marshal(named)
}

// fileForm is a Config without its methods.
type fileForm Config

// Default returns the settings of default.toml.
func Default() (Config, error) {
	var c Config
	if err := c.decode(DefaultFile); err != nil {
		return Config{}, fmt.Errorf("default settings: %w", err)
	}
	return c, nil
}

// Load reads settings from a file; what it does not name has its default. A file
// that does not exist at [DefaultPath] is an empty one.
func Load(name string) (Config, error) {
	c, err := Default()
	if err != nil {
		return Config{}, err
	}
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && name == DefaultPath {
		data, err = nil, nil
	}
	if err != nil {
		return Config{}, fmt.Errorf("reading configuration: %w", err)
	}
	if err := c.decode(string(data)); err != nil {
		return Config{}, fmt.Errorf("reading configuration %s: %w", name, err)
	}
	if err := c.Validate(); err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", name, err)
	}
	return c, nil
}

func (c *Config) decode(text string) error {
	meta, err := toml.NewDecoder(bytes.NewReader([]byte(text))).Decode(c)
	if err != nil {
		return err
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return fmt.Errorf("unknown setting %q; `holdfast config default` prints all there are", unknown[0].String())
	}
	return nil
}

// Validate reports the first setting that cannot work.
func (c *Config) Validate() error {
	for _, dir := range []struct{ name, value string }{
		{"root", c.Root}, {"runroot", c.RunRoot}, {"image_store", c.StorePath()}, {"socket", c.SocketPath()}, {"pin_root", c.PinPath()}, {"artifact_root", c.ArtifactPath()},
	} {
		if !filepath.IsAbs(dir.value) || dir.value != filepath.Clean(dir.value) || dir.value == "/" {
			return fmt.Errorf("%s = %q: want an absolute path without . or .. segments", dir.name, dir.value)
		}
	}
	for _, root := range c.RuntimeRoots {
		if !filepath.IsAbs(root) {
			return fmt.Errorf("runtime_roots: %q: want absolute paths", root)
		}
		if root == c.StorePath() || root == c.Root {
			return fmt.Errorf("runtime_roots: %q is Holdfast's own directory", root)
		}
	}
	if err := c.validateCredentials(); err != nil {
		return err
	}
	if err := c.validateSources(); err != nil {
		return err
	}
	if err := c.validateArtifacts(); err != nil {
		return err
	}
	if err := c.Trusted.Validate(); err != nil {
		return fmt.Errorf("trusted: %w", err)
	}
	if err := c.Include.Validate(); err != nil {
		return fmt.Errorf("include: %w", err)
	}
	if err := c.Exclude.Validate(); err != nil {
		return fmt.Errorf("exclude: %w", err)
	}
	for name, places := range map[string][]index.Place{"index.stores": c.Index.Stores, "index.publish": c.Index.Publish} {
		for _, p := range places {
			if err := ValidatePlace(p); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		return fmt.Errorf("log_level = %q: want debug, info, warn or error", c.LogLevel)
	}
	if !slices.Contains([]string{"auto", "file", "loop"}, c.Mount) {
		return fmt.Errorf("mount = %q: want auto, file or loop", c.Mount)
	}
	if !slices.Contains([]string{"on", "off"}, c.Profile) {
		return fmt.Errorf("profile = %q: want on or off", c.Profile)
	}
	for name, d := range map[string]Duration{
		"profile_settle": c.ProfileSettle, "pin_interval": c.PinInterval, "artifact_interval": c.ArtifactInterval,
		"read_timeout": c.ReadTimeout, "stall_timeout": c.StallTimeout, "hook_timeout": c.HookTimeout,
	} {
		if d <= 0 {
			return fmt.Errorf("%s = %q: want more than 0", name, time.Duration(d))
		}
	}
	for name, limit := range map[string]Share{"cache_limit": c.CacheLimit, "artifact_limit": c.ArtifactLimit} {
		if limit.Bytes < 0 {
			return fmt.Errorf("%s = %d: want 0 or more", name, limit.Bytes)
		}
	}
	if c.GCGrace < 0 {
		return fmt.Errorf("gc_grace = %q: want 0s or more", time.Duration(c.GCGrace))
	}
	if c.MaxFetches < 1 {
		return fmt.Errorf("max_fetches = %d: want at least 1", c.MaxFetches)
	}
	for _, r := range c.Runtimes {
		if r == "" || strings.Contains(r, "/") {
			return fmt.Errorf("runtimes: %q: want the name of a program, without a path", r)
		}
	}
	return nil
}

// ValidatePlace reports what is wrong with the name of a place for indexes.
func ValidatePlace(p index.Place) error {
	if p == index.RegistryPlace || filepath.IsAbs(string(p)) {
		return nil
	}
	if name, ok := strings.CutPrefix(string(p), index.RepositoryPlace); ok {
		named, err := reference.ParseNormalizedNamed(name)
		if err == nil && reference.IsNameOnly(named) && named.Name() == name {
			return nil
		}
	}
	return fmt.Errorf(`%q: want "registry", the path of a directory, or docker://HOST/REPOSITORY without a tag`, p)
}

func (c *Config) validateSources() error {
	seen := map[sources.Place]bool{}
	for _, p := range c.Sources {
		if seen[p] {
			return fmt.Errorf("sources: %q is there twice", p)
		}
		seen[p] = true
	}
	for _, p := range c.TrustedSources {
		if _, ok := p.Path(); !ok || !seen[p] {
			return fmt.Errorf("trusted_sources: %q: want one of the OCI layouts in sources", p)
		}
	}
	for _, name := range c.Pinned {
		if _, err := reference.ParseNormalizedNamed(name); err != nil {
			return fmt.Errorf("pinned: %q: %w", name, err)
		}
	}
	if c.SourceRegistry == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(c.SourceRegistry)
	ip := net.ParseIP(host)
	if n, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || n == 0 || ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("source_registry = %q: want a loopback address with a port, such as 127.0.0.1:5117, or nothing", c.SourceRegistry)
	}
	return nil
}

func (c *Config) validateCredentials() error {
	for _, name := range c.AuthFiles {
		if !filepath.IsAbs(name) {
			return fmt.Errorf("auth_files: %q: want absolute paths", name)
		}
	}
	if (c.CredentialProviderConfig == "") != (c.CredentialProviderBinDir == "") {
		return errors.New("credential_provider_config and credential_provider_bin_dir: want both or none")
	}
	for name, value := range map[string]string{
		"credential_provider_config": c.CredentialProviderConfig, "credential_provider_bin_dir": c.CredentialProviderBinDir,
	} {
		if value != "" && !filepath.IsAbs(value) {
			return fmt.Errorf("%s = %q: want an absolute path", name, value)
		}
	}
	return nil
}

// StorePath is the image store that runtimes list in additionalimagestores.
func (c *Config) StorePath() string {
	if c.ImageStore != "" {
		return c.ImageStore
	}
	return filepath.Join(c.Root, "store")
}

// PinPath is where pinned images are kept.
func (c *Config) PinPath() string {
	if c.PinRoot != "" {
		return c.PinRoot
	}
	return filepath.Join(c.Root, "pins")
}

// SocketPath is the control socket.
func (c *Config) SocketPath() string {
	if c.Socket != "" {
		return c.Socket
	}
	return filepath.Join(c.RunRoot, "holdfast.sock")
}

// KeeperSocketPath is where `holdfast serve --replace` finds the keeper.
func (c *Config) KeeperSocketPath() string { return filepath.Join(c.RunRoot, "keeper.sock") }
