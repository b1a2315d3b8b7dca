// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/retry"
)

// fetchRounds is how often a source is asked for a chunk that does not match its
// digest: a byte that flipped on the way is right the second time.
const fetchRounds = 2

// rounds is how a fetch that somebody waits for pauses when all sources have
// failed, before it asks them again.
func rounds() retry.Policy {
	return retry.Policy{Attempts: math.MaxInt, Base: time.Second, Max: 10 * time.Second}
}

// start begins to fetch a run of chunks; idle is the priority of the fetch while
// nobody waits for it. The caller holds d.mu.
func (d *Device) start(run []int, idle Priority) *fetch {
	f := d.newFetch(run, idle)
	first, last := d.table.At(run[0]), d.table.At(run[len(run)-1])
	d.stats.fetched.Add(last.BlobOffset + last.BlobSize - first.BlobOffset)
	d.active.Go(func() { d.run(f) })
	return f
}

// newFetch notes that chunks are on their way. The caller holds d.mu.
func (d *Device) newFetch(chunks []int, idle Priority) *fetch {
	f := &fetch{idle: idle, met: map[string]error{}}
	f.ctx, f.cancel = context.WithCancelCause(d.ctx)
	for _, i := range chunks {
		fl := &flight{chunk: i, fetch: f, done: make(chan struct{})}
		f.flights = append(f.flights, fl)
		d.flights[i] = fl
	}
	return f
}

// run fetches all chunks of f, in rounds: each asks one source after the other.
// There is another round as long as that may help and somebody waits.
func (d *Device) run(f *fetch) {
	defer f.cancel(nil)
	for n := 1; ; n++ {
		later, err := d.round(f)
		if d.settle(f, later, err) {
			return
		}
		if err := d.rounds.Wait(f.ctx, n, blob.Temporary(err)); err != nil {
			d.settle(f, false, err)
			return
		}
	}
}

// settle ends what has not landed with err, unless another round may help later
// and somebody waits for it.
func (d *Device) settle(f *fetch, later bool, err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.ctx.Err() != nil {
		err, later = context.Cause(f.ctx), false
	}
	left := f.left("")
	if len(left) > 0 && later && f.waiting > 0 {
		f.failed.Store(&err)
		return false
	}
	for _, fl := range left {
		delete(d.flights, fl.chunk)
		fl.err = err
		close(fl.done)
	}
	return true
}

// round asks all sources for what has not landed, and at once again for chunks
// that did not match. It returns whether a source may answer later, and why
// chunks are left, if there are any.
func (d *Device) round(f *fetch) (later bool, err error) {
	for again := true; again; {
		sources := d.Sources() // there may be better ones by now
		if len(sources) == 0 {
			return true, ErrNoSource
		}
		var list []candidate
		list, err = d.sched.health.order(sources)
		later, again = err != nil, false
		for _, c := range list {
			ask := f.left(c.String())
			if len(ask) == 0 {
				continue
			}
			blamed := f.blamed
			failed := d.fetchFrom(f, d.pace(c, ask, len(sources)), ask)
			d.note(f, c, failed)
			var full *writeError
			if errors.As(failed, &full) || f.ctx.Err() != nil {
				return false, failed // no other source helps
			}
			f.met[c.String()] = failed
			later = later || blob.IsTemporary(failed)
			again = again || f.blamed > blamed && len(f.left(c.String())) > 0
		}
		for _, c := range list {
			err = errors.Join(err, f.met[c.String()])
		}
	}
	return later, err
}

// left are the flights that have not landed, in order; without those for which a
// source has been asked often enough, if one is named.
func (f *fetch) left(src string) []*flight {
	var all []*flight
	for _, fl := range f.flights {
		select {
		case <-fl.done:
		default:
			if src == "" || fl.corrupt[src] < fetchRounds {
				all = append(all, fl)
			}
		}
	}
	return all
}

// blame notes that what a source sent for the chunk does not match its digest.
func (fl *flight) blame(src blob.Source) {
	if fl.corrupt == nil {
		fl.corrupt = map[string]int{}
	}
	fl.corrupt[src.String()]++
	fl.fetch.blamed++
}

// pace returns a source as it is asked for flights: such that all sources get
// their turn within a reader's patience.
func (d *Device) pace(c candidate, flights []*flight, sources int) blob.Source {
	p := &paced{Source: c.Source, patience: d.patience, check: d.patience / time.Duration(sources+1)}
	if c.trial {
		p.check = min(p.check, trialPatience)
	}
	for _, fl := range flights {
		chunk := d.table.At(fl.chunk)
		p.ends = append(p.ends, chunk.BlobOffset+chunk.BlobSize)
	}
	return p
}

// fetchFrom fetches chunks from one source. Those that arrive land; the error
// tells why others did not.
func (d *Device) fetchFrom(f *fetch, src blob.Source, flights []*flight) error {
	release, err := d.sched.acquire(f.ctx, func() Priority { return d.priority(f) })
	if err != nil {
		return err
	}
	defer release()
	var failed error
	at := 0
	for _, run := range d.runs(chunksOf(flights)) {
		part := flights[at : at+len(run)]
		at += len(run)
		if _, err := d.stream(f, src, part); err != nil {
			failed = errors.Join(failed, fmt.Errorf("from %s: %w", src, err))
		}
	}
	return failed
}

func chunksOf(flights []*flight) []int {
	chunks := make([]int, len(flights))
	for i, fl := range flights {
		chunks[i] = fl.chunk
	}
	return chunks
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
