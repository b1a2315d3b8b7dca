// SPDX-License-Identifier: Apache-2.0

package prepare

import "context"

// RemoveUnchecked removes an image as if nobody had referred to it before.
func (p *Preparer) RemoveUnchecked(ctx context.Context, name string) error {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return err
	}
	defer done()
	img, err := p.Find(name)
	if err != nil {
		return err
	}
	s, err := p.takeStock()
	if err != nil {
		return err
	}
	return p.remove(ctx, s.goingWith(img))
}

// Recordings is how many images are being recorded.
func (p *Preparer) Recordings() int {
	p.recordings.mu.Lock()
	defer p.recordings.mu.Unlock()
	return len(p.recordings.running)
}
