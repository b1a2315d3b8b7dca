// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/pins"
	"github.com/holdfast/holdfast/internal/prepare"
)

// newPinner returns what keeps pinned images, as the configuration says.
func (d *Daemon) newPinner() (*pins.Pinner, error) {
	return pins.New(pins.Config{
		Dir: d.cfg.PinPath(), Create: d.cfg.PinRoot == "", State: filepath.Join(d.cfg.Root, "pins.json"),
		Configured: d.cfg.Pinned, Interval: time.Duration(d.cfg.PinInterval),
		Sources: d.sources, Registries: d.cfg.Trusted,
		Prepare: func(ctx context.Context, ref reference.Named) error {
			req := control.PrepareRequest{Reference: ref.String()}
			_, err := d.Prepare(ctx, req, func(prepare.Event) {})
			return err
		},
		IsPrepared: func(manifest digest.Digest) bool {
			_, err := d.preparer.Find(manifest.String())
			return err == nil
		},
		Yield: func(ctx context.Context) error {
			return d.scheduler.Yield(ctx, func() device.Priority { return device.Fill })
		},
		Logger: d.log,
	})
}

// Pins returns what is pinned.
func (d *Daemon) Pins() []pins.Pin { return d.pinner.All() }

// Pin pins images and artifacts.
func (d *Daemon) Pin(names []string) error {
	if err := d.pinner.Pin(names...); err != nil {
		return fmt.Errorf("%w: %w", control.ErrBadRequest, err)
	}
	return nil
}

// Unpin lets them go.
func (d *Daemon) Unpin(names []string) error { return d.pinner.Unpin(names...) }
