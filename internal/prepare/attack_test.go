// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"archive/tar"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// A registry serves a hostile blob, with a table of contents that fits it, under
// the digest of a popular base layer. Whoever uses that base afterwards, from a
// good registry, gets the right bytes.
func TestHostileBlobUnderAPopularDigest(t *testing.T) {
	for _, format := range []testimage.Format{testimage.EStargz, testimage.ZstdChunked, testimage.ZstdChunkedStargz} {
		t.Run(string(format), func(t *testing.T) {
			good, evil := start(t, testregistry.Options{}), start(t, testregistry.Options{})
			plain := tree(1)
			base, hostile := convert(t, plain, format), convert(t, tree(666), format)
			n := newNode(t, prepare.Policy{Trusted: []string{good.Host()}}, good, evil)

			// The manifest names the popular digests, with the annotations and the size
			// of the hostile blob.
			claim := func(m *v1.Manifest, i *v1.Image) {
				m.Layers[0].Digest, i.RootFS.DiffIDs[0] = base.Descriptor.Digest, base.DiffID
			}
			evil.AddBlobAs(base.Descriptor.Digest, hostile.Bytes)
			res := n.prepare(t, pushAltered(t, evil, "app", claim, hostile, convert(t, tree(2), format)))
			if res.Lazy() != 0 || !strings.Contains(res.Layers[0].Reason, "does not match") {
				t.Errorf("result %+v", res)
			}
			if r := n.records(t); len(r) != 0 {
				t.Errorf("published: %v", r)
			}
			if _, ok := n.layers.Get(base.Descriptor.Digest); ok {
				t.Error("the hostile layer is kept")
			}

			res = n.prepare(t, push(t, good, "app", base, convert(t, tree(3), format)))
			if actions(res) != "lazy, lazy" {
				t.Errorf("result %+v", res)
			}
			n.compare(t, res.Layers[0], plain)
			// And the attacker's image changes nothing of what is there now.
			s := n.prepare(t, evil.Host()+"/app:v1")
			if s.Lazy() == 0 {
				t.Errorf("the base is there, but it was not used: %+v", s)
			}
			n.compare(t, res.Layers[0], plain)
		})
	}
}

// The right tar in a blob with another digest: a record would promise that the
// blob of that digest can be read from the registry.
func TestOtherBlobWithTheSameTar(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, prepare.Policy{}, s)
	popular, annotations := convert(t, tree(1), testimage.Gzip), convert(t, tree(1), testimage.ZstdChunked).Descriptor.Annotations
	claim := func(m *v1.Manifest, _ *v1.Image) { m.Layers[0].Digest = popular.Descriptor.Digest }
	for _, l := range []testimage.Layer{convert(t, tree(1), testimage.Zstd), convert(t, tree(1), testimage.ZstdChunked)} {
		l.Descriptor.Annotations = annotations
		s.AddBlobAs(popular.Descriptor.Digest, l.Bytes)
		res := n.prepare(t, pushAltered(t, s, "app", claim, l))
		if res.Lazy() != 0 || !strings.Contains(res.Layers[0].Reason, "blob is") {
			t.Errorf("result %+v", res)
		}
		n.nothing(t)
	}
}

// The blob is what its digest says and its tar has a popular diff ID, but the
// table of contents shows another tree: a record would carry that under the
// popular chain.
func TestHostileTOCOverAPopularTar(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, prepare.Policy{}, s)
	plain := tree(1)
	shown := convert(t, tree(666), testimage.ZstdChunked)
	body := convert(t, plain, testimage.Zstd)
	// The frames of the popular tar, then those of the other one with its TOC: to
	// a decompressor the first tar ends the layer, to the TOC only the rest is there.
	blobs := append(append([]byte(nil), body.Bytes...), shown.Bytes...)
	hostile := testimage.Layer{Bytes: blobs, DiffID: body.DiffID, Descriptor: shown.Descriptor}
	hostile.Descriptor.Digest, hostile.Descriptor.Size = digestOf(blobs), int64(len(blobs))
	hostile.Descriptor.Annotations = maps.Clone(shown.Descriptor.Annotations)
	res := n.prepare(t, push(t, s, "app", hostile))
	if res.Lazy() != 0 {
		t.Errorf("result %+v", res)
	}
	n.nothing(t)

	// With its own diff ID it is published, but as the tree that a pull would make
	// of it: the TOC is not believed.
	whole := testimage.Tar(testimage.File{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir}},
		testimage.File{Header: tar.Header{Name: "good"}, Content: []byte("good")})
	mixed := skippable(t, convert(t, whole, testimage.Zstd), shown)
	res = n.prepare(t, push(t, s, "mixed", mixed))
	if actions(res) != "fetched" {
		t.Fatalf("result %+v", res)
	}
	n.compare(t, res.Layers[0], whole)
	tree := filepath.Join(n.store.Root(), "overlay", res.Layers[0].ChainID, "diff")
	if names, err := os.ReadDir(tree); err != nil || len(names) != 1 {
		t.Errorf("the tree has %v, error %v", names, err)
	}
}

