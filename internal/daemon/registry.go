// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"log/slog"
	"path/filepath"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/credentials"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/sources"
)

// RegistryConfig takes registries and the node's own credentials from where CRI-O,
// Podman and kubelet have them.
func RegistryConfig(cfg config.Config, log *slog.Logger) registry.Config {
	node := credentials.NewNode(credentials.Config{
		AuthFile: cfg.AuthFile, AuthFiles: cfg.AuthFiles,
		RegistriesConf: cfg.RegistriesConf, RegistriesConfDir: cfg.RegistriesConfDir,
		ProviderConfig: cfg.CredentialProviderConfig, ProviderDir: cfg.CredentialProviderBinDir,
	})
	return registry.Config{
		RegistriesConf: cfg.RegistriesConf, RegistriesConfDir: cfg.RegistriesConfDir,
		UserAgent:   "holdfast/" + Version,
		Logger:      log,
		Credentials: node.Find,
		Places:      node.Places,
	}
}

// IndexConfig is where indexes are kept, looked for and published.
func IndexConfig(cfg config.Config, client *registry.Client, log *slog.Logger) indexes.Config {
	return indexes.Config{
		Own: filepath.Join(cfg.Root, "indexes"), Limit: indexes.OwnLimit,
		Look: cfg.Index.Stores, Publish: cfg.Index.Publish,
		Registry: client, Logger: log, Tool: "holdfast/" + Version,
	}
}

// sourcesConfig is where images are looked for.
func (d *Daemon) sourcesConfig() sources.Config {
	return sources.Config{
		Places: d.cfg.Sources, Trusted: d.cfg.TrustedSources, Pins: d.cfg.PinPath(), Offline: d.cfg.Offline,
		Registry: d.registry, Loopback: d.cfg.SourceRegistry,
	}
}
