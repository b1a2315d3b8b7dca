// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/testimage"
)

// TestPodman12 runs containers with the system's Podman, which knows no hook:
// the image is prepared before.
func TestPodman12(t *testing.T) {
	n := newNode(t, nodeOptions{})
	if v := n.podman(n.newPodman("podman", true), "--version"); !strings.Contains(v, "version 4.") {
		t.Logf("this is %s, not the one of Debian 12", v)
	}
	img := application(t, testimage.EStargz)
	ref := n.push("app", img)
	normal, lazy := n.newPodman("normal", false), n.newPodman("podman", true)
	wantID := n.pullWith(normal, ref)
	n.start()
	n.prepare(ref)
	n.resetRequests()
	if got := n.pullWith(lazy, ref); got != wantID {
		t.Errorf("image ID %s, a normal pull's is %s", got, wantID)
	}
	n.wantPulled(img.Layers, img.Layers[2])
	n.compareContainers(normal, lazy, ref, precision(testimage.EStargz), ofPodman4)

	var exit *exec.ExitError
	if _, err := n.daemon.CLI(t.Context(), nil, "remove", ref); !errors.As(err, &exit) || exit.ExitCode() != 5 {
		t.Errorf("removing an image that Podman has: %v, want exit code 5", err)
	}
	n.podman(lazy, "rmi", ref)
	if out := n.podman(lazy, "images", "--quiet"); out != "" {
		t.Errorf("images are left: %s", out)
	}
	if _, err := n.daemon.CLI(t.Context(), nil, "remove", ref); err != nil {
		t.Errorf("removing an image that nobody has: %v", err)
	}
	if layers := n.mounts(n.daemon.RunRoot()); len(layers) > 1 { // the devices
		t.Errorf("mounts are left: %v", layers)
	}
}

// ofPodman4 takes out the root directory's mode too: the storage of Podman 4 gives
// a base layer 0555, whatever it says itself, and that is inherited. The lazy one
// is what the layer says, as with later versions.
func ofPodman4(name string, f *file) {
	if name == "" {
		f.mode, f.modTime = 0, time.Time{}
	}
}

// TestPodman12WithoutDaemon pulls and runs an image that was prepared by a daemon
// which has been stopped.
func TestPodman12WithoutDaemon(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := application(t, testimage.EStargz)
	ref := n.push("app", img)
	normal, lazy := n.newPodman("normal", false), n.newPodman("podman", true)
	wantID := n.pullWith(normal, ref)
	n.start()
	n.prepare(ref)
	n.must(n.daemon.Stop())
	n.resetRequests()
	if got := n.pullWith(lazy, ref); got != wantID {
		t.Errorf("image ID %s, a normal pull's is %s", got, wantID)
	}
	n.wantPulled(img.Layers, img.Layers...)
	n.compareContainers(normal, lazy, ref, ofContainer)
}
