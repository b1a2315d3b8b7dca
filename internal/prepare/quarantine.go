// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"fmt"

	"github.com/holdfast/holdfast/internal/layer"
)

// Quarantine takes a layer that was put in quarantine out of the runtimes' sight:
// its records stay, as long as an image refers to them, but are not found any
// more for others; what nothing refers to goes at once.
//
// A runtime that downloads the layer for another image and has the very same
// layers below it still takes the record, by its id (go.podman.io/image, storage,
// commitLayer). That image's reads fail as well then: they are never wrong.
func (p *Preparer) Quarantine(ctx context.Context, l *layer.Layer) error {
	if err := p.hide(ctx, l); err != nil {
		return fmt.Errorf("hiding layer %s: %w", l.Digest, err)
	}
	_, err := p.Collect(ctx, p.policy.Grace, false)
	return err
}

func (p *Preparer) hide(ctx context.Context, l *layer.Layer) error {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return err
	}
	defer done()
	return p.store.Hide(ctx, l.Digest)
}
