// SPDX-License-Identifier: Apache-2.0

// Package credentials finds what lets a node read from registries when no pull
// is under way.
//
// [Node] is what the node itself has: files such as those of podman login and of
// kubelet, and kubelet's credential provider plugins. All of it is read anew
// whenever it is asked for, so that what is rotated counts at once. [Kept] is
// what pulls brought, in memory, for the next process of the daemon.
//
// It neither talks to registries nor decides what is shown to them; package
// registry does. No credentials of it reach a disk, a log, an error or the
// arguments of a program.
package credentials

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"go.podman.io/image/v5/docker/reference"
	dockerconfig "go.podman.io/image/v5/pkg/docker/config"
	"go.podman.io/image/v5/types"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/shared"
)

// Config says where a node's own credentials are.
type Config struct {
	// AuthFile replaces the places where podman login puts credentials.
	AuthFile string
	// AuthFiles are asked next, in this order: files in the format of Docker and
	// kubelet. One that does not exist is an empty one.
	AuthFiles []string
	// RegistriesConf and RegistriesConfDir replace the system's; they may name
	// credential helpers.
	RegistriesConf, RegistriesConfDir string
	// ProviderConfig and ProviderDir are kubelet's --image-credential-provider-config
	// and --image-credential-provider-bin-dir, which are asked last. Empty: none.
	ProviderConfig, ProviderDir string
}

// Node finds the node's own credentials. It may be used by several goroutines at
// once.
type Node struct {
	files     []authFile
	providers *providers // nil: none
	lookups   shared.Calls[registry.Credentials]
}

// authFile is one place to look in.
type authFile struct {
	place  string // as people call it
	name   string // "" if that depends
	system *types.SystemContext
}

// NewNode returns a Node. Nothing is read before it is asked.
func NewNode(c Config) *Node {
	own := authFile{place: "the files of podman login", name: c.AuthFile, system: &types.SystemContext{
		AuthFilePath: c.AuthFile, SystemRegistriesConfPath: c.RegistriesConf, SystemRegistriesConfDirPath: c.RegistriesConfDir,
	}}
	if c.AuthFile != "" {
		own.place = c.AuthFile
	}
	n := &Node{files: []authFile{own}}
	for _, name := range c.AuthFiles {
		n.files = append(n.files, authFile{place: name, name: name, system: &types.SystemContext{
			// The helpers of registries.conf have been asked already.
			AuthFilePath: name, SystemRegistriesConfPath: os.DevNull, SystemRegistriesConfDirPath: "/nonexistent",
		}})
	}
	if c.ProviderConfig != "" {
		n.providers = &providers{config: c.ProviderConfig, dir: c.ProviderDir}
	}
	return n
}

// Find returns credentials for a repository ("host/path"), the first that are
// not among those that its registry has refused; the zero value if there are
// none. A place that cannot be read does not hide the others: there is an error
// only if nothing is found. It is a blob.TemporaryError if a provider failed.
func (n *Node) Find(ctx context.Context, repository string, refused []registry.Credentials) (registry.Credentials, error) {
	ref, err := reference.ParseNormalizedNamed(repository)
	if err != nil {
		return registry.Credentials{}, fmt.Errorf("finding credentials for %q: %w", repository, err)
	}
	var failed error
	for _, f := range n.files {
		c, err := n.lookUp(ctx, f, ref)
		if ctx.Err() != nil {
			return registry.Credentials{}, context.Cause(ctx)
		}
		if err == nil && c != (registry.Credentials{}) && !slices.Contains(refused, c) {
			return c, nil
		}
		failed = both(failed, err)
	}
	if n.providers != nil {
		c, err := n.providers.find(ctx, ref.Name(), refused)
		if c != (registry.Credentials{}) {
			return c, nil
		}
		failed = both(failed, err)
	}
	return registry.Credentials{}, failed
}

// both is errors.Join on one line.
func both(a, b error) error {
	if a == nil || b == nil {
		return errors.Join(a, b)
	}
	return fmt.Errorf("%w; %w", a, b)
}

// lookUp looks into one file. The library takes no context, and a credential
// helper that the file names may hang; those who wait for it can leave.
func (n *Node) lookUp(ctx context.Context, f authFile, ref reference.Named) (registry.Credentials, error) {
	return n.lookups.Do(ctx, f.place+" "+ref.Name(), func(context.Context) (registry.Credentials, error) {
		c, err := dockerconfig.GetCredentialsForRef(f.system, ref)
		if err != nil {
			return registry.Credentials{}, fmt.Errorf("looking into %s: %s", f.place, strings.Join(strings.Fields(err.Error()), " "))
		}
		return registry.Credentials{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken}, nil
	})
}

// Places says where Find looks for a repository, for people.
func (n *Node) Places(repository string) []string {
	var places []string
	for _, f := range n.files {
		place := f.place
		if _, err := os.Stat(f.name); f.name != "" && errors.Is(err, fs.ErrNotExist) {
			place += " (does not exist)"
		}
		places = append(places, place)
	}
	if n.providers == nil {
		return append(places, "no credential providers are configured")
	}
	return append(places, n.providers.places(repository)...)
}
