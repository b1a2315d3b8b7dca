// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/shape"
	"github.com/holdfast/holdfast/test/lab"
)

// fills are starts with the background fill and without, and what the line itself
// needs for all of the image.
type fills struct {
	Line     []transfer      `json:"line"`     // plain requests for all layers
	Complete []time.Duration `json:"complete"` // from prepare until all is local and verified
	On       []lab.Start     `json:"on"`
	Off      []lab.Start     `json:"off"`
}

// fillTimeout bounds the wait for a fill.
const fillTimeout = 10 * time.Minute

// measureFill starts the image with the fill on and off, in pairs, and waits until
// the one that is filled is complete.
func (b *bench) measureFill(ctx context.Context) (err error) {
	main := b.stand
	defer func() { b.stand = main }()
	stands := map[string]*lab.Stand{}
	for _, fill := range []string{"on", "off"} {
		line := shape.Line{RTT: b.rtt, Rate: b.report.Line.BytesPerSecond}
		s, err := lab.NewStand(filepath.Join(b.dir, "work", "fill-"+fill), b.binary, b.image, line, fmt.Sprintf("fill = %q\nprofile = \"off\"\n", fill))
		if err != nil {
			return err
		}
		defer func() { err = joined(err, s.Close(ctx)) }()
		if err := s.Daemon.Start(ctx); err != nil {
			return err
		}
		stands[fill] = s
	}
	for i := range b.pairs {
		b.stand = stands["on"]
		t, err := b.getAll(ctx)
		if err != nil {
			return err
		}
		b.report.Fill.Line = append(b.report.Fill.Line, t)
		on := func() error { return b.startFilled(ctx, stands["on"]) }
		off := func() error {
			b.stand = stands["off"]
			s, err := b.startFresh(ctx)
			b.logTook(err, "start, fill off: %.2f s", s.Total.Seconds())
			b.report.Fill.Off = append(b.report.Fill.Off, s)
			return err
		}
		if err := inTurn(i, on, off); err != nil {
			return err
		}
	}
	return nil
}

// startFresh starts the image of the stand, nothing cached.
func (b *bench) startFresh(ctx context.Context) (lab.Start, error) {
	if err := b.stand.Forget(ctx); err != nil {
		return lab.Start{}, err
	}
	if err := b.freshDaemon(ctx); err != nil {
		return lab.Start{}, err
	}
	return cold(ctx, b.stand.StartLazy)
}

// startFilled starts the image and waits until all of it is local and verified.
func (b *bench) startFilled(ctx context.Context, stand *lab.Stand) error {
	b.stand = stand
	if err := stand.Forget(ctx); err != nil {
		return err
	}
	if err := b.freshDaemon(ctx); err != nil {
		return err
	}
	if err := lab.DropPageCache(); err != nil {
		return err
	}
	complete := make(chan time.Duration, 1)
	begin := time.Now()
	waitCtx, cancel := context.WithTimeout(ctx, fillTimeout)
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		took, err := awaitFilled(waitCtx, stand, begin)
		if err != nil {
			failed <- err
			return
		}
		complete <- took
	}()
	s, err := stand.StartLazy(ctx)
	if err != nil {
		cancel()
		return err
	}
	b.report.Fill.On = append(b.report.Fill.On, s)
	select {
	case took := <-complete:
		b.report.Fill.Complete = append(b.report.Fill.Complete, took)
		b.log("start, fill on: %.2f s, all local after %.2f s", s.Total.Seconds(), took.Seconds())
		return nil
	case err := <-failed:
		return err
	}
}

// awaitFilled waits until all lazy layers are verified and local.
func awaitFilled(ctx context.Context, stand *lab.Stand, begin time.Time) (time.Duration, error) {
	for {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return 0, fmt.Errorf("waiting until all is local: %w", context.Cause(ctx))
		}
		img, err := stand.Daemon.Client().Image(ctx, stand.Ref)
		if err != nil {
			continue // not prepared yet
		}
		left := 0
		for _, l := range img.Layers {
			if l.Quarantined != "" {
				return 0, fmt.Errorf("layer %s is in quarantine: %s", l.Digest, l.Quarantined)
			}
			if l.Action != prepare.Left && (!l.Verified || l.Device.Present < l.Device.Chunks) {
				left++
			}
		}
		if left == 0 {
			return time.Since(begin), nil
		}
	}
}

// getAll fetches all layers of the image by plain requests, one after the other.
func (b *bench) getAll(ctx context.Context) (all transfer, err error) {
	for _, l := range b.image.Layers {
		t, err := b.get(ctx, "demo", l.Descriptor.Digest, l.Descriptor.Size)
		if err != nil {
			return all, err
		}
		all.Bytes += t.Bytes
		all.Took += t.Took
	}
	b.log("the line itself: %.2f s for %.1f MB", all.Took.Seconds(), float64(all.Bytes)/1e6)
	return all, nil
}

// completeBar compares the time until all is local with the line's own.
func (r *report) completeBar() bar {
	own := median(r.Fill.Line, func(t transfer) float64 { return t.Took.Seconds() })
	complete := median(r.Fill.Complete, time.Duration.Seconds)
	return bar{What: "whole image local, from prepare, to the line's own time", Unit: "times", Want: 1.15,
		Measured: complete.Seconds() / own.Took.Seconds(),
		Detail:   fmt.Sprintf("%.2f s, the line itself %.2f s for %.1f MB", complete.Seconds(), own.Took.Seconds(), float64(own.Bytes)/1e6)}
}

// readyFilledBar compares starts with the fill on and off.
func (r *report) readyFilledBar() bar {
	on, off := median(r.Fill.On, startTime).Total.Seconds(), median(r.Fill.Off, startTime).Total.Seconds()
	return bar{What: "ready with the fill on, against off", Unit: "times", Want: 1.15, Measured: on / off,
		Detail: fmt.Sprintf("%.2f s, off %.2f s", on, off)}
}
