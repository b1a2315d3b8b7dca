// SPDX-License-Identifier: Apache-2.0

// Package mirrorconf tells runtimes, by a file in registries.conf.d, that repositories
// can be pulled from a registry of this machine.
//
// An entry for a repository takes the place of the administrator's for the registry that
// it is in, so each has what that one says: mirrors, locations, whether they are
// insecure. What the administrator has blocked stays blocked. A file that a runtime
// could not read would fail every pull of the node, so one is tried before it is put in
// place.
package mirrorconf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/BurntSushi/toml"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"go.podman.io/image/v5/types"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// FileName is the file's name: late in the order in which runtimes read them, of which
// the last entry for a repository counts.
const FileName = "90-holdfast-sources.conf"

const (
	header  = "# Written by holdfast serve, from the settings sources and source_registry.\n# Changes are lost.\n\n"
	maxFile = 16 << 20 // bytes of a file that is there
	// MaxRepositories bounds the file.
	MaxRepositories = 10_000
)

// ErrForeign means that a file of that name was written by somebody else.
var ErrForeign = errors.New("it was not written by Holdfast, and stays as it is: move it away")

// Repository is one that can be pulled from this machine.
type Repository struct {
	Name string // full name
	// Mirror is where: HOST:PORT/PATH, over http.
	Mirror string
	// AfterRegistry means that its registry, with its mirrors, is asked first.
	AfterRegistry bool
}

// Config says which files runtimes read; "" is where they look by themselves.
type Config struct {
	Conf, ConfDir string
}

// Dir is the directory that the file is in.
func (c Config) Dir() string {
	if c.ConfDir != "" {
		return c.ConfDir
	}
	return "/etc/containers/registries.conf.d"
}

// Stamp differs from an earlier one if what [Render] reads may differ, or the file was
// changed. It costs a stat a file.
func (c Config) Stamp() string {
	var b strings.Builder
	files, _ := filepath.Glob(filepath.Join(c.Dir(), "*.conf"))
	conf := c.Conf
	if conf == "" {
		conf = "/etc/containers/registries.conf"
	}
	for _, name := range append(files, conf) {
		if info, err := os.Stat(name); err == nil {
			fmt.Fprintln(&b, name, info.Size(), info.ModTime().UnixNano())
		}
	}
	return b.String()
}

// Write puts the file in place, or removes it if there are no repositories; changed
// reports whether there was anything to do.
func Write(c Config, all []Repository) (changed bool, err error) {
	name := filepath.Join(c.Dir(), FileName)
	old, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("reading %s: %w", name, err)
	}
	if err == nil && !bytes.HasPrefix(old, []byte(header[:20])) {
		return false, fmt.Errorf("writing %s: %w", name, ErrForeign)
	}
	text, err := Render(c, all)
	if err != nil {
		return false, fmt.Errorf("writing %s: %w", name, err)
	}
	switch {
	case bytes.Equal(text, old):
		return false, nil
	case len(text) == 0:
		return true, os.Remove(name)
	}
	if err := os.MkdirAll(c.Dir(), 0o755); err != nil { //nolint:gosec // as the package manager makes it
		return false, err
	}
	return true, atomicfile.Write(name, text, 0o644)
}

// Render returns what the file is to hold, which is nothing if there are no
// repositories: the same for the same input.
func Render(c Config, all []Repository) ([]byte, error) {
	if len(all) == 0 {
		return nil, nil
	}
	if len(all) > MaxRepositories {
		return nil, fmt.Errorf("there are %d repositories, more than %d", len(all), MaxRepositories)
	}
	dir, err := os.MkdirTemp("", "holdfast-registries-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
	system, err := c.without(dir)
	if err != nil {
		return nil, err
	}
	var doc struct {
		Registries []sysregistriesv2.Registry `toml:"registry"`
	}
	for _, r := range all {
		entry, err := entryFor(system, r)
		if err != nil {
			return nil, fmt.Errorf("repository %s: %w", r.Name, err)
		}
		if entry != nil {
			doc.Registries = append(doc.Registries, *entry)
		}
	}
	if doc.Registries == nil {
		return nil, nil
	}
	text := bytes.NewBufferString(header)
	if err := toml.NewEncoder(text).Encode(doc); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(system.SystemRegistriesConfDirPath, FileName), text.Bytes(), 0o600); err != nil {
		return nil, err
	}
	sysregistriesv2.InvalidateCache()
	if _, err := sysregistriesv2.GetRegistries(system); err != nil {
		return nil, fmt.Errorf("a runtime could not read it: %w", err)
	}
	return text.Bytes(), nil
}

// without is what runtimes would read without our file: a copy of the others.
func (c Config) without(dir string) (*types.SystemContext, error) {
	entries, err := os.ReadDir(c.Dir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if e.Name() == FileName || !strings.HasSuffix(e.Name(), ".conf") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(c.Dir(), e.Name()))
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, e.Name()), text, 0o600); err != nil {
			return nil, err
		}
	}
	sysregistriesv2.InvalidateCache()
	return &types.SystemContext{SystemRegistriesConfPath: c.Conf, SystemRegistriesConfDirPath: dir}, nil
}

// entryFor is the entry for a repository; nil if the administrator has blocked it.
func entryFor(system *types.SystemContext, r Repository) (*sysregistriesv2.Registry, error) {
	theirs, err := sysregistriesv2.FindRegistry(system, r.Name)
	if err != nil {
		return nil, err
	}
	ours := sysregistriesv2.Endpoint{Location: r.Mirror, Insecure: true}
	entry := &sysregistriesv2.Registry{Prefix: r.Name, Endpoint: sysregistriesv2.Endpoint{Location: r.Name}}
	if theirs != nil {
		if theirs.Blocked {
			return nil, nil
		}
		if err := narrow(entry, *theirs, r.Name); err != nil {
			return nil, err
		}
	}
	if r.AfterRegistry {
		primary := entry.Endpoint
		primary.PullFromMirror = ""
		entry.Mirrors = append(entry.Mirrors, primary, ours)
	} else {
		entry.Mirrors = append([]sysregistriesv2.Endpoint{ours}, entry.Mirrors...)
	}
	return entry, nil
}

// narrow gives an entry for a repository what one for all of its registry says.
func narrow(entry *sysregistriesv2.Registry, theirs sysregistriesv2.Registry, repository string) error {
	named, err := reference.ParseNamed(repository)
	if err != nil {
		return err
	}
	tagged, err := reference.WithTag(named, "latest")
	if err != nil {
		return err
	}
	all := theirs
	all.MirrorByDigestOnly, all.Mirrors = false, append([]sysregistriesv2.Endpoint(nil), theirs.Mirrors...)
	for i := range all.Mirrors {
		all.Mirrors[i].PullFromMirror = ""
	}
	places, err := all.PullSourcesFromReference(tagged)
	if err != nil {
		return err
	}
	for i, p := range places {
		e := p.Endpoint
		e.Location = p.Reference.Name()
		if i == len(theirs.Mirrors) {
			entry.Endpoint = e
			continue
		}
		if e.PullFromMirror = theirs.Mirrors[i].PullFromMirror; theirs.MirrorByDigestOnly {
			e.PullFromMirror = sysregistriesv2.MirrorByDigestOnly
		}
		entry.Mirrors = append(entry.Mirrors, e)
	}
	return nil
}
