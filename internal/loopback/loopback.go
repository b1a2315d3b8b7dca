// SPDX-License-Identifier: Apache-2.0

// Package loopback is a read-only registry for the runtimes of this machine: what lies
// in attached OCI layouts can be pulled from it, so that pulls need no network. See
// github.com/opencontainers/distribution-spec, spec.md.
//
// A repository is called by its full name here, with its registry in front, in which a
// colon has become an underscore: see [Escape].
//
// It listens on loopback only. Whatever it serves, every user of the machine can read.
// Nothing can be changed through it.
package loopback

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/net/netutil"

	"github.com/holdfast/holdfast/internal/blob"
)

// Content is what is served. Repositories have their full names.
type Content interface {
	// Manifest reads one by tag or digest; [blob.ErrNotFound] if there is none.
	Manifest(ctx context.Context, repository, tagOrDigest string) (blob.Manifest, error)
	// Blob finds a blob, and a source to read it from.
	Blob(ctx context.Context, repository string, d digest.Digest) (blob.Descriptor, blob.Source, error)
	// Tags returns the tags of a repository, sorted; [blob.ErrNotFound] if it is unknown.
	Tags(ctx context.Context, repository string) ([]string, error)
	// Referrers returns the manifests that refer to another.
	Referrers(ctx context.Context, repository string, subject digest.Digest) ([]v1.Descriptor, error)
}

const (
	maxConnections = 256
	headerTimeout  = 10 * time.Second
	idleTimeout    = 2 * time.Minute
	// stallTimeout is how long a source may keep a client waiting: a client that gets
	// nothing waits without end, one that gets an error goes on to the next place.
	stallTimeout = 30 * time.Second
	endTimeout   = 2 * time.Second
)

// Escape returns the name that a repository has in this registry; not ok if it cannot
// have one. No domain has an underscore, so it can be undone.
func Escape(repository string) (escaped string, ok bool) {
	domain, path, ok := strings.Cut(repository, "/")
	if !ok || strings.ContainsAny(domain, "_[]") || domain != strings.ToLower(domain) {
		return "", false
	}
	return strings.Replace(domain, ":", "_", 1) + "/" + path, true
}

// Unescape undoes [Escape], also of what follows a name.
func Unescape(escaped string) string {
	domain, path, ok := strings.Cut(escaped, "/")
	if !ok {
		return escaped
	}
	return strings.Replace(domain, "_", ":", 1) + "/" + path
}

// Listen listens on an address of the loopback device; on any other it refuses to.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().IsLoopback() {
		return nil, fmt.Errorf("listening on %q: want an address of the loopback device with a port, such as 127.0.0.1:5117", address)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serving attached images: %w", err)
	}
	return netutil.LimitListener(l, maxConnections), nil
}

// Serve answers requests until ctx ends.
func Serve(ctx context.Context, l net.Listener, content Content, log *slog.Logger) error {
	s := &server{content, log}
	srv := &http.Server{
		Handler:           http.HandlerFunc(s.serve),
		ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close()
		}
	})
	err := srv.Serve(l)
	if !stop() {
		<-ended
	}
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving attached images: %w", err)
	}
	return nil
}

type server struct {
	content Content
	log     *slog.Logger
}

// failure is an error as the specification has it.
type failure struct {
	status int
	code   string
	text   string
}

func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if err := s.route(w, r); err != nil {
		f := explain(err)
		s.log.Debug("attached image is not served", "path", r.URL.Path, "err", err)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(f.status)
		type detail struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		}
		_ = json.NewEncoder(w).Encode(map[string][]detail{"errors": {{f.code, f.text}}}) // who left does not care
	}
}

var (
	errMethod = errors.New("this registry is read-only")
	errPath   = errors.New("no such path")
	errHost   = errors.New("this registry is for this machine only")
)

func explain(err error) failure {
	switch {
	case errors.Is(err, errMethod):
		return failure{http.StatusMethodNotAllowed, "UNSUPPORTED", err.Error()}
	case errors.Is(err, errHost):
		return failure{http.StatusForbidden, "DENIED", err.Error()}
	case errors.Is(err, errPath), errors.Is(err, blob.ErrNotFound):
		return failure{http.StatusNotFound, "MANIFEST_UNKNOWN", err.Error()}
	}
	return failure{http.StatusServiceUnavailable, "UNAVAILABLE", err.Error()}
}

// isHere reports whether a client has asked for this machine: not some other name that
// somebody has let lead here.
func isHere(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && addr.IsLoopback()
}

func (s *server) route(w http.ResponseWriter, r *http.Request) error {
	if !isHere(r.Host) {
		return errHost
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return errMethod
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	switch {
	case r.URL.Path == "/v2" || ok && path == "":
		return write(w, r, "application/json", []byte("{}"))
	case !ok:
		return errPath
	}
	parts := strings.Split(path, "/")
	if len(parts) < 4 {
		return errPath
	}
	repository := Unescape(strings.Join(parts[:len(parts)-2], "/"))
	switch what, ref := parts[len(parts)-2], parts[len(parts)-1]; what {
	case "manifests":
		return s.manifest(w, r, repository, ref)
	case "blobs":
		return s.blob(w, r, repository, ref)
	case "tags":
		if ref == "list" {
			return s.tags(w, r, repository)
		}
	case "referrers":
		return s.referrers(w, r, repository, ref)
	}
	return errPath
}

// write answers with a document.
func write(w http.ResponseWriter, r *http.Request, mediaType string, body []byte) error {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(body) // who left does not care
	}
	return nil
}

