// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// watchdog ends a preparation that makes no progress.
type watchdog struct {
	ctx     context.Context
	timer   *time.Timer
	timeout time.Duration
	stop    func()
}

func newWatchdog(ctx context.Context, timeout time.Duration) *watchdog {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watchdog{ctx: ctx, timeout: timeout}
	w.timer = time.AfterFunc(timeout, func() { cancel(fmt.Errorf("no progress for %s", timeout)) })
	w.stop = func() {
		w.timer.Stop()
		cancel(nil)
	}
	return w
}

// progress keeps the watchdog quiet for another timeout.
func (w *watchdog) progress() {
	if w.ctx.Err() == nil {
		w.timer.Reset(w.timeout)
	}
}

// watch returns a function that passes events on, one at a time, and counts
// each as progress.
func (w *watchdog) watch(next func(Event)) func(Event) {
	var mu sync.Mutex
	return func(e Event) {
		w.progress()
		if next == nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		next(e)
	}
}

// untilStopped returns a function that calls next, until stop has been called.
func untilStopped(next func(Event)) (progress func(Event), stop func()) {
	var mu sync.Mutex
	return func(e Event) {
			mu.Lock()
			defer mu.Unlock()
			if next != nil {
				next(e)
			}
		}, func() {
			mu.Lock()
			defer mu.Unlock()
			next = nil
		}
}
