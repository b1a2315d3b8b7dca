// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/holdfast/holdfast/internal/artifacts"
)

// Artifacts is the part of a Service that has to do with the composed artifact store.
type Artifacts interface {
	Artifacts() artifacts.All
	PrepareArtifact(ctx context.Context, req ArtifactRequest) error
	RemoveArtifacts(ctx context.Context, names []string) error
}

const artifactsPath = "/v1/artifacts"

// ArtifactRequest asks for an artifact to be prepared.
type ArtifactRequest struct {
	Reference   string       `json:"reference"`
	Credentials *Credentials `json:"credentials,omitempty"`
	// Wait means that all of it is fetched before the answer.
	Wait bool `json:"wait,omitempty"`
}

func (h *handler) handleArtifacts(mux *http.ServeMux) {
	mux.HandleFunc("GET "+artifactsPath, func(w http.ResponseWriter, _ *http.Request) { h.reply(w, h.service.Artifacts(), nil) })
	mux.HandleFunc("POST "+artifactsPath, func(w http.ResponseWriter, r *http.Request) {
		var req ArtifactRequest
		if h.decode(w, r, &req) {
			h.reply(w, struct{}{}, h.service.PrepareArtifact(r.Context(), req))
		}
	})
	mux.HandleFunc("POST "+artifactsPath+"/remove", func(w http.ResponseWriter, r *http.Request) {
		var req PinRequest
		if h.decode(w, r, &req) {
			h.reply(w, struct{}{}, h.service.RemoveArtifacts(r.Context(), req.References))
		}
	})
}

// Artifacts returns the state of the composed artifact store.
func (c *Client) Artifacts(ctx context.Context) (*artifacts.All, error) {
	var all artifacts.All
	return &all, c.call(ctx, http.MethodGet, artifactsPath, nil, &all)
}

// PrepareArtifact has an artifact offered that is in a registry.
func (c *Client) PrepareArtifact(ctx context.Context, req ArtifactRequest) error {
	return c.post(ctx, artifactsPath, req)
}

// RemoveArtifacts lets go of artifacts that were prepared.
func (c *Client) RemoveArtifacts(ctx context.Context, names ...string) error {
	return c.post(ctx, artifactsPath+"/remove", PinRequest{names})
}

// post sends a request that has no answer but that it was done.
func (c *Client) post(ctx context.Context, path string, req any) error {
	body, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("encoding request: %w", err)
	}
	var none struct{}
	return c.call(ctx, http.MethodPost, path, body, &none)
}
