// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/profile"
)

const (
	// maxRecording is how long a recording lasts at most, from the first touch on.
	maxRecording = 2 * time.Minute
	// maxRecordings is how many images may wait for their first reader, or be
	// recorded, at a time.
	maxRecordings = 500
)

// errReplaced ends a recording that is not wanted any more.
var errReplaced = errors.New("the recording was ended")

// recordings are the images that are recorded. The zero value is ready.
type recordings struct {
	mu      sync.Mutex // protects running
	running map[digest.Digest]*recording
}

// recording is one image's. It waits for a reader, then notes what readers want.
type recording struct {
	*device.Recorder
	image  digest.Digest
	layers []profile.Layer
	ctx    context.Context // ends with the recording
	cancel context.CancelCauseFunc
	stops  []func()
}

// begin starts to record an image, unless that is done already, or no layer can be
// seen. The caller ends it.
func (r *recordings) begin(ctx context.Context, image digest.Digest, layers []*layer.Layer, see func(*layer.Layer) bool) *recording {
	known, some := visible(layers, see)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !some || r.running[image] != nil || len(r.running) >= maxRecordings {
		return nil
	}
	rec := &recording{Recorder: device.NewRecorder(), image: image, layers: known}
	rec.ctx, rec.cancel = context.WithCancelCause(ctx)
	for i, l := range layers {
		if known[i].Runs > 0 {
			rec.stops = append(rec.stops, l.Device().Record(rec.Recorder, i))
		}
	}
	if r.running == nil {
		r.running = map[digest.Digest]*recording{}
	}
	r.running[image] = rec
	return rec
}

// end ends the recording of an image, if there is one: nothing comes of it.
func (r *recordings) end(image digest.Digest) {
	r.mu.Lock()
	rec := r.running[image]
	r.mu.Unlock()
	if rec != nil {
		r.finish(rec)
	}
}

// finish ends a recording, once or more often.
func (r *recordings) finish(rec *recording) {
	rec.cancel(errReplaced)
	for _, stop := range rec.stops {
		stop()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running[rec.image] == rec {
		delete(r.running, rec.image)
	}
}

// profile is what has been recorded so far.
func (r *recording) profile() *profile.Profile {
	var touches []profile.Touch
	for _, t := range r.Touches() {
		touches = append(touches, profile.Touch{Layer: t.Device, Range: t.Range})
	}
	return profile.New(r.image, r.layers, touches)
}

// record records what the image's workload wants first, in the background, as far
// as it can be seen: of layers that nobody has read yet.
func (p *Preparer) record(image digest.Digest, plans []*plan) {
	if p.profiles.Store == nil {
		return
	}
	var layers []*layer.Layer
	for _, l := range plans {
		if l.Action != Left {
			layers = append(layers, l.layer)
		}
	}
	rec := p.recordings.begin(p.ctx, image, layers, (*layer.Layer).Unread)
	if rec == nil {
		return
	}
	p.background.Go(func() error {
		defer p.recordings.finish(rec)
		select {
		case <-rec.Began():
		case <-rec.ctx.Done():
			return nil
		}
		if rec.Settle(rec.ctx, p.profiles.Settle, maxRecording) != nil {
			return nil
		}
		prof, err := p.profiles.Store.Add(rec.profile())
		if err != nil {
			p.log.Warn("keeping a profile", "err", err)
			return nil
		}
		p.log.Info("recorded a profile", "image", image.String(), "touches", len(prof.Touches), "runs", prof.Runs)
		if err := p.PushProfile(p.ctx, image.String()); err != nil && p.ctx.Err() == nil && !errors.Is(err, indexes.ErrNoPlace) {
			p.log.Warn("publishing a profile", "err", err)
		}
		return nil
	})
}

// RecordProfile records what is read of an image from now on, for so long, and
// keeps that in the place of what was recorded before. What the kernel has of the
// image in memory is dropped first, or it would not be seen.
func (p *Preparer) RecordProfile(ctx context.Context, name string, long time.Duration) (*profile.Profile, error) {
	if p.profiles.Store == nil {
		return nil, ErrProfilesOff
	}
	img, err := p.Find(name)
	if err != nil {
		return nil, err
	}
	prof, err := p.recordNow(ctx, img, long)
	if err == nil {
		err = p.profiles.Store.Save(prof)
	}
	if err != nil {
		return nil, fmt.Errorf("recording a profile of %s: %w", name, err)
	}
	return prof, nil
}

func (p *Preparer) recordNow(ctx context.Context, img Image, long time.Duration) (*profile.Profile, error) {
	var layers []*layer.Layer
	for _, l := range img.Layers {
		if have, ok := p.layers.Get(l.Digest); ok && l.Action != Left {
			layers = append(layers, have)
		}
	}
	p.recordings.end(img.Digest)
	for _, l := range layers {
		if !l.ThroughDevice() {
			continue
		}
		if err := l.DropPages(ctx); err != nil {
			return nil, err
		}
	}
	rec := p.recordings.begin(ctx, img.Digest, layers, (*layer.Layer).ThroughDevice)
	if rec == nil {
		return nil, errors.New("reads cannot be seen: the kernel answers them from files of the layers, or the image is being recorded already")
	}
	defer p.recordings.finish(rec)
	select {
	case <-time.After(long):
	case <-rec.ctx.Done():
		return nil, context.Cause(rec.ctx)
	}
	prof := rec.profile()
	if len(prof.Touches) == 0 {
		return nil, fmt.Errorf("nothing was read within %s", long)
	}
	return prof, nil
}
