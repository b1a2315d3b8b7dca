// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// The evictor begins when less than this share of the limit is free, and ends
	// when there is twice as much, so that readers seldom wait for it.
	reserveShare = 32
	// maxPass is how many bytes are evicted at a time, to hold no lock for long.
	maxPass = 256 << 20
	// fullPause is how long a full disk is left alone before the next try.
	fullPause = time.Second
)

// Space is the disk space that the caches of a node share, and the memory for
// what does not fit. All methods may be called concurrently.
//
// Space counts what is on disk: chunks that are present, in blocks, those that
// are being written, and frozen files.
type Space struct {
	limit    int64 // bytes; 0: none
	log      *slog.Logger
	overflow overflow

	read     atomic.Int64  // bytes read so far, the clock of recency
	full     atomic.Bool   // the last chunk could not be stored
	evicted  atomic.Int64  // bytes
	wake     chan struct{} // tells Run that there is something to evict
	evicting chan struct{} // has an element while chunks are being evicted

	mu     sync.Mutex // protects the fields below
	used   int64
	frozen int64
	files  map[*File]struct{}
	again  time.Time // when to try the disk again
}

// SpaceStats is the state of a [Space].
type SpaceStats struct {
	Limit    int64 `json:"limit"`    // bytes; 0: none
	Used     int64 `json:"used"`     // bytes on disk
	Frozen   int64 `json:"frozen"`   // of those, bytes that cannot be evicted
	Evicted  int64 `json:"evicted"`  // bytes, since the start
	InMemory int64 `json:"inMemory"` // bytes of chunks that could not be stored
	// Full means that the disk is full, or the limit reached with nothing to
	// evict: what is fetched stays in memory for as long as it is needed.
	Full bool `json:"full"`
}

// NewSpace returns a space of limit bytes, or without a limit if that is 0.
func NewSpace(limit int64, log *slog.Logger) *Space {
	return &Space{
		limit: limit, log: log,
		overflow: overflow{max: overflowSize, admission: semaphore.NewWeighted(overflowSize)},
		wake:     make(chan struct{}, 1), evicting: make(chan struct{}, 1),
		files: map[*File]struct{}{},
	}
}

// Stats returns the state of the space.
func (s *Space) Stats() SpaceStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return SpaceStats{
		Limit: s.limit, Used: s.used, Frozen: s.frozen,
		Evicted: s.evicted.Load(), InMemory: s.overflow.size(), Full: s.full.Load(),
	}
}

// MayFreeze reports whether there is room to freeze another size bytes: frozen
// files may take half of the limit, so that the other half can be evicted.
func (s *Space) MayFreeze(size int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.limit == 0 || s.frozen+size <= s.limit/2
}

// Run keeps some of the space free, until ctx ends.
func (s *Space) Run(ctx context.Context) error {
	for {
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil
		}
		for ctx.Err() == nil {
			room, err := s.makeRoom(ctx, 0)
			if err != nil {
				return nil //nolint:nilerr // ctx has ended
			}
			if room {
				break
			}
			select { // until something is released
			case <-time.After(fullPause):
			case <-ctx.Done():
			}
		}
	}
}

// Reserve takes n bytes for something that is not a [File] yet, evicting what it
// must, and reports whether it could. [Space.Release] gives them back.
func (s *Space) Reserve(ctx context.Context, n int64) (bool, error) { return s.reserve(ctx, n) }

// Release gives back what was reserved.
func (s *Space) Release(n int64) { s.give(n) }

// reserve takes n bytes, evicting what it must, and reports whether it could.
func (s *Space) reserve(ctx context.Context, n int64) (bool, error) {
	for {
		if s.paused() {
			return false, nil
		}
		if s.take(n, s.limit) {
			return true, nil
		}
		room, err := s.makeRoom(ctx, n)
		if err != nil {
			return false, err
		}
		if !room {
			s.full.Store(true)
			return false, nil
		}
	}
}

// tryReserve takes n bytes of what nobody else is likely to need, and reports
// whether it could.
func (s *Space) tryReserve(n int64) bool {
	return !s.paused() && s.take(n, s.limit-s.limit/reserveShare)
}

