// SPDX-License-Identifier: Apache-2.0

package device

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
)

const (
	// A source that failed is asked last for shortestRest, and for twice as long with
	// every trial that fails, up to longestRest. Both are made a little longer at random.
	shortestRest = 15 * time.Second
	longestRest  = 2 * time.Minute
	// maxSilence bounds how long a source is not asked at all because it said so
	// (Retry-After): short enough for several trials before a reader's time is up.
	maxSilence = 30 * time.Second
	// trialPatience is what a source that failed lately gets to show that it works
	// again, if others stand by that did not fail.
	trialPatience = 5 * time.Second
	maxIll        = 1024
)

// health remembers, for all devices, which sources failed with a temporary
// error and have not worked since. Sources are known by their names. Its methods
// may be called concurrently.
type health struct {
	mu  sync.Mutex // protects the fields below
	ill map[string]*illness
}

type illness struct {
	err    error // the latest
	rests  int
	rest   time.Time // when the next trial may be
	silent time.Time // until when it asked to be left alone
}

func (i *illness) extend(now time.Time) {
	rest := min(shortestRest<<min(i.rests, 10), longestRest)
	i.rests++
	i.rest = now.Add(rest + rand.N(rest/4)) //nolint:gosec // no secret
}

// candidate is a source to ask.
type candidate struct {
	blob.Source
	trial bool // it failed lately, and another stands by
}

// order returns the sources in the order in which to ask them: as they are
// given, but those that failed lately last. One of the latter whose rest is over
// has its own place again, for one caller. Sources that asked to be left alone are left
// out; then the error tells which, and what they said.
func (h *health) order(sources []blob.Source) ([]candidate, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	var list, last []candidate
	var silent error
	well := 0
	for _, src := range sources {
		i := h.ill[src.String()]
		switch {
		case i == nil:
			well++
			list = append(list, candidate{Source: src})
		case now.Before(i.silent):
			silent = errors.Join(silent, fmt.Errorf("%s asked for patience: %w", src, i.err))
		case now.Before(i.rest):
			last = append(last, candidate{src, true})
		default:
			i.extend(now)
			list = append(list, candidate{src, true})
		}
	}
	list = append(list, last...)
	for i := range list {
		list[i].trial = list[i].trial && well > 0
	}
	return list, silent
}

// failed notes a temporary error of a source.
func (h *health) failed(src string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	i := h.ill[src]
	if i == nil {
		if h.ill == nil || len(h.ill) >= maxIll {
			h.ill = map[string]*illness{} // the others are found out anew
		}
		i = &illness{}
		h.ill[src] = i
	}
	i.err = err
	if !now.Before(i.rest) {
		i.extend(now)
	}
	var temporary *blob.TemporaryError
	if errors.As(err, &temporary) && temporary.RetryAfter > 0 {
		i.silent = now.Add(min(temporary.RetryAfter, maxSilence))
	}
}

// worked notes that a source works.
func (h *health) worked(src string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.ill, src)
}
