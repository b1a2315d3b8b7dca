// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"

	"github.com/holdfast/holdfast/internal/profile"
)

// Profiles is the part of a Service that has to do with profiles. Images are named
// by reference or manifest digest.
type Profiles interface {
	Profile(ctx context.Context, reference string) (*profile.Profile, error)
	RecordProfile(ctx context.Context, req RecordRequest) (*profile.Profile, error)
	PushProfile(ctx context.Context, reference string) error
	DropProfile(ctx context.Context, reference string) error
}

const profilePath = "/v1/profile"

func (h *handler) handleProfiles(mux *http.ServeMux) {
	reference := func(r *http.Request) string { return r.URL.Query().Get("reference") }
	mux.HandleFunc("GET "+profilePath, func(w http.ResponseWriter, r *http.Request) {
		p, err := h.service.Profile(r.Context(), reference(r))
		h.reply(w, p, err)
	})
	mux.HandleFunc("DELETE "+profilePath, func(w http.ResponseWriter, r *http.Request) {
		h.reply(w, struct{}{}, h.service.DropProfile(r.Context(), reference(r)))
	})
	mux.HandleFunc("POST "+profilePath+"/push", func(w http.ResponseWriter, r *http.Request) {
		h.reply(w, struct{}{}, h.service.PushProfile(r.Context(), reference(r)))
	})
	mux.HandleFunc("POST "+profilePath+"/record", func(w http.ResponseWriter, r *http.Request) {
		var req RecordRequest
		if !h.decode(w, r, &req) {
			return
		}
		p, err := h.service.RecordProfile(r.Context(), req)
		h.reply(w, p, err)
	})
}

// Profile returns the profile of an image.
func (c *Client) Profile(ctx context.Context, reference string) (*profile.Profile, error) {
	var p profile.Profile
	if err := c.call(ctx, http.MethodGet, profilePath+query(reference), nil, &p); err != nil {
		return nil, err
	}
	return &p, nil
}

// RecordProfile has what is read of an image recorded, and returns it when the
// time is over.
func (c *Client) RecordProfile(ctx context.Context, req RecordRequest) (*profile.Profile, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encoding request: %w", err)
	}
	var p profile.Profile
	if err := c.call(ctx, http.MethodPost, profilePath+"/record", body, &p); err != nil {
		return nil, err
	}
	return &p, nil
}

// PushProfile publishes the profile of an image for other nodes.
func (c *Client) PushProfile(ctx context.Context, reference string) error {
	var none struct{}
	return c.call(ctx, http.MethodPost, profilePath+"/push"+query(reference), nil, &none)
}

// DropProfile forgets the profile of an image.
func (c *Client) DropProfile(ctx context.Context, reference string) error {
	var none struct{}
	return c.call(ctx, http.MethodDelete, profilePath+query(reference), nil, &none)
}

func query(reference string) string { return "?reference=" + url.QueryEscape(reference) }
