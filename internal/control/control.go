// SPDX-License-Identifier: Apache-2.0

// Package control is the daemon's control socket: HTTP over a Unix socket that
// only root can use, with JSON bodies. The same types serve `--json`.
//
//	POST   /v1/prepare                 PrepareRequest -> a line of JSON (Progress) for each event, the last with result or error
//	GET    /v1/images                  -> []ImageStatus
//	GET    /v1/images?reference=REF    -> ImageStatus
//	DELETE /v1/images?reference=REF
//	POST   /v1/gc                      CollectRequest -> prepare.Collection
//	GET    /v1/profile?reference=REF   -> profile.Profile
//	DELETE /v1/profile?reference=REF
//	POST   /v1/profile/record          RecordRequest -> profile.Profile
//	POST   /v1/profile/push?reference=REF
//	GET    /v1/info                    -> Info
//	GET    /metrics                    Prometheus
package control

import (
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/prepare"
)

// PrepareRequest asks for an image to be prepared.
type PrepareRequest struct {
	Reference   string       `json:"reference"`
	Credentials *Credentials `json:"credentials,omitempty"`
	// Hook means that a runtime waits: the daemon logs the outcome, since the
	// runtime drops what its hook prints.
	Hook bool `json:"hook,omitempty"`
	// Offline means that no registry is asked for anything.
	Offline bool `json:"offline,omitempty"`
}

// Credentials are a user's for the registry of the reference, with the fields
// that runtimes give to their pull hook.
type Credentials struct {
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	IdentityToken string `json:"identityToken,omitempty"`
}

// String keeps the secrets out of logs.
func (Credentials) String() string { return "credentials" }

// GoString keeps the secrets out of logs.
func (Credentials) GoString() string { return "credentials" }

// Progress is a line of the answer to a PrepareRequest. Exactly one field is set.
type Progress struct {
	Event  *prepare.Event  `json:"event,omitempty"`
	Result *prepare.Result `json:"result,omitempty"`
	Error  string          `json:"error,omitempty"`
}

// CollectRequest asks for what is unused to be removed.
type CollectRequest struct {
	// Grace is how long something must have been unused, in nanoseconds; nil is
	// what the configuration says.
	Grace *time.Duration `json:"grace,omitempty"`
	// DryRun asks only for what would be removed.
	DryRun bool `json:"dryRun,omitempty"`
}

// RecordRequest asks for what is read of an image to be recorded.
type RecordRequest struct {
	Reference string        `json:"reference"`
	For       time.Duration `json:"for"` // nanoseconds, from now on
}

// LayerStatus is the state of a layer of a prepared image.
type LayerStatus struct {
	prepare.LayerResult
	// State is "mounted", "quarantined", "missing" or what the layer's Action says.
	State    string     `json:"state"`
	Index    index.Kind `json:"index,omitempty"`
	Verified bool       `json:"verified"`
	// Fill says how it stands with fetching the rest: "filling", "waiting", or
	// "waiting: " and why; "filled, not verified" if that is all that is to be done;
	// "" if it is done, or not to be done.
	Fill string `json:"fill,omitempty"`
	// Quarantined says why the layer is in quarantine.
	Quarantined string        `json:"quarantined,omitempty"`
	Local       int64         `json:"localBytes"` // disk space of the data that is local
	Percent     float64       `json:"percentLocal"`
	Device      *device.Stats `json:"device,omitempty"`
	InUse       bool          `json:"inUse"` // a runtime refers to it
}

// ImageStatus is the state of a prepared image.
type ImageStatus struct {
	References []string      `json:"references"`
	Digest     digest.Digest `json:"digest"`
	Prepared   time.Time     `json:"prepared"`
	Size       int64         `json:"size"` // compressed bytes of all layers
	Layers     []LayerStatus `json:"layers"`
}

// Info describes the daemon.
type Info struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`    // of the worker
	Keeper  int       `json:"keeper"` // the process that keeps the mount alive
	Started time.Time `json:"started"`
	Mount   string    `json:"mount"` // how layers are mounted, and why so
	// Disabled says why nothing is published; "" if all is well.
	Disabled string           `json:"disabled,omitempty"`
	Cache    cache.SpaceStats `json:"cache"` // of all layers
}

type apiError struct {
	Error string `json:"error"`
}
