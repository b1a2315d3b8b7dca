// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/profile"
)

// longestRecording bounds what a request may ask for.
const longestRecording = 10 * time.Minute

// profiles is how profiles are recorded and used, as the configuration says.
func (d *Daemon) profiles() (prepare.Profiles, error) {
	if d.cfg.Profile == "off" {
		return prepare.Profiles{}, nil
	}
	store, err := profile.OpenStore(filepath.Join(d.cfg.Root, "profiles"))
	if err != nil {
		return prepare.Profiles{}, err
	}
	return prepare.Profiles{Store: store, Settle: time.Duration(d.cfg.ProfileSettle)}, nil
}

// Profile returns the profile of an image.
func (d *Daemon) Profile(_ context.Context, reference string) (*profile.Profile, error) {
	return d.preparer.Profile(reference)
}

// RecordProfile records what is read of an image.
func (d *Daemon) RecordProfile(ctx context.Context, req control.RecordRequest) (*profile.Profile, error) {
	if req.For <= 0 || req.For > longestRecording {
		return nil, fmt.Errorf("%w: recording for %s: want more than 0s, and at most %s", control.ErrBadRequest, req.For, longestRecording)
	}
	return d.preparer.RecordProfile(ctx, req.Reference, req.For)
}

// PushProfile publishes the profile of an image.
func (d *Daemon) PushProfile(ctx context.Context, reference string) error {
	return d.preparer.PushProfile(ctx, reference)
}

// DropProfile forgets the profile of an image.
func (d *Daemon) DropProfile(_ context.Context, reference string) error {
	if err := d.preparer.DropProfile(reference); err != nil {
		return err
	}
	d.log.Info("dropped profile", "image", reference)
	return nil
}
