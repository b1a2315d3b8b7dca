// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// exitInUse is the program's exit code for what is in use.
const exitInUse = 5

// refuses runs a command, which must refuse and name all of these.
func (n *node) refuses(names []string, args ...string) {
	n.t.Helper()
	_, err := n.daemon.CLI(n.t.Context(), nil, args...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitInUse {
		n.t.Errorf("holdfast %v: %v, want exit code %d", args, err, exitInUse)
		return
	}
	for _, name := range names {
		if !strings.Contains(err.Error(), name) {
			n.t.Errorf("holdfast %v: %v, want it to name %s", args, err, name)
		}
	}
}

// collect runs `holdfast gc` without a grace period.
func (n *node) collect() *prepare.Collection {
	n.t.Helper()
	var c prepare.Collection
	_, err := n.daemon.CLI(n.t.Context(), &c, "gc", "--grace", "0s")
	n.must(err)
	return &c
}

// state is all that the daemon keeps for layers, by name: directories, records, mounts.
func (n *node) state() []string {
	n.t.Helper()
	records, err := os.ReadFile(filepath.Join(n.daemon.Store(), "overlay-layers", "layers.json"))
	n.must(err)
	all := append(n.mounts(n.daemon.RunRoot()), strings.TrimSpace(string(records)))
	for _, pattern := range []string{"lib/layers/*", "lib/images/*", "lib/store/overlay/??*", "run/records/*", "run/layers/*", "run/devices/*"} {
		names, err := filepath.Glob(n.path("daemon", pattern))
		n.must(err)
		all = append(all, names...)
	}
	return all
}

// TestNothingInUseGoes tries to take everything away from under a container, and
// then takes it away when the container has gone.
func TestNothingInUseGoes(t *testing.T) {
	n := newNode(t, nodeOptions{settings: "gc_grace = \"0s\"\nfill = \"off\"\n"})
	img := newSmall(t, convertTo(t, testimage.EStargz))
	ref, data := n.push("small", img.Image), img.Layers[1].Descriptor.Digest
	podman := n.newPodman("podman", true)
	n.start()
	n.prepare(ref)
	n.pullWith(podman, ref)
	flags := append([]string{"--name=busy"}, lab.ContainerFlags()[1:]...) // without --rm
	r := n.startReader(podman, ref, flags...)

	names, before := []string{"image " + ref, "container busy", podman.Root()}, n.state()
	n.refuses(names, "remove", ref)
	c := n.collect()
	if c.Freed != 0 || len(c.Decisions) != 1 || c.Decisions[0].Remove {
		t.Errorf("gc decided %+v", c)
	}
	for _, name := range names {
		if !strings.Contains(c.Decisions[0].Reason, name) {
			t.Errorf("gc gives the reason %q, want it to name %s", c.Decisions[0].Reason, name)
		}
	}
	if _, err := n.daemon.CLI(t.Context(), nil, "uninstall"); err == nil || !strings.Contains(err.Error(), "the daemon uses") {
		t.Errorf("uninstall while the daemon runs: %v", err)
	}
	if after := n.state(); !slices.Equal(after, before) {
		t.Errorf("there is now\n%q\nand there was\n%q", after, before)
	}
	n.dropPages(data, img.data)
	r.awaitPass()
	r.stop()

	n.stopDaemon()
	n.refuses(names, "uninstall")
	n.start()
	if out := n.podman(podman, "start", "--attach", "busy"); out != "" {
		t.Errorf("the container, started again, printed %q", out)
	}

	n.podman(podman, "rm", "busy")
	n.podman(podman, "rmi", ref)
	n.await("everything is gone", n.empty)
}

// empty reports whether the daemon keeps nothing of any layer.
func (n *node) empty() bool {
	n.t.Helper()
	return slices.Equal(n.state(), []string{filepath.Join(n.daemon.RunRoot(), "devices"), "[]"})
}

// withConf runs a program with a storage.conf in the place of the machine's.
const withConf = `set -e
mount --bind "$1" /etc/containers
shift
exec "$@"`

// TestUninstall takes a node apart: gc after the runtime has let go, then the
// daemon's directories.
func TestUninstall(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := newSmall(t, convertTo(t, testimage.EStargz))
	ref := n.push("small", img.Image)
	podman := n.newPodman("podman", true)
	n.start()
	n.prepare(ref)
	n.pullWith(podman, ref)
	if out, err := n.run(podman, ref, checkSums); err != nil {
		t.Fatal(err, out)
	}
	n.awaitFilled(ref)
	if c := n.collect(); c.Freed != 0 {
		t.Errorf("gc removed what is in use: %+v", c)
	}
	n.podman(podman, "rmi", ref)
	if c := n.collect(); len(c.Decisions) != 1 || !c.Decisions[0].Remove || c.Freed == 0 {
		t.Errorf("gc kept what nobody uses: %+v", c)
	}
	if !n.empty() {
		t.Errorf("left: %q", n.state())
	}
	n.prepare(ref)
	if c := n.collect(); len(c.Decisions) != 1 || !strings.Contains(c.Decisions[0].Reason, "a runtime may be about to refer to it") {
		t.Errorf("gc of what was just prepared: %+v", c)
	}
	n.must(n.daemon.Kill())

	etc := n.path("etc")
	n.must(os.Mkdir(etc, 0o700))
	uninstall := func(storageConf string, args ...string) (string, error) {
		n.must(os.WriteFile(filepath.Join(etc, "storage.conf"), []byte(storageConf), 0o600))
		args = append([]string{"--mount", "--propagation=slave", "sh", "-c", withConf, "sh", etc, holdfast, "uninstall", "--config", n.daemon.Config()}, args...)
		out, err := exec.CommandContext(t.Context(), "unshare", args...).CombinedOutput()
		return string(out), err
	}
	listed := fmt.Sprintf("[storage]\ndriver = \"overlay\"\n[storage.options]\nadditionalimagestores = [%q]\n", n.daemon.Store())
	if out, err := uninstall(listed); err == nil || !strings.Contains(out, "/etc/containers/storage.conf lists "+n.daemon.Store()) {
		t.Errorf("uninstalling a store that is listed: %v\n%s", err, out)
	}
	if out, err := uninstall("[storage]\n", "--dry-run"); err != nil || !strings.Contains(out, "would remove "+n.daemon.RunRoot()) {
		t.Errorf("trying it: %v\n%s", err, out)
	}
	conf := n.path("podman", "storage.conf")
	text, err := os.ReadFile(conf)
	n.must(err)
	n.must(os.WriteFile(conf, bytes.ReplaceAll(text, fmt.Appendf(nil, "%q", n.daemon.Store()), nil), 0o600))
	out, err := n.daemon.CLI(t.Context(), nil, "uninstall")
	n.must(err)
	for _, dir := range []string{n.daemon.RunRoot(), filepath.Dir(n.daemon.Store())} {
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) || !strings.Contains(out, "removed "+dir) {
			t.Errorf("%s is left (%v): %s", dir, err, out)
		}
	}
	if left := n.mounts(n.path("daemon")); len(left) > 0 {
		t.Errorf("mounts are left: %v", left)
	}
	if out, err := n.daemon.CLI(t.Context(), nil, "uninstall"); err != nil {
		t.Errorf("uninstalling again: %v\n%s", err, out)
	}
}
