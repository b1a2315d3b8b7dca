// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"fmt"
	"io"
	"sort"
	"sync"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
)

// paced is a source whose streams have to keep a pace: each chunk has to arrive
// within patience. Whoever falls behind is given up with a temporary error: a
// source that drips neither stalls nor ends. Only the time in which somebody
// waits for the source counts, in Open and Read.
type paced struct {
	blob.Source
	patience time.Duration // for one chunk
	check    time.Duration // how often the pace is looked at: at most patience
	ends     []int64       // where chunks end in the blob, ascending
}

func (p *paced) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	r := &pacedReader{paced: p, cancel: cancel, pos: offset, left: p.check}
	r.mu.Lock() // the timer may fire before all is set
	r.reach(offset)
	r.since = time.Now()
	r.timer = time.AfterFunc(p.check, r.look)
	r.mu.Unlock()
	body, err := p.Source.Open(ctx, desc, offset, length)
	if err := r.done(0, err); err != nil {
		cancel(nil)
		return nil, err
	}
	r.body = body
	return r, nil
}

type pacedReader struct {
	*paced
	body   io.ReadCloser
	cancel context.CancelCauseFunc
	timer  *time.Timer

	mu     sync.Mutex    // protects the fields below
	since  time.Time     // when the call under way began; zero if there is none
	waited time.Duration // for this chunk, in earlier calls
	left   time.Duration // until the next look
	pos    int64         // in the blob
	from   int64         // where this chunk began, or the one before ended
	end    int64         // where it ends
	slow   error         // why it was given up
}

func (r *pacedReader) Read(p []byte) (int, error) {
	r.mu.Lock()
	r.since = time.Now()
	r.timer.Reset(r.left)
	r.mu.Unlock()
	n, err := r.body.Read(p)
	return n, r.done(n, err)
}

// done ends a call that got n bytes, and returns its error.
func (r *pacedReader) done(n int, err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timer.Stop()
	took := time.Since(r.since)
	r.since = time.Time{}
	r.waited += took
	r.left = max(r.left-took, 1)
	r.pos += int64(n)
	if n > 0 && r.pos >= r.end {
		r.reach(r.pos)
	}
	if err != nil && r.slow != nil {
		return r.slow
	}
	return err
}

// reach starts the clock for the chunk that ends behind pos.
func (r *pacedReader) reach(pos int64) {
	r.from, r.waited, r.left = pos, 0, r.check
	r.end = pos
	if i := sort.Search(len(r.ends), func(i int) bool { return r.ends[i] > pos }); i < len(r.ends) {
		r.end = r.ends[i]
	}
}

// look gives the stream up if at its pace the chunk would arrive too late.
func (r *pacedReader) look() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.since.IsZero() {
		return // the call has ended meanwhile
	}
	elapsed := r.waited + time.Since(r.since)
	if elapsed < r.check { // a chunk ended meanwhile
		r.timer.Reset(r.check - elapsed)
		return
	}
	got, need := r.pos-r.from, r.end-r.from
	if elapsed < r.patience && float64(got)*float64(r.patience) >= float64(need)*float64(elapsed) {
		r.left = time.Since(r.since) + r.check
		r.timer.Reset(r.check)
		return
	}
	r.slow = blob.Temporary(fmt.Errorf("too slow: %d bytes in %s, of %d until the next chunk is whole",
		got, elapsed.Round(time.Millisecond), need))
	r.cancel(r.slow)
}

func (r *pacedReader) Close() error {
	r.timer.Stop()
	defer r.cancel(nil)
	return r.body.Close()
}
