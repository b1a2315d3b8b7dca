// SPDX-License-Identifier: Apache-2.0

package testregistry

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Random makes answers to requests for ranges of blobs go wrong at random, in
// every way there is. It is for registries that send blobs themselves. Its
// methods may be called by several goroutines.
type Random struct {
	mu          sync.Mutex // protects the fields below
	random      *rand.Rand
	probability float64
	counts      map[string]int64
}

// NewRandom returns one whose choices depend on the seed and on the order of the
// requests. Probability is how many of the answers go wrong, of 1.
func NewRandom(seed uint64, probability float64) *Random {
	return &Random{
		random:      rand.New(rand.NewPCG(seed, 0)), //nolint:gosec // no secret
		probability: probability,
		counts:      map[string]int64{},
	}
}

// Counts returns how many answers have gone wrong, by kind.
func (r *Random) Counts() map[string]int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.counts)
}

// Fault is what Options.Fault wants.
func (r *Random) Fault(req *http.Request, _ int) Fault {
	first, last, ok := rangeOf(req)
	if !ok || !strings.Contains(req.URL.Path, "/blobs/") {
		return Fault{}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.random.Float64() >= r.probability {
		return Fault{}
	}
	kind, f := r.choose(first, last)
	f.happens = func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.counts[kind]++
	}
	return f
}

// choose chooses what goes wrong with the range; what takes time is rarer.
func (r *Random) choose(first, last int64) (kind string, f Fault) {
	at := r.random.Int64N(last - first + 1)
	switch n := r.random.IntN(100); {
	case n < 25:
		return "byte changed", Fault{At: at, Flip: byte(1 + r.random.IntN(255))}
	case n < 40:
		return "zeros", Fault{At: at, Zero: true}
	case n < 55:
		return "truncated", Fault{At: at, Truncate: true}
	case n < 70 && first > 0:
		return "other range", Fault{Shift: -1 - r.random.Int64N(first)}
	case n < 76:
		return "other range, said so", Fault{Header: contentRange(first+1, last+1, "*")}
	case n < 80:
		return "other size", Fault{Header: contentRange(first, last, fmt.Sprint(last+1<<40))}
	case n < 84:
		return "no range", Fault{IgnoreRange: true}
	case n < 90:
		status := []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
			http.StatusServiceUnavailable, http.StatusForbidden, http.StatusNotFound}
		return "status", Fault{Status: status[r.random.IntN(len(status))]}
	case n < 94:
		return "reset", Fault{Reset: true}
	case n < 98:
		return "stalled", Fault{At: at, Stall: true}
	default:
		return "dripping", Fault{At: at, Drip: 50 * time.Millisecond}
	}
}

func contentRange(first, last int64, size string) http.Header {
	return http.Header{"Content-Range": {fmt.Sprintf("bytes %d-%d/%s", first, last, size)}}
}

// rangeOf is the range that a request asks for, as blob/registry writes it.
func rangeOf(r *http.Request) (first, last int64, ok bool) {
	_, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
	return first, last, err == nil && 0 <= first && first <= last
}