// paused reports whether the disk was full just now.
func (s *Space) paused() bool {
	if !s.full.Load() {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.again)
}

func (s *Space) take(n, limit int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.limit > 0 && s.used+n > limit {
		return false
	}
	s.used += n
	s.nudge()
	return true
}

// nudge tells the evictor that there may be something to do. The caller holds s.mu.
func (s *Space) nudge() {
	if s.limit > 0 && s.used > s.limit-s.limit/reserveShare {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

func (s *Space) give(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= n
}

func (s *Space) freeze(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frozen += n
}

// noteFull notes that the disk is full.
func (s *Space) noteFull() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.again = time.Now().Add(fullPause)
	if !s.full.Swap(true) {
		s.log.Warn("the disk of the cache is full: what is fetched is not stored")
	}
}

// noteStored notes that a chunk has been stored.
func (s *Space) noteStored() {
	if s.full.Load() && s.full.Swap(false) {
		s.log.Info("the cache has room again")
	}
}

func (s *Space) add(f *File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[f] = struct{}{}
	s.used += f.bytes
	if f.frozen {
		s.frozen += f.bytes
	}
	s.nudge()
}

// remove ends counting and evicting a file.
func (s *Space) remove(f *File) {
	s.evicting <- struct{}{} // not while it is being punched
	defer func() { <-s.evicting }()
	s.overflow.remove(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.files[f]; !ok {
		return
	}
	delete(s.files, f)
	s.used -= f.bytes
	if f.frozen {
		s.frozen -= f.bytes
	}
}

// tick notes that n bytes are being read, and returns the time: what is read at
// the same time, or within 1 MiB of reading, is equally old.
func (s *Space) tick(n int64) uint32 { return uint32(s.read.Add(n) >> 20) } //nolint:gosec // 4 EiB

// makeRoom evicts until there is room for n bytes more, or, if n is 0, for what
// readers may need next, and reports whether there is. Others who wait for the
// same find it done.
func (s *Space) makeRoom(ctx context.Context, n int64) (bool, error) {
	select {
	case s.evicting <- struct{}{}:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	defer func() { <-s.evicting }()
	low, high := s.limit-2*(s.limit/reserveShare), s.limit-s.limit/reserveShare
	if n > 0 {
		high = s.limit - n
	}
	for first := true; ; first = false {
		s.mu.Lock()
		used := s.used
		s.mu.Unlock()
		switch {
		case first && used <= high, !first && used <= min(low, high):
			return true, nil
		case n > s.limit:
			return false, nil
		}
		if s.pass(min(used-min(low, high), maxPass)) == 0 {
			return used <= high, nil
		}
		if n > 0 {
			low = high // the rest is for Run
		}
	}
}

// pass evicts about goal bytes of what has not been read for the longest time,
// and returns how much it has freed. The caller has s.evicting.
func (s *Space) pass(goal int64) (freed int64) {
	s.mu.Lock()
	files := make([]*File, 0, len(s.files))
	for f := range s.files {
		files = append(files, f)
	}
	s.mu.Unlock()
	sel := selectOldest(files, s.tick(0), goal)
	for try := 0; freed == 0 && try < 2; try++ {
		for _, f := range files {
			n, err := f.evict(&sel)
			if err != nil {
				s.log.Error("evicting chunks", "err", err)
			}
			freed += n
		}
		sel.anyAge, sel.left = true, goal // all that was selected is held
	}
	s.evicted.Add(freed)
	return freed
}

// selectOldest finds the age from which on goal bytes are older.
func selectOldest(files []*File, now uint32, goal int64) selection {
	var sizes [buckets]int64
	for _, f := range files {
		if f.Frozen() {
			continue
		}
		for i := range f.extents {
			if n := f.extents[i].bytes.Load(); n > 0 {
				sizes[f.extents[i].age(now)] += n
			}
		}
	}
	b := buckets - 1
	for ; b > 0 && sizes[b] < goal; b-- {
		goal -= sizes[b]
	}
	return selection{now: now, bucket: b, left: goal}
}
