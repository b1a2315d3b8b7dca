// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
)

// StorageConf are the places where runtimes on this machine list image stores:
// containers-storage.conf(5), with the directories that containers/storage 1.64
// and newer read beside it, and crio.conf(5).
func StorageConf() []string {
	return []string{
		"/etc/containers/storage.conf", "/etc/containers/storage.*conf.d/*.conf",
		"/usr/share/containers/storage.conf", "/usr/share/containers/storage.*conf.d/*.conf",
		"/etc/crio/crio.conf", "/etc/crio/crio.conf.d/*",
	}
}

// unlisted is an error if one of the files names the store, or if one cannot be
// read.
func unlisted(patterns []string, store string) error {
	var refusals error
	for _, pattern := range patterns {
		names, err := filepath.Glob(pattern)
		if err != nil {
			return fmt.Errorf("looking for %s: %w", pattern, err)
		}
		for _, name := range names {
			var settings map[string]any
			_, err := toml.DecodeFile(name, &settings)
			switch {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				refusals = errors.Join(refusals, fmt.Errorf("finding out whether %s lists the store: %w", name, err))
			case mentions(settings, store):
				refusals = errors.Join(refusals, fmt.Errorf(
					"%s lists %s, and without a store that is listed runtimes do not start: take it out first, and restart CRI-O if it runs", name, store))
			}
		}
	}
	return refusals
}

// mentions reports whether a path is, or is in, one of the settings: as it is in
// additionalimagestores, or in an option such as overlay.imagestore=PATH,PATH.
func mentions(setting any, path string) bool {
	in := func(v any) bool { return mentions(v, path) }
	switch v := setting.(type) {
	case map[string]any:
		for _, inner := range v {
			if in(inner) {
				return true
			}
		}
	case []map[string]any:
		return slices.ContainsFunc(v, func(m map[string]any) bool { return in(m) })
	case []any:
		return slices.ContainsFunc(v, in)
	case string:
		_, value, _ := strings.Cut(v, "=")
		parts := append(strings.Split(value, ","), v, value)
		return slices.ContainsFunc(parts, func(p string) bool { return samePath(strings.TrimSpace(p), path) })
	}
	return false
}

// samePath reports whether two paths lead to the same place, also through links.
func samePath(a, b string) bool {
	if filepath.Clean(a) == filepath.Clean(b) {
		return true
	}
	if !filepath.IsAbs(a) {
		return false
	}
	infoA, errA := os.Stat(a)
	infoB, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}
