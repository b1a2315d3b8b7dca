// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"io"
	"slices"
	"time"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/startup"
)

// warmTimeout bounds reading ahead for a container that may never be started.
const warmTimeout = time.Minute

// warm reads ahead what the image's command will read first, as far as it lies
// in layers that are lazy.
func (p *Preparer) warm(img *resolved, plans []*plan) {
	ctx, cancel := context.WithTimeout(p.ctx, warmTimeout)
	defer cancel()
	var layers []startup.Layer
	var open []io.Closer
	defer func() {
		for _, c := range open {
			_ = c.Close() // read only
		}
	}()
	for _, l := range plans {
		if l.Action == Left {
			break
		}
		tree, err := l.layer.Tree()
		if err != nil {
			p.log.Warn("reading ahead for an image", "image", img.ref.String(), "err", err)
			return
		}
		open = append(open, tree)
		layers = append(layers, startup.Layer{FS: tree.FS, Data: ahead{l.layer.Device()}, Origin: tree.Origin})
	}
	c, start := img.Config.Config, time.Now()
	files, err := startup.Warm(ctx, layers, startup.Command{
		Args: slices.Concat(c.Entrypoint, c.Cmd), Env: c.Env, Dir: c.WorkingDir,
	})
	if err != nil && p.ctx.Err() == nil {
		p.log.Warn("reading ahead for an image", "image", img.ref.String(), "err", err)
		return
	}
	p.log.Debug("read ahead for an image", "image", img.ref.String(), "files", len(files), "took", time.Since(start).String())
}

// ahead fetches what is asked for and no more, since more will be asked for. It
// holds nothing: what is evicted before it is read is not worth it.
type ahead struct{ *device.Device }

func (a ahead) Wait(ctx context.Context, off int64, n int) (release func(), err error) {
	return func() {}, a.Prefetch(ctx, off, n, device.Profile)
}
