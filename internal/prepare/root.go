// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/layer"
)

// What a normal pull makes of a root directory that a layer does not describe:
// go.podman.io/storage, drivers/overlay, getLayerPermissions. The kernel takes
// the runtime's umask, 022, from the permissions of the layer below.
const (
	impliedBaseMode = unix.S_IFDIR | 0o555
	inheritedBits   = 0o755
)

var errBelowLeft = errors.New("a layer below is left to the runtime")

// inherited is the root directory of a layer that does not describe its own. It
// waits for the layer below.
func (l *plan) inherited(ctx context.Context) (layer.Root, error) {
	if l.below == nil {
		return layer.Root{Mode: impliedBaseMode, Implied: true}, nil
	}
	select {
	case <-l.below.settled:
	case <-ctx.Done():
		return layer.Root{}, context.Cause(ctx)
	}
	if l.below.Action == Left {
		return layer.Root{}, errBelowLeft
	}
	r := l.below.root
	return layer.Root{Mode: unix.S_IFDIR | r.Mode&inheritedBits, UID: r.UID, GID: r.GID, Implied: true}, nil
}

// inheritRoot completes an index that has just been read.
func (l *plan) inheritRoot(ctx context.Context, idx *index.Index) error {
	if !idx.RootImplied {
		return nil
	}
	r, err := l.inherited(ctx)
	if err != nil {
		return err
	}
	root := &idx.Inodes[0]
	root.Mode, root.UID, root.GID = r.Mode, r.UID, r.GID
	return nil
}

// checkRoot refuses a layer that was prepared on top of one with another root
// directory: its tree would not be the one of a normal pull here.
func (l *plan) checkRoot(ctx context.Context, have layer.Root) error {
	if !have.Implied {
		return nil
	}
	want, err := l.inherited(ctx)
	if err != nil {
		return err
	}
	if have != want {
		return fmt.Errorf("the layer is in use on top of a root directory of mode %o and owner %d:%d, here it has mode %o and owner %d:%d",
			have.Mode&0o7777, have.UID, have.GID, want.Mode&0o7777, want.UID, want.GID)
	}
	return nil
}
