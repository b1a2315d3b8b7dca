// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"slices"
	"time"

	"github.com/holdfast/holdfast/internal/imagestore"
)

const (
	// pollInterval is how soon a runtime's new image or container is noticed.
	pollInterval = 250 * time.Millisecond
	// collectInterval is how often grace periods are looked at when nothing changes.
	collectInterval = 5 * time.Minute
)

// Run follows what the runtimes refer to, until ctx ends. At the start and
// whenever that has changed it calls used, which may be nil, with the images
// that are in use, private ones first, then the oldest first; used must not
// block for long. What has been unused for the grace period is collected.
func (p *Preparer) Run(ctx context.Context, used func([]Image)) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var seen string
	var last time.Time
	for {
		stamp := imagestore.ReferencesStamp(p.policy.RuntimeRoots) + p.images.stamp()
		if stamp != seen || time.Since(last) >= collectInterval {
			seen, last = stamp, time.Now()
			if err := p.follow(ctx, used); err != nil && ctx.Err() == nil {
				p.log.Warn("nothing is collected", "err", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// follow takes note of what has changed, tells it, and collects.
func (p *Preparer) follow(ctx context.Context, used func([]Image)) error {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	s, err := p.survey(now, true)
	done()
	if err == nil {
		err = s.unknown
	}
	if err != nil {
		return err
	}
	if used != nil {
		used(s.inUse())
	}
	j := judge{grace: p.policy.Grace, now: now, pinned: p.pinned}
	if !slices.ContainsFunc(j.decide(s), func(v verdict) bool { return v.Remove }) {
		return nil
	}
	_, err = p.Collect(ctx, p.policy.Grace, false)
	return err
}
