// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"fmt"
	"slices"
	"strings"

	"github.com/docker/go-units"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/layer"
)

// plan is one layer on its way: what is to become of it, then what became.
type plan struct {
	LayerResult
	desc        v1.Descriptor
	compression index.Compression
	built       bool // its index was made for this image

	below   *plan         // nil for the base
	settled chan struct{} // closed when the layer is prepared or left; then
	root    layer.Root    // its root directory is known, and
	layer   *layer.Layer  // the layer, unless it is left
}

// described is the layer as the image has it.
func (l *plan) described() image.Layer { return image.Layer{Descriptor: l.desc, DiffID: l.DiffID} }

func (l *plan) leave(reason string) { l.Action, l.Reason, l.ChainID = Left, reason, "" }

func leaveAll(plans []*plan, reason string) {
	for _, l := range plans {
		l.leave(reason)
	}
}

// plan decides, before anything is fetched, which layers can be lazy.
func (p *Preparer) plan(img *resolved) []*plan {
	var plans []*plan
	parent := ""
	for i, have := range img.Layers {
		desc, diffID := have.Descriptor, have.DiffID
		l := &plan{desc: desc, settled: make(chan struct{})}
		if i > 0 {
			l.below = plans[i-1]
		}
		l.LayerResult = LayerResult{
			Digest: desc.Digest, Size: desc.Size, DiffID: diffID,
			ChainID: imagestore.ChainID(parent, diffID), Action: Lazy,
		}
		parent = l.ChainID
		var ok bool
		if l.compression, ok = layerCompression(desc.MediaType); !ok {
			l.leave(fmt.Sprintf("media type %q is not supported", desc.MediaType))
		}
		if _, have := p.layers.Get(l.Digest); !have && !p.policy.Build && !index.Annotated(desc.Annotations) && !p.indexes.Looks() {
			l.leave(index.ErrNoIndex.Error()) // now: nothing above it need be fetched
		}
		if slices.ContainsFunc(plans, func(below *plan) bool { return below.Digest == l.Digest }) {
			// overlayfs does not take a directory twice (ELOOP).
			l.leave("the image has the same layer twice, and it can only be mounted once")
		}
		plans = append(plans, l)
	}
	if n := len(plans); n > 0 && plans[n-1].Size <= p.policy.TopLayerLimit {
		plans[n-1].leave(fmt.Sprintf("a top layer of at most %s is left on purpose: image volumes need it",
			units.BytesSize(float64(p.policy.TopLayerLimit))))
	}
	cutChain(plans)
	return plans
}

// layerCompression maps the media types of layers, OCI's and Docker's.
func layerCompression(mediaType string) (index.Compression, bool) {
	switch mediaType {
	case v1.MediaTypeImageLayer, "application/vnd.docker.image.rootfs.diff.tar":
		return index.None, true
	case v1.MediaTypeImageLayerGzip, "application/vnd.docker.image.rootfs.diff.tar.gzip":
		return index.Gzip, true
	case v1.MediaTypeImageLayerZstd, "application/vnd.docker.image.rootfs.diff.tar.zstd":
		return index.Zstd, true
	}
	return index.None, false
}

// recordCompression is a layer's compression in the numbers of a record.
func recordCompression(c index.Compression) imagestore.Compression {
	switch c {
	case index.Gzip:
		return imagestore.Gzip
	case index.Zstd:
		return imagestore.Zstd
	default:
		return imagestore.Uncompressed
	}
}

// diffSize estimates the size of a layer's tar from its index.
func diffSize(idx *index.Index, annotations map[string]string) int64 {
	if s, ok := annotations["io.containers.estargz.uncompressed-size"]; ok {
		var n int64
		if _, err := fmt.Sscan(strings.TrimSpace(s), &n); err == nil && n > 0 {
			return n
		}
	}
	const block = 512 // tar's
	size := int64(2 * block)
	for _, i := range idx.Inodes {
		size += block + (i.Size+block-1)/block*block
	}
	return size
}
