// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"archive/tar"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// version is a tar of so many files, of the sizes that file systems have, most of
// them small. In each version above 0 some of a hundred are other ones.
func version(n, changed uint64, files int) []byte {
	random := rand.New(rand.NewPCG(1, 1)) //nolint:gosec // no secret
	all := []testimage.File{{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir}}}
	for i := range uint64(files) { //nolint:gosec // small
		size := int(math.Exp(random.NormFloat64()*1.6 + 8.5)) // median 5 KB, mean 17 KB
		seed := i
		if random.Uint64N(100) < changed && n > 0 {
			seed, size = n<<32+i, size+int(n)*10 //nolint:gosec // small
		}
		all = append(all, testimage.File{
			Header:  tar.Header{Name: fmt.Sprintf("dir-%d/file-%d", i/30, i)},
			Content: testimage.Bytes(size, seed),
		})
	}
	return testimage.Tar(all...)
}

// TestNewVersion reads all of a new version of an image whose old version is local:
// most of it is not fetched again, whatever its layers are now.
func TestNewVersion(t *testing.T) {
	for _, format := range []testimage.Format{testimage.EStargz, testimage.ZstdChunked, testimage.ZstdChunkedStargz} {
		t.Run(string(format), func(t *testing.T) {
			s := start(t, testregistry.Options{})
			n := newNode(t, trusting(), s)
			old := version(0, 5, 2000)
			first := n.prepare(t, push(t, s, "app", convert(t, old, format)))
			n.compare(t, first.Layers[0], old)

			s.ResetCounts()
			plain := version(1, 5, 2000)
			content := convert(t, plain, format)
			second := n.prepare(t, push(t, s, "app", content))
			n.compare(t, second.Layers[0], plain)
			counts := s.Counts()
			share := 100 * float64(counts.BlobBytes) / float64(content.Descriptor.Size)
			stats := n.stats(t, second)
			t.Logf("fetched %.1f%% of %d bytes with %d requests: %+v", share, content.Descriptor.Size, counts.Blob, stats)
			if share > 15 {
				t.Errorf("%.1f%% of its bytes were fetched", share)
			}
			if stats.CopiedChunks < int64(stats.Chunks)*9/10 {
				t.Errorf("%d of %d chunks were copied", stats.CopiedChunks, stats.Chunks)
			}
		})
	}
}

// stats is what the device of an image's first layer has done.
func (n *node) stats(t *testing.T, res *prepare.Result) device.Stats {
	t.Helper()
	l, ok := n.layers.Get(res.Layers[0].Digest)
	if !ok {
		t.Fatal("the layer is gone")
	}
	return l.Device().Stats()
}

// TestWhoMayCopy: content of an image that its registry shows to some only goes into
// images of the same repository, also after a restart, and when its name has moved
// on. That of public images goes into all.
func TestWhoMayCopy(t *testing.T) {
	public, private := start(t, testregistry.Options{}), start(t, testregistry.Options{Manner: testregistry.Quay, Private: true})
	one, two := version(0, 0, 50), version(1, 20, 50)
	for _, tt := range []struct {
		name     string
		from, to *testregistry.Server
		old, new string
		want     bool
	}{
		{"the same private repository", private, private, "team/app", "team/app", true},
		{"another private repository", private, private, "team/app", "team/other", false},
		{"a longer name", private, private, "team/app", "team/app/other", false},
		{"private to public", private, public, "team/app", "team/app", false},
		{"public to private", public, private, "team/app", "team/app", true},
		{"public to public", public, public, "one/app", "another/app", true},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, restart %v", tt.name, restart), func(t *testing.T) {
				n := newNode(t, trusting(), public, private)
				first := n.login(t, push(t, tt.from, tt.old, convert(t, one, testimage.ZstdChunked)))
				n.compare(t, first.Layers[0], one)
				ref := push(t, tt.to, tt.new, convert(t, two, testimage.ZstdChunked))
				second := n.login(t, ref)
				if restart {
					n.restart(t)
					second = n.login(t, ref)
				}
				n.compare(t, second.Layers[0], two)
				if s := n.stats(t, second); s.CopiedChunks > 0 != tt.want {
					t.Errorf("%+v", s)
				}
			})
		}
	}
}

// A layer that is in two images has readers of both: what only one of them may see
// does not go into it.
func TestSharedLayerCopiesForAll(t *testing.T) {
	s := start(t, testregistry.Options{Manner: testregistry.Quay, Private: true})
	n := newNode(t, trusting(), s)
	one, two := version(0, 0, 50), version(1, 20, 50)
	first := n.login(t, push(t, s, "team/app", convert(t, one, testimage.ZstdChunked)))
	n.compare(t, first.Layers[0], one)
	shared := convert(t, two, testimage.ZstdChunked)
	n.login(t, push(t, s, "team/other", shared))
	second := n.login(t, push(t, s, "team/app", shared))
	n.compare(t, second.Layers[0], two)
	if s := n.stats(t, second); s.CopiedChunks > 0 {
		t.Errorf("%+v", s)
	}
}
