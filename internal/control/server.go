// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/pins"
	"github.com/holdfast/holdfast/internal/prepare"
)

// Errors that a Service returns for what the caller did.
var (
	// ErrBadRequest means that the request makes no sense.
	ErrBadRequest = errors.New("bad request")
)

// Service is what the socket gives access to: the daemon.
type Service interface {
	Prepare(ctx context.Context, req PrepareRequest, progress func(prepare.Event)) (*prepare.Result, error)
	Images(ctx context.Context) ([]ImageStatus, error)
	Image(ctx context.Context, reference string) (*ImageStatus, error)
	Remove(ctx context.Context, reference string) error
	Collect(ctx context.Context, req CollectRequest) (*prepare.Collection, error)
	Info() Info
	Profiles
	Pinning
	Artifacts
}

const maxRequest = 1 << 20 // bytes of a request's body

// Serve answers requests until ctx ends, then lets those under way finish for a
// moment, and ends the others. When it returns, none is under way.
func Serve(ctx context.Context, l net.Listener, s Service, metrics http.Handler, log *slog.Logger) error {
	mux := http.NewServeMux()
	h := &handler{service: s, log: log}
	mux.HandleFunc("POST /v1/prepare", h.prepare)
	mux.HandleFunc("GET /v1/images", h.images)
	mux.HandleFunc("DELETE /v1/images", h.remove)
	mux.HandleFunc("POST /v1/gc", h.collect)
	h.handleProfiles(mux)
	h.handlePins(mux)
	h.handleArtifacts(mux)
	mux.HandleFunc("GET /v1/info", func(w http.ResponseWriter, _ *http.Request) { h.reply(w, s.Info(), nil) })
	mux.Handle("GET /metrics", metrics)
	var running sync.WaitGroup
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			running.Add(1)
			defer running.Done()
			mux.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: 10 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close()
		}
	})
	err := srv.Serve(l)
	if !stop() {
		<-ended // Serve returns when the end begins
		running.Wait()
	}
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving control socket: %w", err)
	}
	return nil
}

type handler struct {
	service Service
	log     *slog.Logger
}

func (h *handler) prepare(w http.ResponseWriter, r *http.Request) {
	var req PrepareRequest
	if !h.decode(w, r, &req) {
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	send := func(p Progress) {
		// A caller that left shows in the request's context.
		_ = out.Encode(p)
		_ = http.NewResponseController(w).Flush()
	}
	res, err := h.service.Prepare(r.Context(), req, throttled(func(e prepare.Event) { send(Progress{Event: &e}) }))
	if err != nil {
		send(Progress{Error: err.Error()})
		return
	}
	send(Progress{Result: res})
}

func (h *handler) collect(w http.ResponseWriter, r *http.Request) {
	var req CollectRequest
	if !h.decode(w, r, &req) {
		return
	}
	c, err := h.service.Collect(r.Context(), req)
	h.reply(w, c, err)
}

// decode reads a request, or answers that it is none.
func (h *handler) decode(w http.ResponseWriter, r *http.Request, req any) bool {
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(req)
	if err != nil {
		h.reply(w, nil, fmt.Errorf("%w: %w", ErrBadRequest, err))
	}
	return err == nil
}

// throttled passes on the first and the last event of a layer, and between them
// ten a second.
func throttled(next func(prepare.Event)) func(prepare.Event) {
	const interval = 100 * time.Millisecond
	last := map[string]time.Time{}
	return func(e prepare.Event) {
		key := e.Layer.String()
		if e.Done < e.Total && time.Since(last[key]) < interval {
			return
		}
		last[key] = time.Now()
		next(e)
	}
}

func (h *handler) images(w http.ResponseWriter, r *http.Request) {
	if ref := r.URL.Query().Get("reference"); ref != "" {
		img, err := h.service.Image(r.Context(), ref)
		h.reply(w, img, err)
		return
	}
	all, err := h.service.Images(r.Context())
	h.reply(w, all, err)
}

func (h *handler) remove(w http.ResponseWriter, r *http.Request) {
	h.reply(w, struct{}{}, h.service.Remove(r.Context(), r.URL.Query().Get("reference")))
}

// reply writes a value, or an error with the status that tells its kind.
func (h *handler) reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		status := http.StatusInternalServerError
		switch {
		case errors.Is(err, prepare.ErrUnknown):
			status = http.StatusNotFound
		case errors.Is(err, prepare.ErrInUse):
			status = http.StatusConflict
		case errors.Is(err, ErrBadRequest), errors.Is(err, pins.ErrUnknown), errors.Is(err, pins.ErrConfigured),
			errors.Is(err, artifacts.ErrUnknown), errors.Is(err, artifacts.ErrConfigured):
			status = http.StatusBadRequest
		case errors.Is(err, prepare.ErrNoProfile):
			status = http.StatusGone
		}
		w.WriteHeader(status)
		v = apiError{err.Error()}
	}
	if err := json.NewEncoder(w).Encode(v); err != nil {
		h.log.Debug("writing answer", "err", err)
	}
}
