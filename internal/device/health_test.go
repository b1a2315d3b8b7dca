// SPDX-License-Identifier: Apache-2.0

package device

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
)

// One fetch finds out that the first source is dead; the others, of all
// devices, do not wait for it.
func TestADeadSourceIsPaidForOnce(t *testing.T) {
	m := chunked(t, 40)
	synctest.Test(t, func(t *testing.T) {
		dead := watch(slow{named{blobtest.NewMemory(m.blob), "dead"}, 0, time.Hour})
		sched := NewScheduler(8)
		var rigs []*rig
		for range 2 {
			rigs = append(rigs, newRig(t, m, rigOptions{sched: sched}, dead, named{blobtest.NewMemory(m.blob), "good"}))
		}
		read := func(r *rig) time.Duration {
			return took(func() {
				if err := r.check(t.Context(), base, 10); err != nil {
					t.Error(err)
				}
				r.forget(t)
			})
		}
		within(t, "first read", read(rigs[0]), DefaultPatience/3, DefaultPatience/3)
		for _, r := range rigs {
			within(t, "second read", read(r), 0, 0)
		}
		// Now and then it has to show whether it is back, and not for long.
		asked := len(dead.seen())
		for range 100 {
			time.Sleep(6 * time.Second)
			within(t, "later read", read(rigs[1]), 0, trialPatience)
		}
		if n := len(dead.seen()) - asked; n < 4 || n > 8 {
			t.Errorf("the dead source was tried %d times in ten minutes", n)
		}
	})
}

func TestASourceComesBack(t *testing.T) {
	m := chunked(t, 1)
	synctest.Test(t, func(t *testing.T) {
		first := down(m, time.Minute)
		second := watch(named{blobtest.NewMemory(m.blob), "second"})
		r := newRig(t, m, rigOptions{}, named{first, "first"}, second)
		for range 100 {
			if err := r.check(t.Context(), base, 10); err != nil {
				t.Error(err)
			}
			r.forget(t)
			time.Sleep(6 * time.Second)
		}
		if n := len(second.seen()); n < 10 || n > 10+25 {
			t.Errorf("the second source was asked %d times", n)
		}
		if s := r.Stats(); s.Troubles != nil {
			t.Errorf("stats %+v", s)
		}
	})
}

// Who asks to be left alone is, within limits, by all who wait.
func TestRetryAfter(t *testing.T) {
	m := chunked(t, 1)
	for _, c := range []struct {
		after, from, to time.Duration
	}{
		{20 * time.Second, 20 * time.Second, 30 * time.Second},
		{24 * time.Hour, maxSilence, maxSilence + 10*time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			src := watch(blobtest.Inject(blobtest.NewMemory(m.blob), func(call blobtest.Call) blobtest.Fault {
				if call.N > 1 {
					return blobtest.Fault{}
				}
				return blobtest.Fault{OpenErr: &blob.TemporaryError{Err: errDown, RetryAfter: c.after}}
			}))
			sched := NewScheduler(8)
			first := newRig(t, m, rigOptions{sched: sched}, src)
			start := time.Now()
			done := make(chan error)
			for i := range 5 {
				r := first
				if i > 0 {
					r = newRig(t, m, rigOptions{sched: sched}, src)
				}
				go func() { done <- r.check(t.Context(), base, 10) }()
				synctest.Wait()
			}
			if n := len(src.seen()); n != 1 {
				t.Errorf("%d requests at first", n)
			}
			for range 5 {
				if err := <-done; err != nil {
					t.Error(err)
				}
				within(t, "read", time.Since(start), c.from, c.to)
			}
		})
	}
}

func TestOrderOfSources(t *testing.T) {
	m := made{blob: []byte("x")}
	sources := []blob.Source{refusing(m, "a", nil), refusing(m, "b", nil), refusing(m, "c", nil)}
	synctest.Test(t, func(t *testing.T) {
		var h health
		expect := func(want string, trials int) {
			t.Helper()
			got := ""
			list, err := h.order(sources)
			if err != nil {
				t.Error(err)
			}
			for _, c := range list {
				got += c.String()
				if c.trial {
					trials--
				}
			}
			if got != want || trials != 0 {
				t.Errorf("order %s, want %s; %d trials too few", got, want, trials)
			}
		}
		expect("abc", 0)
		h.failed("b", errDown)
		expect("acb", 1)
		h.failed("a", errDown)
		expect("cab", 2)
		h.failed("c", errDown)
		expect("abc", 0) // they stand for each other
		h.worked("b")
		expect("bac", 2)
		time.Sleep(shortestRest * 5 / 4)
		expect("abc", 2) // a trial each, for one caller
		expect("bac", 2)
		h.worked("a")
		h.worked("c")
		expect("abc", 0)
	})
}
