// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/holdfast/holdfast/internal/render"
)

const (
	crioConf       = "/etc/crio/crio.conf"
	registriesConf = "/etc/containers/registries.conf"
	registriesDir  = "/etc/containers/registries.conf.d"
)

// effective is what CRI-O would read if it started with some files in place of those
// on disk: digests of the settings that it keeps until it is restarted, and of those
// that it reads again when it is told to. Comments and the order of keys make
// no difference; a file that cannot be read as TOML counts as it is.
func (h host) effective(files map[string]*content) (config, registries string, err error) {
	read := func(p string) (*content, error) {
		if c, ours := files[p]; ours {
			return c, nil
		}
		return h.content(p)
	}
	storage, err := read(render.StorageConf)
	if storage == nil && err == nil {
		storage, err = read(render.VendorStorage)
	}
	if err != nil {
		return "", "", err
	}
	crio := map[string]any{}
	if err := h.overlayAll(crio, crioConf, render.CRIODropIns, "", files, read); err != nil {
		return "", "", err
	}
	regs := map[string]any{}
	if err := h.overlayAll(regs, registriesConf, registriesDir, ".conf", files, read); err != nil {
		return "", "", err
	}
	return digestTree(settings(storage), crio), digestTree(regs), nil
}

// overlayAll puts a file and then its drop-ins into tree, in the order in which
// runtimes read them: tables are merged, all else is replaced.
func (h host) overlayAll(tree map[string]any, main, dir, suffix string, files map[string]*content, read func(string) (*content, error)) error {
	names, err := h.dropIns(dir, suffix == "")
	if err != nil {
		return err
	}
	for p := range files {
		if filepath.Dir(p) == dir {
			names = append(names, p)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/")) })
	all := []string{main}
	for _, n := range slices.Compact(names) {
		if strings.HasSuffix(n, suffix) {
			all = append(all, n)
		}
	}
	for _, p := range all {
		c, err := read(p)
		if err != nil {
			return err
		}
		overlay(tree, settings(c))
	}
	return nil
}

// foreign is effective of all that is not among some files: what others configure.
func (h host) foreign(files map[string]*content) (string, error) {
	without := map[string]*content{}
	for p := range files {
		without[p] = nil
	}
	config, _, err := h.effective(without)
	return config, err
}

// unreadable returns a file of CRI-O's, but for some, that it would not start with.
func (h host) unreadable(files map[string]*content) (string, error) {
	names, err := h.dropIns(render.CRIODropIns, true)
	for _, p := range append(names, crioConf) {
		if _, ours := files[p]; ours || err != nil {
			continue
		}
		var c *content
		if c, err = h.content(p); err == nil && settings(c)[""] != nil {
			return p, nil
		}
	}
	return "", err
}

// dropIns are the files in a directory, and below it if a runtime looks there, too, as
// CRI-O does.
func (h host) dropIns(dir string, below bool) ([]string, error) {
	at, err := h.path(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	err = filepath.WalkDir(at, func(name string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case !d.IsDir():
			names = append(names, filepath.Join(dir, strings.TrimPrefix(name, at)))
		case name != at && !below:
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", dir, err)
	}
	return names, nil
}

// settings is a file's content as a tree.
func settings(c *content) map[string]any {
	tree := map[string]any{}
	if c == nil {
		return tree
	}
	if err := toml.Unmarshal([]byte(*c), &tree); err != nil {
		return map[string]any{"": string(*c)}
	}
	return tree
}

func overlay(tree, over map[string]any) {
	for k, v := range over {
		below, ok := tree[k].(map[string]any)
		if above, table := v.(map[string]any); ok && table {
			overlay(below, above)
			continue
		}
		tree[k] = v
	}
}

func digestTree(trees ...map[string]any) string {
	text, err := json.Marshal(trees) // sorts keys
	if err != nil {
		text = fmt.Appendf(nil, "%v", trees) // times that JSON does not have
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}
