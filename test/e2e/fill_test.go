// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// awaitFilled waits until all of an image is local and verified.
func (n *node) awaitFilled(ref string) {
	n.t.Helper()
	n.await(ref+" is local and verified", func() bool {
		return !slices.ContainsFunc(n.status(ref).Layers, func(l control.LayerStatus) bool {
			return l.Action != prepare.Left && !(l.Verified && l.Percent == 100)
		})
	})
}

// wantFilled fails the test unless the status shows two layers that are filled.
func (n *node) wantFilled(ref string) {
	n.t.Helper()
	out, err := n.daemon.CLI(n.t.Context(), nil, "status", ref)
	n.must(err)
	filled := 0
	for line := range strings.Lines(out) {
		if strings.Contains(line, "100.0%") && strings.HasSuffix(strings.TrimSpace(line), "verified") {
			filled++
		}
	}
	if filled != 2 {
		n.t.Errorf("the status shows %d layers that are filled:\n%s", filled, out)
	}
}

// TestFilled loses all mounts, and the registry for good, after an image was
// pulled that nobody has read.
func TestFilled(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := newSmall(t, convertTo(t, testimage.EStargz))
	ref := n.push("small", img.Image)
	normal, lazy := n.newClient("normal", false), n.newClient("client", true)
	want := normal.pull(ref)
	n.start()
	got := lazy.pull(ref)
	n.awaitFilled(ref)
	n.wantFilled(ref)

	n.reboot("client")
	n.must(n.registry.Close())
	n.start()
	n.wantFilled(ref)
	for _, first := range []int{0, firstID} {
		t.Run(fmt.Sprintf("ids from %d", first), func(t *testing.T) {
			normal, lazy := normal.in(t), lazy.in(t)
			wantTree, root := readTree(t, normal.mount(want.ID, first)), lazy.mount(got.ID, first)
			compareTrees(t, wantTree, readTree(t, root), wholeSeconds, ofContainer)

			// The layers are mounted from their files: they need no daemon.
			n := n.in(t)
			n.dropPages(img.Layers[1].Descriptor.Digest, img.data)
			n.must(n.daemon.Kill())
			compareTrees(t, wantTree, readTree(t, root), wholeSeconds, ofContainer)
			n.start()
		})
	}
}

// TestFilledPodman does so with Podman.
func TestFilledPodman(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := newSmall(t, convertTo(t, testimage.ZstdChunked))
	ref := n.push("small", img.Image)
	normal, lazy := n.newPodman("normal", false), n.newPodman("podman", true)
	n.pullWith(normal, ref)
	n.start()
	n.prepare(ref)
	n.pullWith(lazy, ref)
	n.podman(lazy, append(append([]string{"create", "--name=kept"}, lab.ContainerFlags()[1:]...), ref)...) // without --rm
	n.awaitFilled(ref)

	n.reboot("podman")
	n.must(n.registry.Close())
	n.start()
	n.wantFilled(ref)
	if out := n.podman(lazy, "start", "--attach", "kept"); out != "" {
		t.Errorf("a container of before the boot printed %q", out)
	}
	for _, first := range []int{0, firstID} {
		t.Run(fmt.Sprintf("ids from %d", first), func(t *testing.T) {
			n := n.in(t)
			compareTrees(t, n.containerTree(normal, ref, first), n.containerTree(lazy, ref, first), wholeSeconds, ofPodman4)
			if out, err := n.run(lazy, ref, checkSums, mapped(first)...); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	r := n.startReader(lazy, ref, append(lab.ContainerFlags(), "--name=busy")...)
	n.must(n.daemon.Kill())
	n.refuses([]string{"image " + ref, "container busy"}, "uninstall")
	n.dropPages(img.Layers[1].Descriptor.Digest, img.data)
	r.awaitPass()
	r.stop()
	n.start()
}
