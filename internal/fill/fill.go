// SPDX-License-Identifier: Apache-2.0

// Package fill fetches, in the background, the rest of layers that a runtime
// uses, and looks at each of them as a whole.
//
// A layer's blob is streamed once, from its start to its end, below everything
// that a reader waits for. On the way its content goes to the cache as far as it
// is missing, and blob digest, diff ID, chunks and tree are compared with what the
// layer is said to be. What holds makes the layer verified; what does not, puts it
// in quarantine (see [layer.Verdict]). With Config.Missing it is otherwise: only what
// is not on this node yet is fetched, and nothing is concluded (missing.go).
//
// A source that sends other bytes than the digest says is not the layer's fault:
// the next one is asked. Only if all of them do, more than once, the layer is
// given up.
package fill

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/layer"
)

const (
	// atOnce is how many layers are filled at once: one decompresses while the
	// other is short of bytes.
	atOnce = 2
	// The pause before a layer whose sources failed is tried again doubles.
	firstPause, maxPause = 5 * time.Second, 5 * time.Minute
	// maxLies is how often all sources may send other bytes than the digest says.
	maxLies = 3
	// burst is how many bytes a rate may be exceeded by at a time.
	burst = 1 << 20
)

// Config is what a [Filler] works with.
type Config struct {
	Layers    *layer.Set
	Scheduler *device.Scheduler // shared with the devices of the layers
	// Rate is the most that is fetched in a second, in bytes; 0 means no limit.
	Rate int64
	// Missing means that nothing is fetched which is local already. Layers are not
	// verified as a whole then.
	Missing bool
	// Quarantined is called after a layer was put in quarantine; may be nil.
	Quarantined func(context.Context, *layer.Layer)
	Logger      *slog.Logger
}

// Filler fills layers. Its methods may be called concurrently, Run once.
type Filler struct {
	Config
	limit *rate.Limiter

	mu     sync.Mutex // protects the fields below
	wanted []digest.Digest
	work   map[digest.Digest]*work
	filled map[digest.Digest]bool // what Missing has done: eviction does not begin it anew
	wake   chan struct{}          // closed, and replaced, when there may be something to do
}

// work is what is known of the filling of one layer.
type work struct {
	running  bool
	next     time.Time // not before
	failures int       // one after the other
	lies     int
	err      error
}

// New returns a Filler that has nothing to do.
func New(c Config) *Filler {
	f := &Filler{Config: c, work: map[digest.Digest]*work{}, filled: map[digest.Digest]bool{}, wake: make(chan struct{})}
	if c.Rate > 0 {
		f.limit = rate.NewLimiter(rate.Limit(c.Rate), burst)
	}
	return f
}

// Want tells which layers to fill, the most urgent first. Those that are being
// filled and are not wanted any more are finished all the same.
func (f *Filler) Want(layers []digest.Digest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wanted = slices.Clone(layers)
	for d, w := range f.work {
		if !w.running && !slices.Contains(layers, d) {
			delete(f.work, d)
		}
	}
	for d := range f.filled {
		if !slices.Contains(layers, d) {
			delete(f.filled, d)
		}
	}
	f.announce()
}

func (f *Filler) announce() {
	close(f.wake)
	f.wake = make(chan struct{})
}

// State says in a word or a line how it stands with a layer; "" if it is not
// wanted, or done and verified.
func (f *Filler) State(d digest.Digest) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.work[d]
	switch {
	case w != nil && w.running:
		return "filling"
	case w != nil && w.err != nil:
		return "waiting: " + w.err.Error()
	case f.todo(d) != nil:
		return "waiting"
	case f.filled[d]:
		return "filled, not verified"
	default:
		return ""
	}
}

// Run fills what is wanted until ctx ends.
func (f *Filler) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for range atOnce {
		g.Go(func() error {
			for ctx.Err() == nil {
				f.runNext(ctx)
			}
			return nil
		})
	}
	return g.Wait()
}

