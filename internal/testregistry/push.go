// SPDX-License-Identifier: Apache-2.0

package testregistry

import (
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
)

const (
	maxPushedBlob     = 256 << 20
	maxPushedManifest = 4 << 20
)

// uploads are those that have begun, by their ids.
type uploads struct {
	mu   sync.Mutex        // protects the fields below
	open map[string]string // the repository
}

func (u *uploads) init() { u.open = make(map[string]string) }

func isPush(r *http.Request) bool { return r.Method != http.MethodGet && r.Method != http.MethodHead }

// servePush takes what is pushed in the simplest way: a blob by POST and PUT, a
// manifest by PUT. See
// https://github.com/opencontainers/distribution-spec/blob/main/spec.md#push.
func (s *Server) servePush(w http.ResponseWriter, r *http.Request, repository, kind, ref string) {
	switch {
	case s.opts.Push == PushNever:
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
	case s.opts.Push == PushDenied: // what tokens are good for has been checked before
		fail(w, http.StatusForbidden, "DENIED", "requested access to the resource is denied")
	case kind == "uploads" && r.Method == http.MethodPost && ref == "":
		s.beginUpload(w, repository)
	case kind == "uploads" && r.Method == http.MethodPut:
		s.endUpload(w, r, repository, ref)
	case kind == "manifests" && r.Method == http.MethodPut:
		s.putManifest(w, r, repository, ref)
	default:
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this cannot be changed")
	}
}

// beginUpload tells where to go on, in one of the forms that the specification
// allows. What the query says has to come back.
func (s *Server) beginUpload(w http.ResponseWriter, repository string) {
	id := hex.EncodeToString(random())
	s.uploads.mu.Lock()
	s.uploads.open[id] = repository
	s.uploads.mu.Unlock()
	location := "/v2/" + repository + "/blobs/uploads/" + id + "?_state=" + id
	if s.opts.Manner != Plain {
		location = s.URL() + location
	}
	w.Header().Set("Location", location)
	w.WriteHeader(http.StatusAccepted)
}

func (s *Server) endUpload(w http.ResponseWriter, r *http.Request, repository, id string) {
	s.uploads.mu.Lock()
	known := s.uploads.open[id] == repository && r.URL.Query().Get("_state") == id
	s.uploads.mu.Unlock()
	if !known {
		fail(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry")
		return
	}
	body, ok := readPushed(w, r, maxPushedBlob)
	if !ok {
		return
	}
	d := digest.Digest(r.URL.Query().Get("digest"))
	if d != digest.FromBytes(body) {
		fail(w, http.StatusBadRequest, "DIGEST_INVALID", "provided digest did not match uploaded content")
		return
	}
	s.uploads.mu.Lock()
	delete(s.uploads.open, id)
	s.uploads.mu.Unlock()
	s.AddBlob(body)
	created(w, "/v2/"+repository+"/blobs/", d)
}

func (s *Server) putManifest(w http.ResponseWriter, r *http.Request, repository, ref string) {
	body, ok := readPushed(w, r, maxPushedManifest)
	if !ok {
		return
	}
	var doc struct {
		Config  struct{ Digest digest.Digest }
		Layers  []struct{ Digest digest.Digest }
		Subject struct{ Digest digest.Digest }
	}
	mediaType := r.Header.Get("Content-Type")
	if json.Unmarshal(body, &doc) != nil || mediaType == "" {
		fail(w, http.StatusBadRequest, "MANIFEST_INVALID", "manifest invalid")
		return
	}
	for _, b := range append(doc.Layers, doc.Config) {
		if b.Digest != "" && !s.content.hasBlob(b.Digest) {
			fail(w, http.StatusBadRequest, "MANIFEST_BLOB_UNKNOWN", "blob unknown to registry: "+b.Digest.String())
			return
		}
	}
	tag := ref
	if strings.Contains(ref, ":") {
		tag = ""
		if digest.Digest(ref) != digest.FromBytes(body) {
			fail(w, http.StatusBadRequest, "DIGEST_INVALID", "provided digest did not match uploaded content")
			return
		}
	}
	d := s.AddManifest(repository, tag, mediaType, body)
	if doc.Subject.Digest != "" && !s.opts.NoReferrers {
		w.Header().Set("OCI-Subject", doc.Subject.Digest.String())
	}
	created(w, "/v2/"+repository+"/manifests/", d)
}

// readPushed reads the body of a request; if it cannot, it has answered.
func readPushed(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, bool) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		fail(w, http.StatusBadRequest, "SIZE_INVALID", "reading what was pushed")
		return nil, false
	}
	return body, true
}

func created(w http.ResponseWriter, path string, d digest.Digest) {
	w.Header().Set("Location", path+d.String())
	w.Header().Set("Docker-Content-Digest", d.String())
	w.WriteHeader(http.StatusCreated)
}