func (s *server) manifest(w http.ResponseWriter, r *http.Request, repository, ref string) error {
	m, err := s.content.Manifest(r.Context(), repository, ref)
	if err != nil {
		return err
	}
	w.Header().Set("Docker-Content-Digest", m.Digest.String())
	w.Header().Set("ETag", `"`+m.Digest.String()+`"`)
	return write(w, r, m.MediaType, m.Body)
}

func (s *server) tags(w http.ResponseWriter, r *http.Request, repository string) error {
	tags, err := s.content.Tags(r.Context(), repository)
	if err != nil {
		return err
	}
	if last := r.URL.Query().Get("last"); last != "" {
		for len(tags) > 0 && tags[0] <= last {
			tags = tags[1:]
		}
	}
	if n, err := strconv.Atoi(r.URL.Query().Get("n")); err == nil && n >= 0 && n < len(tags) {
		tags = tags[:n]
		if n > 0 {
			w.Header().Set("Link", fmt.Sprintf(`<%s?n=%d&last=%s>; rel="next"`, r.URL.EscapedPath(), n, tags[n-1]))
		}
	}
	escaped, _ := Escape(repository)
	body, err := json.Marshal(struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{escaped, tags})
	if err != nil {
		return err
	}
	return write(w, r, "application/json", body)
}

func (s *server) referrers(w http.ResponseWriter, r *http.Request, repository, ref string) error {
	subject, err := digest.Parse(ref)
	if err != nil {
		return fmt.Errorf("digest %q: %w", ref, errPath)
	}
	all, err := s.content.Referrers(r.Context(), repository, subject)
	if err != nil {
		return err
	}
	list := []v1.Descriptor{}
	kind := r.URL.Query().Get("artifactType")
	for _, d := range all {
		if kind == "" || d.ArtifactType == kind {
			list = append(list, d)
		}
	}
	if kind != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	body, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: list})
	if err != nil {
		return err
	}
	return write(w, r, v1.MediaTypeImageIndex, body)
}

// blob sends a blob or a range of it. The client verifies it.
func (s *server) blob(w http.ResponseWriter, r *http.Request, repository, ref string) error {
	d, err := digest.Parse(ref)
	if err != nil {
		return fmt.Errorf("digest %q: %w", ref, errPath)
	}
	desc, src, err := s.content.Blob(r.Context(), repository, d)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Docker-Content-Digest", d.String())
	h.Set("ETag", `"`+d.String()+`"`)
	h.Set("Accept-Ranges", "bytes")
	h.Set("Content-Type", "application/octet-stream")
	want, status := blob.Range{Length: desc.Size}, http.StatusOK
	if text := r.Header.Get("Range"); text != "" {
		part, ok := parseRange(text, desc.Size)
		if !ok {
			h.Set("Content-Range", fmt.Sprintf("bytes */%d", desc.Size))
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return nil
		}
		want, status = part, http.StatusPartialContent
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", part.Offset, part.End()-1, desc.Size))
	}
	var body io.ReadCloser
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	stalled := time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	defer stalled.Stop()
	if r.Method == http.MethodGet {
		if body, err = src.Open(ctx, desc, want.Offset, want.Length); err != nil {
			return err
		}
		defer body.Close() //nolint:errcheck // read only; a broken stream shows in Read
	}
	h.Set("Content-Length", strconv.FormatInt(want.Length, 10))
	w.WriteHeader(status)
	if body == nil {
		return nil
	}
	stalled.Stop()
	if _, err := io.CopyN(w, &impatient{body, stalled}, want.Length); err != nil {
		// An answer that ends early must not look whole.
		panic(http.ErrAbortHandler)
	}
	return nil
}

var errStalled = fmt.Errorf("the source has sent nothing for %s", stallTimeout)

// impatient has a timer run while it reads, not while the client takes its time.
type impatient struct {
	io.Reader
	stalled *time.Timer
}

func (i *impatient) Read(b []byte) (int, error) {
	i.stalled.Reset(stallTimeout)
	defer i.stalled.Stop()
	return i.Reader.Read(b)
}

// parseRange reads the one range that a client asks for; of several, or of what is no
// range at all, it is not ok.
func parseRange(text string, size int64) (blob.Range, bool) {
	spec, ok := strings.CutPrefix(text, "bytes=")
	first, last, dash := strings.Cut(spec, "-")
	if !ok || !dash || strings.Contains(last, ",") {
		return blob.Range{}, false
	}
	if first == "" { // the last bytes
		n, err := strconv.ParseInt(last, 10, 64)
		if err != nil || n <= 0 || size == 0 {
			return blob.Range{}, false
		}
		n = min(n, size)
		return blob.Range{Offset: size - n, Length: n}, true
	}
	from, err := strconv.ParseInt(first, 10, 64)
	if err != nil || from < 0 || from >= size {
		return blob.Range{}, false
	}
	to := size - 1
	if last != "" {
		if to, err = strconv.ParseInt(last, 10, 64); err != nil || to < from {
			return blob.Range{}, false
		}
		to = min(to, size-1)
	}
	return blob.Range{Offset: from, Length: to - from + 1}, true
}
