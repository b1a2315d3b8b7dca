// SPDX-License-Identifier: Apache-2.0

package ocidir

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

// What hangs in the kernel holds nobody up whose context ends, and what it comes by
// in the end is not lost.
func TestHanging(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := make(calls, 1)
		back, dropped := make(chan int), 0
		for range 2 { // the second does not even begin
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				synctest.Wait()
				cancel()
			}()
			_, err := await(ctx, c, func() (int, error) { return <-back, nil }, func(n int) { dropped += n })
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		back <- 7
		synctest.Wait()
		if dropped != 7 || len(c) != 0 {
			t.Errorf("dropped %d, %d calls under way", dropped, len(c))
		}
	})
}