// runNext fills the next layer, or waits until there may be one.
func (f *Filler) runNext(ctx context.Context) {
	l, wake, wait := f.take(time.Now())
	if l == nil {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-wake:
		case <-timer.C:
		case <-ctx.Done():
		}
		return
	}
	start, fill := time.Now(), f.fill
	if f.Missing {
		fill = f.fillMissing
	}
	err := fill(ctx, l)
	f.done(ctx, l, err)
	switch v := l.Verdict(); {
	case ctx.Err() != nil:
	case v.Quarantined != "":
		f.Logger.Error("layer is in quarantine", "layer", l.Digest.String(), "reason", v.Quarantined)
		if f.Quarantined != nil {
			f.Quarantined(ctx, l)
		}
	case err != nil:
		f.Logger.Warn("filling layer", "layer", l.Digest.String(), "err", err)
	case f.Missing:
		f.Logger.Info("filled layer, not verified as a whole", "layer", l.Digest.String(), "complete", l.Complete(), "took", time.Since(start).Round(time.Millisecond).String())
	default:
		f.Logger.Info("filled and verified layer", "layer", l.Digest.String(), "bytes", l.Size, "took", time.Since(start).Round(time.Millisecond).String())
	}
}

// todo returns the layer if there is something to do. The caller holds f.mu.
func (f *Filler) todo(d digest.Digest) *layer.Layer {
	if !slices.Contains(f.wanted, d) || f.filled[d] {
		return nil
	}
	l, ok := f.Layers.Get(d)
	if !ok || l.Verdict() != (layer.Verdict{}) {
		return nil
	}
	return l
}

// take returns the most urgent layer that may be filled now, or how long there
// will be none.
func (f *Filler) take(now time.Time) (*layer.Layer, <-chan struct{}, time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	wait := maxPause
	for _, d := range f.wanted {
		w := f.work[d]
		if w != nil && w.running {
			continue
		}
		l := f.todo(d)
		if l == nil {
			continue
		}
		if w == nil {
			w = &work{}
			f.work[d] = w
		}
		if left := w.next.Sub(now); left > 0 {
			wait = min(wait, left)
			continue
		}
		w.running = true
		return l, f.wake, 0
	}
	return nil, f.wake, wait
}

// done takes down how it went.
func (f *Filler) done(ctx context.Context, l *layer.Layer, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.work[l.Digest]
	w.running, w.err = false, err
	if err == nil {
		delete(f.work, l.Digest)
	} else if ctx.Err() == nil {
		w.next = time.Now().Add(min(firstPause<<min(w.failures, 16), maxPause))
		w.failures++
	}
	f.announce()
}

// fill looks at the whole of a layer, from one source after the other. An error
// means that nothing is known yet.
func (f *Filler) fill(ctx context.Context, l *layer.Layer) error {
	var failed error
	lies, sources := 0, l.Device().Sources()
	for _, src := range sources {
		v, err := f.look(ctx, l, src)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err == nil {
			if v.Verified {
				f.flush(l)
			}
			return l.SetVerdict(v)
		}
		if errors.Is(err, errLie) {
			lies++
		}
		failed = errors.Join(failed, fmt.Errorf("from %s: %w", src, err))
	}
	if len(sources) == 0 {
		return device.ErrNoSource
	}
	if lies == len(sources) && f.lied(l.Digest) >= maxLies {
		return l.SetVerdict(layer.Verdict{Quarantined: failed.Error()})
	}
	return failed
}

// lied counts that all sources of a layer sent other bytes than its digest says.
func (f *Filler) lied(d digest.Digest) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.work[d]
	w.lies++
	return w.lies
}

func (f *Filler) flush(l *layer.Layer) {
	if err := l.Flush(); err != nil {
		f.Logger.Error("flushing cache", "layer", l.Digest.String(), "err", err)
	}
}
