// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/pins"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
)

// goes reports whether a collection removes something.
func goes(d prepare.Decision) bool { return d.Remove }

// A pinned image is fetched whole ahead of need, is not collected, survives a restart,
// and is pulled and run with its registry gone; unpinned, it goes.
func TestPinned(t *testing.T) {
	n := newNode(t, nodeOptions{shared: true, confDir: "registries.conf.d", settings: fmt.Sprintf("source_registry = %q\n", freePort(t))})
	n.must(os.Mkdir(n.path("registries.conf.d"), 0o755)) //nolint:gosec // as /etc
	img := newSmall(t, convertTo(t, testimage.EStargz))
	ref := n.push("app", img.Image)
	n.start()
	n.holdfast("pin", ref)
	var all []pins.Pin
	if _, err := n.daemon.CLI(t.Context(), &all, "pins"); err != nil || len(all) != 1 || all[0].State != pins.Pinned || all[0].Name != ref {
		t.Fatalf("pins %+v, %v", all, err)
	}
	n.resetRequests()
	c := n.collect()
	if len(c.Decisions) == 0 || slices.ContainsFunc(c.Decisions, goes) || c.Decisions[0].Reason != "pinned" {
		t.Errorf("collected %+v", c)
	}
	n.must(n.daemon.Stop())
	n.must(n.registry.Close())
	n.start()
	n.await("the runtimes to be told", func() bool { return n.told("registries.conf.d") })
	p := n.newPodman13("podman", true)
	n.pullWith(p, ref)
	if out, err := n.run(p, ref, checkSums); err != nil {
		t.Errorf("%v: %s\n%s", err, out, n.log())
	}
	n.podman(p, "rmi", ref)
	n.holdfast("unpin", ref)
	c = n.collect()
	if !slices.ContainsFunc(c.Decisions, goes) {
		t.Errorf("kept %+v", c)
	}
	if got := n.holdfast("pins", "--json"); strings.TrimSpace(got) != "[]" {
		t.Errorf("pins %s", got)
	}
}
