// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"net/http"

	"github.com/holdfast/holdfast/internal/pins"
)

// Pinning is the part of a Service that has to do with pinned images.
type Pinning interface {
	Pins() []pins.Pin
	Pin(names []string) error
	Unpin(names []string) error
}

const pinsPath = "/v1/pins"

// PinRequest names images and artifacts.
type PinRequest struct {
	References []string `json:"references"`
}

func (h *handler) handlePins(mux *http.ServeMux) {
	mux.HandleFunc("GET "+pinsPath, func(w http.ResponseWriter, _ *http.Request) { h.reply(w, h.service.Pins(), nil) })
	act := func(do func([]string) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			var req PinRequest
			if h.decode(w, r, &req) {
				h.reply(w, struct{}{}, do(req.References))
			}
		}
	}
	mux.HandleFunc("POST "+pinsPath, act(h.service.Pin))
	mux.HandleFunc("POST "+pinsPath+"/unpin", act(h.service.Unpin))
}

// Pins returns what is pinned, by name.
func (c *Client) Pins(ctx context.Context) ([]pins.Pin, error) {
	var all []pins.Pin
	return all, c.call(ctx, http.MethodGet, pinsPath, nil, &all)
}

// Pin pins images and artifacts; it does not wait for them.
func (c *Client) Pin(ctx context.Context, names ...string) error {
	return c.actOnPins(ctx, "", names)
}

// Unpin lets them go.
func (c *Client) Unpin(ctx context.Context, names ...string) error {
	return c.actOnPins(ctx, "/unpin", names)
}

func (c *Client) actOnPins(ctx context.Context, action string, names []string) error {
	return c.post(ctx, pinsPath+action, PinRequest{names})
}
