// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"compress/gzip"
	"errors"
	stdhash "hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/testimage"
)

// lying is the compression of an eStargz whose table of contents does not tell
// the mode that its tar has.
type lying struct {
	*estargz.GzipCompressor
	*estargz.GzipDecompressor
}

func (l lying) WriteTOCAndFooter(w io.Writer, off int64, toc *estargz.JTOC, diffHash stdhash.Hash) (digest.Digest, error) {
	for _, e := range toc.Entries {
		if e.Name == "data/0" {
			e.Mode |= 0o4000
		}
	}
	return l.GzipCompressor.WriteTOCAndFooter(w, off, toc, diffHash)
}

// lie makes a layer out of a tar whose index is not that of its tar, and which is
// what its digests say all the same.
func lie(t *testing.T, raw []byte) testimage.Layer {
	t.Helper()
	compression := lying{estargz.NewGzipCompressorWithLevel(gzip.BestSpeed), &estargz.GzipDecompressor{}}
	in := io.NewSectionReader(bytes.NewReader(raw), 0, int64(len(raw)))
	blob, err := estargz.Build(in, estargz.WithCompression(compression))
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(blob)
	if err = errors.Join(err, blob.Close()); err != nil {
		t.Fatal(err)
	}
	return testimage.Layer{Bytes: content, DiffID: blob.DiffID(), Descriptor: v1.Descriptor{
		MediaType: v1.MediaTypeImageLayerGzip, Digest: digest.FromBytes(content), Size: int64(len(content)),
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: blob.TOCDigest().String()},
	}}
}

// quarantined is a node that has pulled an image whose second layer is not what
// it was said to be.
type quarantined struct {
	*node
	img   small
	lazy  *client
	ref   string
	image string // its id
}

// quarantine pulls an image and waits until its second layer is found out.
func quarantine(t *testing.T, img small, reason string) *quarantined {
	t.Helper()
	n := newNode(t, nodeOptions{})
	q := &quarantined{node: n, img: img, lazy: n.newClient("client", true), ref: n.push("bad", img.Image)}
	n.start()
	q.image = q.lazy.pull(q.ref).ID
	n.wantPulled(img.Layers, img.Layers[2])
	n.await("the layer is in quarantine", func() bool { return n.status(q.ref).Layers[1].Quarantined != "" })
	if s := n.status(q.ref).Layers[1]; s.State != "quarantined" || !strings.Contains(s.Quarantined, reason) {
		t.Errorf("status %+v, want the reason %q", s, reason)
	}
	if out, err := n.daemon.CLI(t.Context(), nil, "status", q.ref); err != nil || !strings.Contains(out, "quarantined") || !strings.Contains(out, reason) {
		t.Errorf("the status does not say why: %v\n%s", err, out)
	}
	q.wantUnreadable(q.image)
	if got := q.lazy.images(); len(got) != 1 {
		t.Errorf("the client lists the images %v", got)
	}
	return q
}

// wantUnreadable fails the test unless all reads of an image's data fail.
func (q *quarantined) wantUnreadable(image string) {
	q.t.Helper()
	root, unmount := q.lazy.mountFor(image, 0)
	defer unmount()
	if right, _ := q.img.checkData(q.t, root); right > 0 {
		q.t.Errorf("%d files of the layer in quarantine can be read", right)
	}
}

// other pulls another image, which the client must download the layer of.
func (q *quarantined) other(img testimage.Image) answer {
	q.t.Helper()
	q.resetRequests()
	got := q.lazy.pull(q.push("other", img))
	q.wantPulled(img.Layers, img.Layers[1])
	return got
}

// wantGone waits until nothing is left of the layer that is in quarantine.
func (q *quarantined) wantGone(chainID string) {
	q.t.Helper()
	d := q.img.Layers[1].Descriptor.Digest
	q.await("nothing is left of the layer in quarantine", func() bool {
		records, err := os.ReadFile(filepath.Join(q.daemon.Store(), "overlay-layers", "layers.json"))
		q.must(err)
		_, mounted := os.Lstat(q.layerTree(d))
		_, stored := os.Lstat(filepath.Join(filepath.Dir(q.daemon.Store()), "layers", d.Encoded()))
		return !strings.Contains(string(records), chainID) && os.IsNotExist(mounted) && os.IsNotExist(stored)
	})
}

// TestQuarantineOfDiffID: an image states another diff ID than its layer has. One
// that states the true one gets the layer from the registry, and is whole.
func TestQuarantineOfDiffID(t *testing.T) {
	img := newSmall(t, convertTo(t, testimage.EStargz))
	honest := img.Image
	honest.Layers = append([]testimage.Layer{}, img.Layers...)
	img.Layers[1].DiffID = digest.FromString("another tar")
	q := quarantine(t, img, "the image states "+img.Layers[1].DiffID.String())
	chainID := q.status(q.ref).Layers[1].ChainID

	got := q.other(honest)
	root, unmount := q.lazy.mountFor(got.ID, firstID)
	img.wantData(t, root)
	unmount()
	if ids := q.lazy.images(); len(ids) != 2 {
		t.Errorf("the client lists the images %v", ids)
	}
	q.lazy.remove(q.image)
	q.wantGone(chainID)
	if s := q.status(q.ref); s != nil {
		t.Errorf("the image is still prepared: %+v", s)
	}
	root, unmount = q.lazy.mountFor(got.ID, 0)
	defer unmount()
	img.wantData(t, root)
}

// TestQuarantineOfTree: the index of a layer tells another mode than its tar.
// Another image with the very same chain of layers is downloaded, but the runtime
// takes the record that it finds under the chain's name: reads fail, and are
// never wrong.
func TestQuarantineOfTree(t *testing.T) {
	img := newSmall(t, func(raw []byte) testimage.Layer { return lie(t, raw) })
	q := quarantine(t, img, `mode of "data/0"`)
	chainID := q.status(q.ref).Layers[1].ChainID

	other := img.Image
	other.Env = []string{"OTHER=1"}
	got := q.other(other)
	q.wantUnreadable(got.ID)
	q.lazy.remove(q.image)
	q.wantUnreadable(got.ID) // the other one still refers to the record
	if ids := q.lazy.images(); len(ids) != 1 {
		t.Errorf("the client lists the images %v", ids)
	}
	q.lazy.remove(got.ID)
	q.wantGone(chainID)

	// Pulled once more, it is lazy until it is found out again.
	got = q.lazy.pull(q.ref)
	q.await("it is found out again", func() bool { return q.status(q.ref).Layers[1].Quarantined != "" })
	q.wantUnreadable(got.ID)
	q.lazy.remove(got.ID)
}
