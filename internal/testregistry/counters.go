// SPDX-License-Identifier: Apache-2.0

package testregistry

import (
	"io"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

// Counts is how many requests the server got, by what they asked for, and how
// many bytes of blobs it sent.
type Counts struct {
	Total int64
	// Ping is /v2/; Token the token service; Manifest and Blob the registry,
	// also when it answered with a redirect; Storage what redirects point to.
	Ping, Token, Manifest, Blob, Storage, Other int64
	// Upload is what begins or ends the upload of a blob; PutManifest, which
	// Manifest does not contain, is the uploads of manifests.
	Upload, PutManifest int64
	// Unauthorized is how many of them were answered with 401 or 403.
	Unauthorized int64
	// BlobBytes is how many bytes of blobs were handed to the network.
	BlobBytes int64
}

// Served is one range of a blob that the server answered a request with. A
// client that closes early may have got less.
type Served struct {
	Digest         digest.Digest
	Offset, Length int64
}

type counters struct {
	requests  atomic.Int64 // since the start: numbers the faults
	limited   atomic.Int64 // manifests that count towards the limit
	blobBytes atomic.Int64

	mu     sync.Mutex // protects the fields below
	counts Counts
	served []Served
}

// Counts returns the numbers since the start or the last ResetCounts.
func (s *Server) Counts() Counts {
	s.counters.mu.Lock()
	defer s.counters.mu.Unlock()
	c := s.counters.counts
	c.BlobBytes = s.counters.blobBytes.Load()
	return c
}

// Served returns the ranges sent since the start or the last ResetCounts, in
// the order in which they were asked for.
func (s *Server) Served() []Served {
	s.counters.mu.Lock()
	defer s.counters.mu.Unlock()
	return slices.Clone(s.counters.served)
}

// ResetCounts sets all numbers to 0, the rate limit's too. The numbers that
// Options.Fault sees go on.
func (s *Server) ResetCounts() {
	s.counters.mu.Lock()
	defer s.counters.mu.Unlock()
	s.counters.counts = Counts{}
	s.counters.served = nil
	s.counters.blobBytes.Store(0)
	s.counters.limited.Store(0)
}

// observe counts the requests to a handler and applies the faults.
func (s *Server) observe(handler http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := s.counters.requests.Add(1)
		s.count(r)
		w = &statusWriter{ResponseWriter: w, counters: &s.counters}
		if s.opts.Fault == nil {
			handler(w, r)
			return
		}
		s.misbehave(s.opts.Fault(r, int(n)), handler, w, r)
	})
}

func (s *Server) count(r *http.Request) {
	s.counters.mu.Lock()
	defer s.counters.mu.Unlock()
	c := &s.counters.counts
	c.Total++
	_, kind, _ := split(r.URL.Path)
	switch {
	case s.traits.bearer && r.URL.Path == s.traits.tokenPath:
		c.Token++
	case strings.HasPrefix(r.URL.Path, "/store/"):
		c.Storage++
	case kind == "ping":
		c.Ping++
	case kind == "uploads":
		c.Upload++
	case kind == "manifests" && r.Method == http.MethodPut:
		c.PutManifest++
	case kind == "manifests":
		c.Manifest++
	case kind == "blobs":
		c.Blob++
	default:
		c.Other++
	}
}

// statusWriter counts refusals.
type statusWriter struct {
	http.ResponseWriter
	counters *counters
}

func (w *statusWriter) WriteHeader(status int) {
	if status == http.StatusUnauthorized || status == http.StatusForbidden {
		w.counters.mu.Lock()
		w.counters.counts.Unauthorized++
		w.counters.mu.Unlock()
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) ReadFrom(r io.Reader) (int64, error) { return io.Copy(w.ResponseWriter, r) }
func (w *statusWriter) Unwrap() http.ResponseWriter         { return w.ResponseWriter }

// blob returns a writer that counts the bytes of a blob and, from the headers
// of the answer, notes its range.
func (c *counters) blob(w http.ResponseWriter, d digest.Digest) http.ResponseWriter {
	return &blobWriter{ResponseWriter: w, counters: c, digest: d}
}

type blobWriter struct {
	http.ResponseWriter
	counters *counters
	digest   digest.Digest
}

func (w *blobWriter) WriteHeader(status int) {
	if status == http.StatusOK || status == http.StatusPartialContent {
		served := Served{Digest: w.digest}
		served.Length, _ = strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64)
		first, _, _ := strings.Cut(strings.TrimPrefix(w.Header().Get("Content-Range"), "bytes "), "-")
		served.Offset, _ = strconv.ParseInt(first, 10, 64) // none: from the start
		w.counters.mu.Lock()
		w.counters.served = append(w.counters.served, served)
		w.counters.mu.Unlock()
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *blobWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.counters.blobBytes.Add(int64(n))
	return n, err
}

// ReadFrom lets the kernel copy files to the connection, in pieces small enough
// for the count to be true while a large blob is sent.
func (w *blobWriter) ReadFrom(r io.Reader) (int64, error) {
	limited, ok := r.(*io.LimitedReader) // what http.ServeContent passes
	if !ok {
		limited = &io.LimitedReader{R: r, N: math.MaxInt64}
	}
	var total int64
	for limited.N > 0 {
		piece := &io.LimitedReader{R: limited.R, N: min(limited.N, 1<<20)}
		n, err := io.Copy(w.ResponseWriter, piece)
		w.counters.blobBytes.Add(n)
		total += n
		limited.N -= n
		if err != nil || piece.N > 0 {
			return total, err
		}
	}
	return total, nil
}

func (w *blobWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
