// SPDX-License-Identifier: Apache-2.0

package testregistry

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// serveRegistry is the registry itself: https://github.com/opencontainers/distribution-spec,
// as far as pulling and simple pushes go.
func (s *Server) serveRegistry(w http.ResponseWriter, r *http.Request) {
	if s.traits.bearer && !s.traits.tokenHost && r.URL.Path == s.traits.tokenPath {
		s.serveToken(w, r)
		return
	}
	w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
	repository, kind, ref := split(r.URL.Path)
	if kind == "" {
		http.NotFound(w, r)
		return
	}
	if !s.allow(w, r, repository) {
		return
	}
	if isPush(r) {
		s.servePush(w, r, repository, kind, ref)
		return
	}
	switch kind {
	case "ping":
		writeJSON(w, "application/json", struct{}{})
	case "manifests":
		s.serveManifest(w, r, repository, ref)
	case "blobs":
		s.serveBlobs(w, r, digest.Digest(ref))
	case "referrers":
		if s.opts.NoReferrers {
			http.NotFound(w, r)
			return
		}
		writeJSON(w, "application/vnd.oci.image.index.v1+json", map[string]any{
			"schemaVersion": 2,
			"mediaType":     "application/vnd.oci.image.index.v1+json",
			"manifests":     s.content.referrers(repository, digest.Digest(ref)),
		})
	case "tags":
		writeJSON(w, "application/json", map[string]any{"name": repository, "tags": page(r, s.content.tags(repository))})
	case "catalog":
		writeJSON(w, "application/json", map[string]any{"repositories": page(r, s.content.repositories())})
	}
}

// page is the part of a sorted list that a request asks for.
func page(r *http.Request, all []string) []string {
	if last := r.URL.Query().Get("last"); last != "" {
		at, _ := slices.BinarySearch(all, last+"\x00")
		all = all[at:]
	}
	if n, err := strconv.Atoi(r.URL.Query().Get("n")); err == nil && n < len(all) {
		all = all[:n]
	}
	return all
}

// split takes a path of the API apart; kind is empty if it is none.
func split(path string) (repository, kind, ref string) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return "", "", ""
	}
	if rest == "" {
		return "", "ping", ""
	}
	if rest == "_catalog" {
		return "", "catalog", ""
	}
	if repository, id, ok := strings.Cut(rest, "/blobs/uploads/"); ok {
		return repository, "uploads", id
	}
	parts := strings.Split(rest, "/")
	n := len(parts)
	if n < 3 {
		return "", "", ""
	}
	switch kind := parts[n-2]; kind {
	case "manifests", "blobs", "referrers", "tags":
		return strings.Join(parts[:n-2], "/"), kind, parts[n-1]
	default:
		return "", "", ""
	}
}

func (s *Server) serveManifest(w http.ResponseWriter, r *http.Request, repository, ref string) {
	if r.Method == http.MethodGet && s.opts.Manner == DockerHub && s.opts.ManifestLimit > 0 {
		if s.counters.limited.Add(1) > s.opts.ManifestLimit {
			w.Header().Set("Retry-After", strconv.Itoa(int(s.opts.RetryAfter/time.Second)))
			fail(w, http.StatusTooManyRequests, "TOOMANYREQUESTS", "You have reached your pull rate limit.")
			return
		}
	}
	m, ok := s.content.manifest(repository, ref)
	if !ok {
		fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown")
		return
	}
	w.Header().Set("Content-Type", m.mediaType)
	w.Header().Set("Docker-Content-Digest", m.digest.String())
	w.Header().Set("Content-Length", strconv.Itoa(len(m.body)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(m.body) // the client may have gone
	}
}

func (s *Server) serveBlobs(w http.ResponseWriter, r *http.Request, d digest.Digest) {
	if !s.content.hasBlob(d) {
		fail(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown to registry")
		return
	}
	w.Header().Set("Docker-Content-Digest", d.String())
	if s.traits.redirect && r.Method == http.MethodGet {
		http.Redirect(w, r, s.sign(d.String()), s.traits.status)
		return
	}
	s.sendBlob(w, r, d)
}

// serveStorage is the object store that blobs are redirected to. Like S3 it
// refuses requests that bring other credentials than the signature.
func (s *Server) serveStorage(w http.ResponseWriter, r *http.Request) {
	name, ok := strings.CutPrefix(r.URL.Path, "/store/")
	switch {
	case !ok:
		http.NotFound(w, r)
	case r.Header.Get("Authorization") != "":
		storageError(w, http.StatusBadRequest, "InvalidArgument")
	case r.Method != http.MethodGet || !s.signed(name, r.URL.Query()):
		storageError(w, http.StatusForbidden, "AccessDenied")
	default:
		s.sendBlob(w, r, digest.Digest(name))
	}
}

// sendBlob sends a blob or a range of it.
func (s *Server) sendBlob(w http.ResponseWriter, r *http.Request, d digest.Digest) {
	f, err := s.content.open(d)
	if err != nil {
		storageError(w, http.StatusNotFound, "NoSuchKey")
		return
	}
	defer f.Close() //nolint:errcheck // read only
	w.Header().Set("Content-Type", "application/octet-stream")
	if r.Method == http.MethodGet {
		w = s.counters.blob(w, d)
	}
	http.ServeContent(w, r, "", time.Time{}, f)
}

func writeJSON(w http.ResponseWriter, mediaType string, v any) {
	w.Header().Set("Content-Type", mediaType)
	_ = json.NewEncoder(w).Encode(v) // the client may have gone
}

// fail answers with an error as the distribution specification has it.
func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{
		"errors": []any{map[string]string{"code": code, "message": message}},
	})
}

// storageError answers with an error as S3 does.
func storageError(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	_, _ = w.Write([]byte("<Error><Code>" + code + "</Code></Error>"))
}
