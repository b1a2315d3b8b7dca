// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
)

// claims are the layers of the images that are being prepared: they must stay,
// although no prepared image may have them yet.
type claims struct {
	mu    sync.Mutex // protects count
	count map[digest.Digest]int
}

func (c *claims) add(d digest.Digest, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count == nil {
		c.count = map[digest.Digest]int{}
	}
	c.count[d] += n
	if c.count[d] == 0 {
		delete(c.count, d)
	}
}

func (c *claims) has(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count[d] > 0
}

// claim keeps the layers of an image until release is called. It takes the turn:
// who has it and sees no claim on a layer can remove the layer.
func (p *Preparer) claim(ctx context.Context, img *resolved) (release func(), err error) {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for _, l := range img.Layers {
		p.claims.add(l.Digest, 1)
	}
	return func() {
		for _, l := range img.Layers {
			p.claims.add(l.Digest, -1)
		}
	}, nil
}