// skippable is a layer with the tar of one and, in a frame that decompressors
// skip, the table of contents of another.
func skippable(t *testing.T, l, shown testimage.Layer) testimage.Layer {
	t.Helper()
	n := len(shown.Bytes)
	frame := append([]byte{0x50, 0x2a, 0x4d, 0x18, byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)}, shown.Bytes...)
	l.Bytes = append(append([]byte(nil), l.Bytes...), frame...)
	annotations := shown.Descriptor.Annotations
	l.Descriptor.Annotations = annotations
	l.Descriptor.Digest, l.Descriptor.Size = digestOf(l.Bytes), int64(len(l.Bytes))
	return l
}

// An image states another diff ID for a layer than the one it has: its record
// would be found under the chain of the stated one.
func TestWrongDiffID(t *testing.T) {
	l, popular := convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz)
	claim := func(_ *v1.Manifest, i *v1.Image) { i.RootFS.DiffIDs[0] = popular.DiffID }
	t.Run("new layer", func(t *testing.T) {
		s := start(t, testregistry.Options{})
		n := newNode(t, prepare.Policy{}, s)
		res := n.prepare(t, pushAltered(t, s, "app", claim, l))
		if res.Lazy() != 0 || !strings.Contains(res.Layers[0].Reason, "diff ID") {
			t.Errorf("result %+v", res)
		}
		n.nothing(t)
	})
	for _, policy := range []prepare.Policy{{}, trusting()} {
		s := start(t, testregistry.Options{})
		n := newNode(t, policy, s)
		first := n.prepare(t, push(t, s, "good", l))
		res := n.prepare(t, pushAltered(t, s, "app", claim, l))
		if res.Lazy() != 0 || !strings.Contains(res.Layers[0].Reason, "diff ID") {
			t.Errorf("result %+v", res)
		}
		if r := n.records(t); len(r) != 1 || r[first.Layers[0].ChainID].DiffID != l.DiffID {
			t.Errorf("records %+v", r)
		}
	}
}

// Bytes that are damaged on the way are noticed when they are read, by an error.
func TestTrustedRegistryServesDamagedContent(t *testing.T) {
	l := convert(t, tree(1), testimage.ZstdChunked)
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	ref := push(t, s, "app", l)
	damaged := append([]byte(nil), l.Bytes...)
	for i := 0; i < len(damaged)/2; i++ { // the TOC at the end stays as it is
		damaged[i] ^= 0x55
	}
	s.AddBlobAs(l.Descriptor.Digest, damaged)
	res := n.prepare(t, ref)
	if actions(res) != "lazy" {
		t.Fatalf("result %+v", res)
	}
	file := filepath.Join(n.store.Root(), "overlay", res.Layers[0].ChainID, "diff", "file-1-1")
	if got, err := os.ReadFile(file); err == nil {
		t.Errorf("read %d bytes without an error", len(got))
	}
	have, _ := n.layers.Get(l.Descriptor.Digest)
	if stats := have.Device().Stats(); stats.Corrupt == 0 || !strings.Contains(stats.LastError, "does not match") {
		t.Errorf("stats %+v", stats)
	}
	// It is put right at the registry: the same file can be read, without a restart.
	s.AddBlobAs(l.Descriptor.Digest, l.Bytes)
	n.compare(t, res.Layers[0], tree(1))
}
