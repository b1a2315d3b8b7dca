// SPDX-License-Identifier: Apache-2.0

package render

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/tomledit"
)

// Daemon is where the daemon of a node has its directories.
type Daemon struct {
	Root, RunRoot string
	Store         string // the image store that runtimes list
}

// DaemonPaths reads them from the node's configuration of the daemon. What it does
// not set is as in the daemon's default.toml.
func DaemonPaths(base Base) (Daemon, error) {
	d := Daemon{Root: "/var/lib/holdfast", RunRoot: "/run/holdfast"}
	text, err := base(DaemonConf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return d, fmt.Errorf("reading %s: %w", DaemonConf, err)
	}
	doc, err := tomledit.Parse(text)
	if err != nil {
		return d, fmt.Errorf("reading %s: %w", DaemonConf, err)
	}
	get := func(key string) string { s, _ := doc.Get(key).(string); return s }
	d.Root = cmp.Or(get("root"), d.Root)
	d.RunRoot = cmp.Or(get("runroot"), d.RunRoot)
	d.Store = cmp.Or(get("image_store"), filepath.Join(d.Root, "store"))
	return d, nil
}

// Own reports whether a layer store is Holdfast's: its root, or something in it.
func (d Daemon) Own(p apiv1.StorePath) bool {
	path := clean(p)
	return path == d.Root || path == d.Store || strings.HasPrefix(path, d.Root+"/")
}

// UsesDaemon reports whether a configuration needs the daemon.
func UsesDaemon(spec apiv1.ContainerRuntimeConfigSpec, d Daemon) bool {
	if spec.Holdfast != nil {
		return true
	}
	if spec.ContainerRuntimeConfig == nil {
		return false
	}
	for _, s := range spec.ContainerRuntimeConfig.AdditionalLayerStores {
		if d.Own(s.Path) {
			return true
		}
	}
	for _, s := range spec.ContainerRuntimeConfig.AdditionalArtifactStores {
		if s.Filter != nil {
			return true
		}
	}
	return false
}

// noDaemonConf is the daemon's configuration on a node that has none.
const noDaemonConf = `# Settings of the Holdfast daemon, written from a ContainerRuntimeConfig. What is
# not here has its default: see ` + "`holdfast config default`" + `.
`

// daemonConfig sets what the objects say, and leaves the rest to the node.
func (r *renderer) daemonConfig() error {
	d, err := r.document(DaemonConf)
	if err != nil {
		return err
	}
	set := func(value any, key ...string) {
		if err == nil {
			err = d.Set(value, key...)
		}
	}
	list := func(all []string, key ...string) {
		if len(all) > 0 {
			set(all, key...)
		}
	}
	if h := r.spec.Holdfast; h != nil {
		list(texts(h.Include), "include")
		list(texts(h.Exclude), "exclude")
		list(texts(h.Trusted), "trusted")
		list(h.Sources, "sources")
		list(h.TrustedSources, "trusted_sources")
		list(texts(h.Pinned), "pinned")
		list(texts(h.Artifacts), "artifacts")
		list(h.IndexStores, "index", "stores")
		list(h.IndexPublish, "index", "publish")
		if h.Offline != nil {
			set(*h.Offline, "offline")
		}
		for key, s := range map[string]apiv1.Share{"cache_limit": h.CacheLimit, "artifact_limit": h.ArtifactLimit} {
			if s != "" {
				value, bad := share(s)
				err = errors.Join(err, bad)
				set(value, key)
			}
		}
	}
	if stores := r.config.AdditionalArtifactStores; len(stores) > 0 {
		all := make([]any, len(stores))
		for i, s := range stores {
			all[i] = artifactStore(s)
		}
		set(all, "artifact_stores")
	}
	if err != nil {
		return fmt.Errorf("changing %s: %w", DaemonConf, err)
	}
	r.add(DaemonConf, d.Bytes())
	return nil
}

func artifactStore(s apiv1.AdditionalArtifactStore) map[string]any {
	store := map[string]any{"path": clean(s.Path)}
	if f := s.Filter; f != nil {
		filter := map[string]any{}
		if len(f.References) > 0 {
			filter["references"] = texts(f.References)
		}
		if len(f.Types) > 0 {
			filter["types"] = texts(f.Types)
		}
		if f.MaxSize != nil {
			filter["max_size"] = bytesText(*f.MaxSize)
		}
		store["filter"] = filter
	}
	return store
}

// share is a quantity or a percentage in the daemon's own spelling, whose units
// are all powers of 1024: so a quantity is written in bytes.
func share(s apiv1.Share) (string, error) {
	if strings.HasSuffix(string(s), "%") {
		return string(s), nil
	}
	q, err := resource.ParseQuantity(string(s))
	if err != nil {
		return "", fmt.Errorf("%q: %w", s, err)
	}
	return bytesText(q), nil
}

func bytesText(q resource.Quantity) string { return strconv.FormatInt(q.Value(), 10) + "B" }

func texts(patterns []apiv1.Pattern) []string {
	all := make([]string, len(patterns))
	for i, p := range patterns {
		all[i] = string(p)
	}
	return all
}
