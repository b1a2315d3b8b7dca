// SPDX-License-Identifier: Apache-2.0

package fill

import (
	"context"
	"errors"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/layer"
)

// fillMissing fetches what of a layer is neither local nor can be copied, each
// chunk verified, for as long as there is room. The layer's verdict stays as it is.
func (f *Filler) fillMissing(ctx context.Context, l *layer.Layer) error {
	err := l.Device().FillMissing(ctx, f.Pay)
	f.flush(l)
	if err != nil && !errors.Is(err, device.ErrNoRoom) {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.filled[l.Digest] = true
	return nil
}

// Pay waits until the rate allows for n bytes.
func (f *Filler) Pay(ctx context.Context, n int64) error {
	for f.limit != nil && n > 0 {
		part := min(n, burst)
		if err := f.limit.WaitN(ctx, int(part)); err != nil {
			return err
		}
		n -= part
	}
	return nil
}
