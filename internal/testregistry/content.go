// SPDX-License-Identifier: Apache-2.0

package testregistry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
)

// content is what the registry holds. Blobs belong to every repository.
type content struct {
	mu        sync.RWMutex // protects the fields below
	blobs     map[digest.Digest]storedBlob
	manifests map[string]map[string]manifest // by repository, then by tag and by digest
}

type storedBlob struct {
	data []byte
	path string // of the file that holds the blob, instead of data
}

type manifest struct {
	mediaType string
	digest    digest.Digest
	body      []byte
}

func (c *content) init() {
	c.blobs = make(map[digest.Digest]storedBlob)
	c.manifests = make(map[string]map[string]manifest)
}

// AddBlob adds a blob to all repositories. The bytes must not change afterwards.
func (s *Server) AddBlob(b []byte) digest.Digest {
	d := digest.FromBytes(b)
	s.addBlob(d, storedBlob{data: b})
	return d
}

// AddBlobFile adds the content of a file as a blob to all repositories. The file
// is opened by every request that reads it; its digest is taken on trust, so
// that a wrong one can be tested too.
func (s *Server) AddBlobFile(path string, d digest.Digest, size int64) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Size() != size {
		return fmt.Errorf("adding blob %s: %s is not a file of %d bytes", d, path, size)
	}
	s.addBlob(d, storedBlob{path: path})
	return nil
}

// AddBlobAs adds bytes under a digest that need not be theirs.
func (s *Server) AddBlobAs(d digest.Digest, b []byte) { s.addBlob(d, storedBlob{data: b}) }

func (s *Server) addBlob(d digest.Digest, b storedBlob) {
	s.content.mu.Lock()
	defer s.content.mu.Unlock()
	s.content.blobs[d] = b
}

// RemoveBlob makes the registry forget a blob.
func (s *Server) RemoveBlob(d digest.Digest) {
	s.content.mu.Lock()
	defer s.content.mu.Unlock()
	delete(s.content.blobs, d)
}

// AddManifest adds a manifest or an index to a repository, under its digest
// and, if tag is not empty, under the tag.
func (s *Server) AddManifest(repository, tag, mediaType string, body []byte) digest.Digest {
	m := manifest{mediaType: mediaType, digest: digest.FromBytes(body), body: body}
	c := &s.content
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.manifests[repository] == nil {
		c.manifests[repository] = make(map[string]manifest)
	}
	c.manifests[repository][m.digest.String()] = m
	if tag != "" {
		c.manifests[repository][tag] = m
	}
	return m.digest
}

func (c *content) manifest(repository, ref string) (manifest, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	m, ok := c.manifests[repository][ref]
	return m, ok
}

func (c *content) tags(repository string) []string {
	c.mu.RLock()
	defer c.mu.RUnlock()
	tags := []string{}
	for ref := range c.manifests[repository] {
		if !strings.Contains(ref, ":") {
			tags = append(tags, ref)
		}
	}
	slices.Sort(tags)
	return tags
}

// repositories lists those that have a manifest, sorted.
func (c *content) repositories() []string {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return slices.Sorted(maps.Keys(c.manifests))
}

// referrer is a descriptor in the answer of the referrers API.
type referrer struct {
	MediaType    string            `json:"mediaType"`
	Digest       digest.Digest     `json:"digest"`
	Size         int               `json:"size"`
	ArtifactType string            `json:"artifactType,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

// referrers lists the manifests of a repository whose subject is d.
func (c *content) referrers(repository string, d digest.Digest) []referrer {
	c.mu.RLock()
	defer c.mu.RUnlock()
	list := []referrer{}
	for ref, m := range c.manifests[repository] {
		var doc struct {
			ArtifactType string `json:"artifactType"`
			Config       struct {
				MediaType string `json:"mediaType"`
			} `json:"config"`
			Subject struct {
				Digest digest.Digest `json:"digest"`
			} `json:"subject"`
			Annotations map[string]string `json:"annotations"`
		}
		if ref != m.digest.String() || json.Unmarshal(m.body, &doc) != nil || doc.Subject.Digest != d {
			continue
		}
		if doc.ArtifactType == "" {
			doc.ArtifactType = doc.Config.MediaType
		}
		list = append(list, referrer{m.mediaType, m.digest, len(m.body), doc.ArtifactType, doc.Annotations})
	}
	slices.SortFunc(list, func(a, b referrer) int { return strings.Compare(a.Digest.String(), b.Digest.String()) })
	return list
}

func (c *content) hasBlob(d digest.Digest) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	_, ok := c.blobs[d]
	return ok
}

// open opens a blob; the caller closes it.
func (c *content) open(d digest.Digest) (io.ReadSeekCloser, error) {
	c.mu.RLock()
	b, ok := c.blobs[d]
	c.mu.RUnlock()
	switch {
	case !ok:
		return nil, os.ErrNotExist
	case b.path != "":
		return os.Open(b.path)
	default:
		return nopCloser{bytes.NewReader(b.data)}, nil
	}
}

type nopCloser struct{ io.ReadSeeker }

func (nopCloser) Close() error { return nil }
