// SPDX-License-Identifier: Apache-2.0

package sources

import (
	"fmt"
	"path/filepath"
	"strings"

	"go.podman.io/image/v5/docker/reference"
)

// Place is a place where images are looked for, as the configuration names it:
//
//	registry            the registry of the image itself, after the mirrors that registries.conf has for it
//	docker://HOST/PATH  another registry: registry.example.com/team/app is HOST/PATH/team/app there
//	/PATH, oci:/PATH, oci-archive:/PATH    an OCI layout, a directory or an uncompressed archive
type Place string

// Registry is the registry of the image itself.
const Registry Place = "registry"

const dockerPrefix = "docker://"

// UnmarshalText reads and checks a place.
func (p *Place) UnmarshalText(text []byte) error {
	*p = Place(text)
	return p.validate()
}

func (p Place) validate() error {
	if p == Registry {
		return nil
	}
	if path, ok := p.Path(); ok {
		if filepath.IsAbs(path) && path == filepath.Clean(path) {
			return nil
		}
		return fmt.Errorf("source %q: want an absolute path without . or .. segments", p)
	}
	if name, ok := strings.CutPrefix(string(p), dockerPrefix); ok {
		if named, err := reference.ParseNormalizedNamed(name + "/x"); err == nil && named.Name() == name+"/x" {
			return nil
		}
	}
	return fmt.Errorf(`source %q: want "registry", docker://HOST[/PATH], or the path of an OCI layout or of an archive of one`, p)
}

// Path is where the place's OCI layout is; not ok if it is a registry.
func (p Place) Path() (path string, ok bool) {
	for _, prefix := range []string{"oci:", "oci-archive:"} {
		if path, ok := strings.CutPrefix(string(p), prefix); ok {
			return path, true
		}
	}
	return string(p), strings.HasPrefix(string(p), "/")
}

// in is what an image is called in a registry that holds those of others.
func (p Place) in(ref reference.Named) (reference.Named, error) {
	host := strings.TrimPrefix(string(p), dockerPrefix)
	named, err := reference.WithName(host + "/" + reference.Path(ref))
	if err != nil {
		return nil, fmt.Errorf("source %s has no %s: %w", p, ref, err)
	}
	if d, ok := ref.(reference.Digested); ok {
		return reference.WithDigest(named, d.Digest())
	}
	if t, ok := ref.(reference.Tagged); ok {
		return reference.WithTag(named, t.Tag())
	}
	return reference.TagNameOnly(named), nil
}
