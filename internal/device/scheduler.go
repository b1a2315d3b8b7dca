// SPDX-License-Identifier: Apache-2.0

package device

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"
)

// Priority orders what competes for the line.
type Priority int

// The priorities, highest first.
const (
	BlockedRead Priority = iota // somebody waits for it
	ReadAhead                   // somebody is about to
	Profile                     // a workload is known to want it
	Fill                        // nobody may ever want it
	priorities
)

// maxYield is how long a fetch steps back at a time: a reader that waits on a
// stalled registry must not hold up everything else for as long.
const maxYield = time.Second

// quiet is how long a fill stands back after a reader's wait: a program that reads
// and computes in turn has the processor as well as the line to itself.
const quiet = 10 * time.Millisecond

// Scheduler shares connections and the line among the fetches of all devices.
// A blocked read never waits for anything here; the others wait for a
// connection, those of a higher priority first, and stand back while something
// above them is going on. What a profile says is wanted soon: it stands back only
// while bytes of something above it come, and has the line for as long as that
// waits for an answer. The scheduler also knows which sources failed lately. Its
// methods may be called concurrently.
type Scheduler struct {
	health health // of the sources, for all devices

	mu        sync.Mutex // protects the fields below
	running   [priorities]int
	receiving [priorities]int // those whose bytes come; kept for ones above Profile only
	queue     []*queued       // who waits for a connection, first come first
	blocked   time.Time       // when the last reader's wait ended
	limit     int             // fetches that nobody waits for which may run at once
	changed   chan struct{}   // closed and replaced whenever somebody may go on
}

// NewScheduler returns a scheduler that lets limit fetches run at once beside
// those that somebody waits for.
func NewScheduler(limit int) *Scheduler {
	return &Scheduler{limit: limit, changed: make(chan struct{})}
}

// block notes that a reader waits, until the returned function is called.
func (s *Scheduler) block() (unblock func()) {
	s.add(BlockedRead, 1)
	return func() { s.add(BlockedRead, -1) }
}

func (s *Scheduler) add(p Priority, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running[p] += n
	if p == BlockedRead && n < 0 {
		s.blocked = time.Now()
	}
	s.wake()
}

// wake lets all who wait look again. The caller holds s.mu.
func (s *Scheduler) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// receive notes that bytes come for a fetch of priority now, which was of
// priority before so far: Fill, if it was none.
func (s *Scheduler) receive(before, now Priority) {
	if before == now || before >= Profile && now >= Profile {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.receiving[before]--
	s.receiving[now]++
	s.wake()
}

// acquire waits until a fetch may start. Its priority may rise meanwhile.
func (s *Scheduler) acquire(ctx context.Context, priority func() Priority) (release func(), err error) {
	me := &queued{}
	defer s.leave(me)
	for {
		p := priority()
		if p == BlockedRead {
			return func() {}, nil // its reader is counted already
		}
		s.mu.Lock()
		if s.enter(me, p); sum(s.running[ReadAhead:]) < s.limit && s.isNext(me) {
			s.running[p]++
			s.mu.Unlock()
			return sync.OnceFunc(func() { s.add(p, -1) }), nil
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// queued is a fetch that waits for a connection.
type queued struct{ priority Priority }

// enter puts a fetch in the queue, behind those that wait already, or notes its
// priority. The caller holds s.mu.
func (s *Scheduler) enter(q *queued, p Priority) {
	q.priority = p
	if !slices.Contains(s.queue, q) {
		s.queue = append(s.queue, q)
	}
}

// isNext reports whether a fetch in the queue is the first of the highest priority.
// The caller holds s.mu.
func (s *Scheduler) isNext(q *queued) bool {
	next := slices.MinFunc(s.queue, func(a, b *queued) int { return cmp.Compare(a.priority, b.priority) })
	return next == q
}

// leave takes a fetch out of the queue, if it is there.
func (s *Scheduler) leave(q *queued) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.queue, q); i >= 0 {
		s.queue = slices.Delete(s.queue, i, i+1)
		s.wake()
	}
}

// Yield returns when nothing above the priority is going on, or after maxYield. A
// fill also waits until readers have been quiet; for a profile only what comes
// counts.
func (s *Scheduler) Yield(ctx context.Context, priority func() Priority) error {
	var timeout <-chan time.Time
	for {
		p := priority()
		s.mu.Lock()
		above, changed, noise := sum(s.running[:p]), s.changed, quiet-time.Since(s.blocked)
		if p == Profile {
			above = sum(s.receiving[:p])
		}
		s.mu.Unlock()
		if p != Fill {
			noise = 0
		}
		if above == 0 && noise <= 0 {
			return nil
		}
		if timeout == nil {
			t := time.NewTimer(maxYield)
			defer t.Stop()
			timeout = t.C
		}
		var calm <-chan time.Time
		if above == 0 {
			calm = time.After(noise)
		}
		select {
		case <-changed:
		case <-calm:
		case <-timeout:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func sum(counts []int) int {
	n := 0
	for _, c := range counts {
		n += c
	}
	return n
}
