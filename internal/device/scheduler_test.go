// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func fixed(p Priority) func() Priority { return func() Priority { return p } }

func TestAcquireLetsSoManyRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(2)
		var releases []func()
		for _, p := range []Priority{ReadAhead, Fill} {
			release, err := s.acquire(t.Context(), fixed(p))
			if err != nil {
				t.Fatal(err)
			}
			releases = append(releases, release)
		}
		var got atomic.Int32
		go func() {
			release, err := s.acquire(t.Context(), fixed(Profile))
			if err != nil {
				t.Error(err)
				return
			}
			got.Add(1)
			release()
		}()
		synctest.Wait()
		if got.Load() != 0 {
			t.Error("a third one runs")
		}
		// Those that a reader waits for do not count, and do not wait.
		for range 3 {
			if _, err := s.acquire(t.Context(), fixed(BlockedRead)); err != nil {
				t.Error(err)
			}
		}
		releases[0]()
		releases[0]() // harmless
		synctest.Wait()
		if got.Load() != 1 {
			t.Error("the third one does not run although there is room")
		}
		releases[1]()
		if n := sum(s.running[:]); n != 0 {
			t.Errorf("%d are counted as running", n)
		}
	})
}

func TestAcquireNoticesAReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(1)
		if _, err := s.acquire(t.Context(), fixed(Fill)); err != nil {
			t.Fatal(err)
		}
		var p atomic.Int32
		p.Store(int32(Fill))
		done := make(chan error, 1)
		go func() {
			_, err := s.acquire(t.Context(), func() Priority { return Priority(p.Load()) })
			done <- err
		}()
		synctest.Wait()
		p.Store(int32(BlockedRead))
		unblock := s.block()
		defer unblock()
		synctest.Wait()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		default:
			t.Error("a fetch that a reader waits for waits itself")
		}
	})
}

func TestAcquireEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(1)
		if _, err := s.acquire(t.Context(), fixed(Fill)); err != nil {
			t.Fatal(err)
		}
		why := errors.New("why")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(why)
		if _, err := s.acquire(ctx, fixed(Fill)); !errors.Is(err, why) {
			t.Errorf("error %v", err)
		}
	})
}

// yielded is how long a fetch of a priority steps back.
func yielded(t *testing.T, s *Scheduler, p Priority) time.Duration {
	t.Helper()
	start := time.Now()
	if err := s.Yield(t.Context(), fixed(p)); err != nil {
		t.Error(err)
	}
	return time.Since(start)
}

func TestYield(t *testing.T) {
	for running := BlockedRead; running < priorities; running++ {
		for p := BlockedRead; p < priorities; p++ {
			synctest.Test(t, func(t *testing.T) {
				s := NewScheduler(10)
				s.add(running, 1)
				const after = maxYield / 4
				time.AfterFunc(after, func() { s.add(running, -1) })
				want := time.Duration(0)
				if running < p && p != Profile { // see TestProfileYields
					want = after
				}
				if running == BlockedRead && p == Fill {
					want += quiet
				}
				if got := yielded(t, s, p); got != want {
					t.Errorf("priority %d waits %s for one of priority %d, want %s", p, got, running, want)
				}
				time.Sleep(maxYield) // the timer's goroutine ends before the bubble does
			})
		}
	}
}

// A profile's fetch stands back while bytes of something above it come, and not
// while that waits for an answer.
func TestProfileYields(t *testing.T) {
	for above := BlockedRead; above < priorities; above++ {
		synctest.Test(t, func(t *testing.T) {
			s := NewScheduler(10)
			s.add(above, 1)
			if got := yielded(t, s, Profile); got != 0 {
				t.Errorf("it waits %s for one of priority %d that gets nothing", got, above)
			}
			s.receive(Fill, above)
			const after = maxYield / 4
			time.AfterFunc(after, func() { s.receive(above, Fill) })
			want := time.Duration(0)
			if above < Profile {
				want = after
			}
			if got := yielded(t, s, Profile); got != want {
				t.Errorf("it waits %s for bytes of priority %d, want %s", got, above, want)
			}
			time.Sleep(maxYield) // the timer's goroutine ends before the bubble does
		})
	}
}

// Connections go to the highest priority first, and then to who came first.
func TestAcquireInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(1)
		release, err := s.acquire(t.Context(), fixed(Fill))
		if err != nil {
			t.Fatal(err)
		}
		var got []int
		for i, p := range []Priority{Fill, Profile, ReadAhead, Profile, Fill, ReadAhead} {
			go func() {
				release, err := s.acquire(t.Context(), fixed(p))
				if err != nil {
					t.Error(err)
					return
				}
				got = append(got, i)
				release()
			}()
			synctest.Wait() // until it waits
		}
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() {
			_, err := s.acquire(ctx, fixed(ReadAhead))
			left <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
		release()
		synctest.Wait()
		if want := []int{2, 5, 1, 3, 0, 4}; !slices.Equal(got, want) || len(s.queue) > 0 {
			t.Errorf("order %v, want %v; %d wait", got, want, len(s.queue))
		}
	})
}

func TestYieldIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(1)
		defer s.block()()
		if got := yielded(t, s, Fill); got != maxYield {
			t.Errorf("steps back for %s while a reader waits on a stalled source", got)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.Yield(ctx, fixed(Fill)); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	})
}

// A fetch that becomes a blocked read while it steps back goes on at once.
func TestYieldNoticesAReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(1)
		defer s.block()()
		var p atomic.Int32
		p.Store(int32(Fill))
		time.AfterFunc(maxYield/2, func() {
			p.Store(int32(BlockedRead))
			s.block()
		})
		start := time.Now()
		if err := s.Yield(t.Context(), func() Priority { return Priority(p.Load()) }); err != nil {
			t.Error(err)
		}
		if got := time.Since(start); got != maxYield/2 {
			t.Errorf("it took %s", got)
		}
	})
}
