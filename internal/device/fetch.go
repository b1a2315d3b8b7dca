// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"fmt"

	"github.com/holdfast/holdfast/internal/blob"
)

// fetchRounds is how often all sources are asked for a chunk: a byte that
// flipped on the way is right the second time.
const fetchRounds = 2

// start begins to fetch a run of chunks; idle is the priority of the fetch while
// nobody waits for it. The caller holds d.mu.
func (d *Device) start(run []int, idle Priority) *fetch {
	f := &fetch{idle: idle}
	f.ctx, f.cancel = context.WithCancelCause(d.ctx)
	for _, i := range run {
		fl := &flight{chunk: i, fetch: f, done: make(chan struct{})}
		f.flights = append(f.flights, fl)
		d.flights[i] = fl
	}
	sources := d.sources
	first, last := d.table.At(run[0]), d.table.At(run[len(run)-1])
	d.stats.fetched.Add(last.BlobOffset + last.BlobSize - first.BlobOffset)
	d.active.Go(func() { d.run(f, sources) })
	return f
}

// run fetches all chunks of f, from one source after the other.
func (d *Device) run(f *fetch, sources []blob.Source) {
	defer f.cancel(nil)
	err := ErrNoSource
	rest := f.flights
	for round := 0; round < fetchRounds && len(rest) > 0 && len(sources) > 0; round++ {
		var again []blob.Source // the others have had their retries
		for _, src := range sources {
			if len(rest) == 0 || f.ctx.Err() != nil {
				break
			}
			if rest, err = d.fetchFrom(f, src, rest); err != nil {
				d.report(f, src, err)
			}
			var full *writeError
			if errors.As(err, &full) {
				again = nil
				break
			}
			if errors.Is(err, blob.ErrCorrupt) {
				again = append(again, src)
			}
		}
		sources = again
	}
	if f.ctx.Err() != nil {
		err = context.Cause(f.ctx)
	}
	for _, fl := range rest {
		d.land(fl, err)
	}
}

func (d *Device) report(f *fetch, src blob.Source, err error) {
	if f.ctx.Err() != nil {
		return // it was ended by us
	}
	d.stats.failures.Add(1)
	d.log.Warn("fetching chunks", "source", src.String(), "err", err)
}

// fetchFrom fetches chunks from one source and returns those it did not get,
// with the errors.
func (d *Device) fetchFrom(f *fetch, src blob.Source, flights []*flight) ([]*flight, error) {
	release, err := d.sched.acquire(f.ctx, func() Priority { return d.priority(f) })
	if err != nil {
		return flights, err
	}
	defer release()
	chunks := make([]int, len(flights))
	for i, fl := range flights {
		chunks[i] = fl.chunk
	}
	var failed []*flight
	var last error
	at := 0
	for _, run := range d.runs(chunks) {
		part := flights[at : at+len(run)]
		at += len(run)
		rest, err := d.stream(f, src, part)
		if err != nil {
			failed, last = append(failed, rest...), errors.Join(last, fmt.Errorf("from %s: %w", src, err))
		}
	}
	return failed, last
}

// land ends the flight of a chunk.
func (d *Device) land(fl *flight, err error) {
	d.mu.Lock()
	delete(d.flights, fl.chunk)
	d.mu.Unlock()
	fl.err = err
	close(fl.done)
}

// priority is what a fetch is at present: one that a reader has caught up with
// is a blocked read, whatever it was started for.
func (d *Device) priority(f *fetch) Priority {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.waiting > 0 {
		return BlockedRead
	}
	return f.idle
}
