// SPDX-License-Identifier: Apache-2.0

package testregistry

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"
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
	// Shift answers a request for a range with the bytes that lie so much further
	// on in the blob, and says that they are the ones asked for.
	Shift int64

	// At is how many bytes of the body are sent before one of the following.
	At       int64
	Truncate bool          // break the connection
	Stall    bool          // send nothing until the client goes or the server is closed
	Drip     time.Duration // send one byte at a time from here on, so far apart
	Zero     bool          // send zeros from here on
	Flip     byte          // change the byte at At by XOR with this

	happens func() // called once, when the fault shows in the answer
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
	happens := sync.OnceFunc(func() {
		if f.happens != nil {
			f.happens()
		}
	})
	if f.Reset {
		happens()
		panic(http.ErrAbortHandler) // how net/http breaks a connection
	}
	if f.IgnoreRange || f.Shift != 0 {
		r = r.Clone(r.Context())
	}
	if f.IgnoreRange {
		r.Header.Del("Range")
	}
	asked := ""
	if first, last, ok := rangeOf(r); ok && f.Shift != 0 {
		r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first+f.Shift, last+f.Shift))
		asked = fmt.Sprintf("bytes %d-%d/", first, last)
	}
	fw := &faultWriter{ResponseWriter: w, server: s, request: r, fault: f, asked: asked, happens: happens}
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
	asked   string // the Content-Range to claim, up to the size; "" for the true one
	happens func()
	started bool
	pos     int64
}

func (w *faultWriter) WriteHeader(status int) {
	if w.started {
		return
	}
	w.started = true
	if _, size, ok := strings.Cut(w.Header().Get("Content-Range"), "/"); ok && w.asked != "" {
		w.Header().Set("Content-Range", w.asked+size)
		w.happens()
	}
	maps.Copy(w.Header(), w.fault.Header)
	if len(w.fault.Header) > 0 || w.fault.Status != 0 || w.fault.IgnoreRange {
		w.happens()
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *faultWriter) Write(p []byte) (int, error) {
	if !w.started {
		w.WriteHeader(http.StatusOK)
	}
	at := w.fault.At - w.pos
	if at >= 0 && at < int64(len(p)) || at < 0 && (w.fault.Zero || w.fault.Drip > 0) {
		at = max(at, 0)
		switch {
		case w.fault.Truncate, w.fault.Stall:
			w.happens()
			n, err := w.ResponseWriter.Write(p[:at])
			w.pos += int64(n)
			return n, errors.Join(err, w.stop())
		case w.fault.Drip > 0:
			w.happens()
			n, err := w.ResponseWriter.Write(p[:at])
			if err == nil {
				n, err = w.drip(p, n)
			}
			w.pos += int64(n)
			return n, err
		case w.fault.Zero:
			w.happens()
			p = append(bytes.Clone(p[:at]), make([]byte, int64(len(p))-at)...)
		case w.fault.Flip != 0:
			w.happens()
			p = bytes.Clone(p)
			p[at] ^= w.fault.Flip
		}
	}
	n, err := w.ResponseWriter.Write(p)
	w.pos += int64(n)
	return n, err
}

// drip sends p from n on, byte by byte, and returns how much of p is sent.
func (w *faultWriter) drip(p []byte, n int) (int, error) {
	tick := time.NewTicker(w.fault.Drip)
	defer tick.Stop()
	for ; n < len(p); n++ {
		if _, err := w.ResponseWriter.Write(p[n : n+1]); err != nil {
			return n, err
		}
		if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
			return n, err
		}
		select {
		case <-tick.C:
		case <-w.request.Context().Done():
			return n, w.request.Context().Err()
		case <-w.server.ctx.Done():
			return n, w.server.ctx.Err()
		}
	}
	return n, nil
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
