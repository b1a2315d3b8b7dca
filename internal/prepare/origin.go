// SPDX-License-Identifier: Apache-2.0

package prepare

import "github.com/holdfast/holdfast/internal/layer"

// serve gives a layer the places that the image was read from, and notes that the
// image has it: see [layer.Layer.AddOrigin].
func (r *resolved) serve(l *layer.Layer) {
	l.AddOrigin(r.ref.Name(), !r.private)
	l.Device().AddSources(r.sources())
}

// restoreOrigins notes, for the layers of a prepared image, where it came from.
func (p *Preparer) restoreOrigins(img Image) {
	for _, l := range img.Layers {
		have, ok := p.layers.Get(l.Digest)
		for _, repository := range img.Repositories {
			if ok {
				have.AddOrigin(repository, !img.Private)
			}
		}
	}
}
