// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
	"github.com/holdfast/holdfast/test/lab"
)

// TestContainersOutliveWorkers kills and swaps workers under a container that
// reads, and starts others in between.
func TestContainersOutliveWorkers(t *testing.T) {
	n := newNode(t, nodeOptions{settings: "fill = \"2MiB\"\n"}) // it goes on all the time
	img := newSmall(t, convertTo(t, testimage.EStargz))
	ref, data := n.push("small", img.Image), img.Layers[1].Descriptor.Digest
	podman := n.newPodman("podman", true)
	n.start()
	n.prepare(ref)
	n.pullWith(podman, ref)
	r := n.startReader(podman, ref, lab.ContainerFlags()...)
	mounts := n.mounts(n.daemon.RunRoot())
	for range 4 {
		_, err := n.daemon.KillWorker(t.Context())
		n.must(err)
		n.dropPages(data, img.data)
		if out, err := n.run(podman, ref, checkSums); err != nil {
			t.Errorf("a container that starts while the worker is dead: %v\n%s", err, out)
		}
		r.awaitPass()
		n.dropPages(data, img.data)
		n.must(n.daemon.Replace(t.Context(), holdfast))
		n.dropPages(data, img.data)
		r.awaitPass()
	}
	r.stop()
	if left := n.mounts(n.daemon.RunRoot()); !slices.Equal(left, mounts) {
		t.Errorf("there are the mounts %v, before there were %v", left, mounts)
	}
}

// TestRegistryOutage reads what is not local while the registry is down for a
// moment.
func TestRegistryOutage(t *testing.T) {
	n := newNode(t, nodeOptions{settings: "fill = \"off\"\n"})
	img := newSmall(t, convertTo(t, testimage.EStargz))
	ref := n.push("small", img.Image)
	podman := n.newPodman("podman", true)
	n.start()
	n.prepare(ref)
	n.pullWith(podman, ref)
	n.must(os.Mkdir(n.path("shared"), 0o700))
	volume := fmt.Sprintf("--volume=%s:/shared", n.path("shared"))
	if out, err := n.run(podman, ref, "cat /data/0 | sha256sum", volume); err != nil {
		t.Fatal(err, out)
	}

	n.must(n.registry.Close())
	done := make(chan error, 1)
	go func() {
		_, err := n.run(podman, ref, "echo > /shared/started; "+checkSums, volume)
		done <- err
	}()
	n.await("a read waits for the registry", func() bool {
		s := n.status(ref).Layers[1]
		return len(s.Device.Troubles) > 0 && s.Device.LastError == ""
	})
	if _, err := os.Stat(n.path("shared", "started")); err != nil {
		t.Errorf("the container has not started: %v", err)
	}
	select {
	case err := <-done:
		t.Fatalf("the container ended while the registry was down: %v", err)
	default:
	}
	n.startRegistry(testregistry.Options{Address: n.registry.Host()})
	n.push("small", img.Image)
	if err := <-done; err != nil {
		t.Errorf("the container did not outlast the outage: %v\n%s", err, n.log())
	}
	if s := n.status(ref).Layers[1].Device; len(s.Troubles) > 0 {
		t.Errorf("the registry is back, and the status speaks of %+v", s.Troubles)
	}
}
