// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"net"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/holdfast/holdfast/internal/blob/registry"
)

// matches reports whether a pattern as kubelet has them, HOST[:PORT][/PATH],
// names an image: * and ? in each label of the host, which has as many as the
// image's, the same port, and the beginning of the path. See URLsMatch in
// https://github.com/kubernetes/kubernetes/blob/master/pkg/credentialprovider/keyring.go.
func matches(pattern, image string) bool {
	p, err1 := url.Parse("https://" + pattern)
	i, err2 := url.Parse("https://" + image)
	if err1 != nil || err2 != nil || !strings.HasPrefix(i.Path, p.Path) {
		return false
	}
	globs, globPort := splitHost(p.Host)
	labels, port := splitHost(i.Host)
	if globPort != port || len(globs) != len(labels) {
		return false
	}
	for n, glob := range globs {
		if ok, err := path.Match(glob, labels[n]); err != nil || !ok {
			return false
		}
	}
	return true
}

func splitHost(hostport string) (labels []string, port string) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		host, port = hostport, ""
	}
	return strings.Split(host, "."), port
}

// auths are credentials by the pattern of the images they are for.
type auths map[string]registry.Credentials

// pick returns the credentials of the longest pattern that names an image, and
// that have not been refused.
func (a auths) pick(image string, refused []registry.Credentials) registry.Credentials {
	var best registry.Credentials
	var of string
	for key, c := range a {
		pattern := normalize(key)
		if c == (registry.Credentials{}) || slices.Contains(refused, c) || !matches(pattern, image) {
			continue
		}
		// Two of the same length are rare; but the choice must not be random.
		if len(pattern) > len(of) || len(pattern) == len(of) && pattern < of {
			best, of = c, pattern
		}
	}
	return best
}

// normalize makes a pattern of a key in a Docker configuration, which may be a
// URL of the registry's API.
func normalize(key string) string {
	key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	host, rest, found := strings.Cut(key, "/")
	if host == "index.docker.io" || host == "registry-1.docker.io" {
		host = "docker.io"
	}
	for _, version := range []string{"v1", "v2"} {
		if rest == version {
			rest = ""
		}
		rest = strings.TrimPrefix(rest, version+"/")
	}
	if !found || rest == "" {
		return host
	}
	return host + "/" + rest
}
