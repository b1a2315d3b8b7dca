// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
)

// TestUnmodified pulls images as everybody makes them. The first node, which trusts
// nobody and has no index, reads the layers whole and leaves their indexes in a
// directory; the second one finds them there, starts lazily, and fills. On both the
// image is that of a normal pull.
func TestUnmodified(t *testing.T) {
	for _, f := range []testimage.Format{testimage.Gzip, testimage.Zstd, testimage.Uncompressed} {
		t.Run(string(f), func(t *testing.T) {
			shared := t.TempDir()
			img := application(t, f)
			first := newNode(t, nodeOptions{untrusted: true, settings: fmt.Sprintf("index.publish = [%q]\n", shared)})
			first.start()
			pullAndCompare(t, first, img)
			for _, l := range first.status(first.registry.Host() + "/app:1").Layers[:2] {
				if l.Action != prepare.Fetched || !l.Verified {
					t.Errorf("layer on the first node: %+v", l)
				}
			}
			waitFor(t, "indexes are published", func() bool { return strings.Contains(first.log(), "published indexes") || f == testimage.Zstd })

			second := newNode(t, nodeOptions{settings: fmt.Sprintf("index.stores = [%q]\n", shared)})
			second.start()
			pullAndCompare(t, second, img)
			ref := second.registry.Host() + "/app:1"
			if f == testimage.Zstd { // of one frame
				return
			}
			for _, l := range second.status(ref).Layers[:2] {
				if l.Action != prepare.Lazy || l.Index != index.SOCI {
					t.Errorf("layer on the second node: %+v", l)
				}
			}
			waitFor(t, "layers are verified", func() bool {
				for _, l := range second.status(ref).Layers[:2] {
					if l.Quarantined != "" {
						t.Fatalf("layer %s: %s", l.Digest, l.Quarantined)
					}
					if !l.Verified || l.Device.Present < l.Device.Chunks {
						return false
					}
				}
				return true
			})
		})
	}
}

// pullAndCompare pulls an image with the hook, and without, and compares them.
func pullAndCompare(t *testing.T, n *node, img testimage.Image) {
	t.Helper()
	ref := n.push("app", img)
	normal, lazy := n.newClient("normal", false), n.newClient("client", true)
	want := normal.pull(ref)
	n.resetRequests()
	got := lazy.pull(ref)
	if got.ID != want.ID {
		t.Errorf("image ID %s, a normal pull's is %s", got.ID, want.ID)
	}
	// The client itself fetches only what is left to it.
	n.wantPulled(img.Layers, img.Layers[2])
	compareTrees(t, readTree(t, normal.mount(want.ID, 0)), readTree(t, lazy.mount(got.ID, 0)), precision(testimage.Gzip), ofContainer)
}

func waitFor(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for start := time.Now(); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > time.Minute {
			t.Fatalf("a minute has passed, and not all %s", what)
		}
	}
}
