// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestCallersShareACall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls Calls[int]
		runs := 0
		release := make(chan struct{})
		for range 3 {
			go func() {
				got, err := calls.Do(t.Context(), "k", func(context.Context) (int, error) {
					runs++
					<-release
					return 7, nil
				})
				if got != 7 || err != nil {
					t.Errorf("got %d, %v", got, err)
				}
			}()
		}
		synctest.Wait()
		close(release)
		synctest.Wait()
		if runs != 1 {
			t.Errorf("%d runs", runs)
		}
	})
}

func TestCallEndsWithItsLastCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls Calls[int]
		ended := 0
		fn := func(ctx context.Context) (int, error) {
			<-ctx.Done()
			ended++
			return 0, context.Cause(ctx)
		}
		first, leaveFirst := context.WithCancel(t.Context())
		second, leaveSecond := context.WithCancel(t.Context())
		for _, ctx := range []context.Context{first, second} {
			go func() {
				if _, err := calls.Do(ctx, "k", fn); !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
			}()
		}
		synctest.Wait()
		leaveFirst()
		synctest.Wait()
		if ended != 0 {
			t.Error("ended while somebody waits")
		}
		leaveSecond()
		synctest.Wait()
		if ended != 1 {
			t.Errorf("ended %d times", ended)
		}
		got, err := calls.Do(t.Context(), "k", func(context.Context) (int, error) { return 1, nil })
		if got != 1 || err != nil {
			t.Errorf("afterwards: %d, %v", got, err)
		}
	})
}
