// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"os"
	"time"

	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/prepare"
)

var _ control.Service = (*Daemon)(nil)

// Prepare prepares an image for the control socket.
func (d *Daemon) Prepare(ctx context.Context, req control.PrepareRequest, progress func(prepare.Event)) (*prepare.Result, error) {
	ref, err := reference.ParseNormalizedNamed(req.Reference)
	if err != nil {
		return nil, fmt.Errorf("%w: image reference %q: %w", control.ErrBadRequest, req.Reference, err)
	}
	if d.disabled != nil {
		return nil, fmt.Errorf("nothing is published: %w", d.disabled)
	}
	p := prepare.Request{Reference: ref, Offline: req.Offline, FromRegistry: req.Hook, Progress: progress}
	if logical, ok := d.logical(ref); ok {
		p.Reference, p.FromRegistry = logical, false
	} else if c := req.Credentials; c != nil && *c != (control.Credentials{}) {
		p.Credentials = &registry.Credentials{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken}
	}
	res, err := d.preparer.Prepare(ctx, p)
	d.logOutcome(req, res, err)
	return res, err
}

// logOutcome says in the daemon's log what a pull hook cannot say to anybody.
func (d *Daemon) logOutcome(req control.PrepareRequest, res *prepare.Result, err error) {
	switch {
	case err != nil:
		d.log.Warn("image is left to the runtime", "image", req.Reference, "hook", req.Hook, "err", err)
	case res.Lazy() == 0:
		d.log.Info("image is left to the runtime", "image", req.Reference, "hook", req.Hook, "reason", reason(res))
	default:
		d.log.Info("prepared image", "image", req.Reference, "hook", req.Hook, "lazy", res.Lazy(), "layers", len(res.Layers),
			"took", res.Duration.Round(time.Millisecond).String())
	}
}

func reason(res *prepare.Result) string {
	if res.Reason != "" || len(res.Layers) == 0 {
		return res.Reason
	}
	return res.Layers[0].Reason
}

// Images returns the state of all prepared images.
func (d *Daemon) Images(context.Context) ([]control.ImageStatus, error) {
	all, err := d.preparer.Images()
	if err != nil {
		return nil, err
	}
	used := d.used()
	states := make([]control.ImageStatus, 0, len(all))
	for _, img := range all {
		states = append(states, d.imageStatus(img, used))
	}
	return states, nil
}

// Image returns the state of one prepared image.
func (d *Daemon) Image(_ context.Context, name string) (*control.ImageStatus, error) {
	img, err := d.preparer.Find(name)
	if err != nil {
		return nil, err
	}
	s := d.imageStatus(img, d.used())
	return &s, nil
}

// used is what runtimes refer to, as far as it is known.
func (d *Daemon) used() map[string][]imagestore.Referrer {
	used, err := d.preparer.Used()
	if err != nil {
		d.log.Warn("reading what runtimes refer to", "err", err)
	}
	return used
}

func (d *Daemon) imageStatus(img prepare.Image, used map[string][]imagestore.Referrer) control.ImageStatus {
	s := control.ImageStatus{References: img.References, Digest: img.Digest, Prepared: img.Prepared}
	for _, l := range img.Layers {
		s.Size += l.Size
		s.Layers = append(s.Layers, d.layerStatus(l, used))
	}
	return s
}

func (d *Daemon) layerStatus(l prepare.LayerResult, used map[string][]imagestore.Referrer) control.LayerStatus {
	s := control.LayerStatus{LayerResult: l, State: string(l.Action), InUse: len(used[l.ChainID]) > 0}
	if l.Action == prepare.Left {
		return s
	}
	have, ok := d.layers.Get(l.Digest)
	if !ok {
		s.State = "missing"
		return s
	}
	stats := have.Device().Stats()
	s.State, s.Index, s.Verified, s.Local, s.Device = "mounted", have.Kind, have.Verdict().Verified, have.LocalBytes(), &stats
	s.Fill = d.filler.State(l.Digest)
	if v := have.Verdict(); v.Quarantined != "" {
		s.State, s.Quarantined = "quarantined", v.Quarantined
	}
	s.Percent = 100
	if stats.Chunks > 0 {
		s.Percent = 100 * float64(stats.Present) / float64(stats.Chunks)
	}
	return s
}

// Remove removes a prepared image that no runtime refers to.
func (d *Daemon) Remove(ctx context.Context, name string) error {
	if err := d.preparer.Remove(ctx, name); err != nil {
		return err
	}
	d.log.Info("removed image", "image", name)
	return nil
}

// Collect removes what has been unused for the grace period.
func (d *Daemon) Collect(ctx context.Context, req control.CollectRequest) (*prepare.Collection, error) {
	grace := time.Duration(d.cfg.GCGrace)
	if req.Grace != nil {
		grace = *req.Grace
	}
	if grace < 0 {
		return nil, fmt.Errorf("%w: grace period %s", control.ErrBadRequest, grace)
	}
	return d.preparer.Collect(ctx, grace, req.DryRun)
}

// Info describes the daemon.
func (d *Daemon) Info() control.Info {
	info := control.Info{
		Version: Version, PID: os.Getpid(), Keeper: os.Getppid(), Started: d.started, Mount: d.mounter.String(), Cache: d.space.Stats(),
	}
	if d.disabled != nil {
		info.Disabled = d.disabled.Error()
	}
	return info
}
