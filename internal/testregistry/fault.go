// SPDX-License-Identifier: Apache-2.0

package testregistry

import (
	"errors"
	"maps"
	"net/http"
	"time"
)

// Fault is what goes wrong with one request. The zero Fault lets it pass.
type Fault struct {
	// Delay passes before anything else.
	Delay time.Duration
	// Reset breaks the connection without an answer.
	Reset bool
	// Status, if not 0, is all of the answer, with Header.
	Status int
	// IgnoreRange answers 200 with the whole blob to a request for a range.
	IgnoreRange bool
	// Header overrides headers of the answer, Content-Range for example.
	Header http.Header

	// At is how many bytes of the body are sent before one of the following.
	At       int64
	Truncate bool // break the connection
	Stall    bool // send nothing until the client goes or the server is closed
	Flip     byte // change the byte at At by XOR with this
}

func (s *Server) misbehave(f Fault, handler http.HandlerFunc, w http.ResponseWriter, r *http.Request) {
	if f.Delay > 0 {
		timer := time.NewTimer(f.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
		case <-s.ctx.Done():
		}
	}
	if f.Reset {
		panic(http.ErrAbortHandler) // how net/http breaks a connection
	}
	if f.IgnoreRange {
		r = r.Clone(r.Context())
		r.Header.Del("Range")
	}
	fw := &faultWriter{ResponseWriter: w, server: s, request: r, fault: f}
	if f.Status != 0 {
		fw.WriteHeader(f.Status)
		return
	}
	handler(fw, r)
}

// faultWriter applies what happens to the answer.
type faultWriter struct {
	http.ResponseWriter
	server  *Server
	request *http.Request
	fault   Fault
	started bool
	pos     int64
}

func (w *faultWriter) WriteHeader(status int) {
	if w.started {
		return
	}
	w.started = true
	maps.Copy(w.Header(), w.fault.Header)
	w.ResponseWriter.WriteHeader(status)
}

func (w *faultWriter) Write(p []byte) (int, error) {
	if !w.started {
		w.WriteHeader(http.StatusOK)
	}
	at := w.fault.At - w.pos
	inside := at >= 0 && at < int64(len(p))
	if inside && (w.fault.Truncate || w.fault.Stall) {
		n, err := w.ResponseWriter.Write(p[:at])
		w.pos += int64(n)
		return n, errors.Join(err, w.stop())
	}
	if inside && w.fault.Flip != 0 {
		p = append([]byte(nil), p...)
		p[at] ^= w.fault.Flip
	}
	n, err := w.ResponseWriter.Write(p)
	w.pos += int64(n)
	return n, err
}

// stop ends the answer in the middle.
func (w *faultWriter) stop() error {
	if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
		return err
	}
	if w.fault.Stall {
		select {
		case <-w.request.Context().Done():
		case <-w.server.ctx.Done():
		}
	}
	panic(http.ErrAbortHandler)
}
