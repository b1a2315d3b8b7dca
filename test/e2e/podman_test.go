// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/test/lab"
)

// podman is a Podman that can be run.
type podman interface {
	Run(ctx context.Context, args ...string) (string, error)
}

// newPodman returns the system's Podman with a storage of its own, which a lazy
// one shares with the daemon's image store.
func (n *node) newPodman(name string, lazy bool) *lab.Podman {
	n.t.Helper()
	o := lab.PodmanOptions{Insecure: []string{n.registry.Host()}}
	if lazy {
		o.ImageStore, o.Hook, o.HookConfig = n.daemon.Store(), n.daemon.Hook(), n.daemon.Config()
	}
	p, err := lab.NewPodman(n.path(name), o)
	n.must(err)
	n.t.Cleanup(func() { n.must(p.Reset(untilDone(n.t))) })
	return p
}

// podman runs a command of a Podman and returns what it prints.
func (n *node) podman(p podman, args ...string) string {
	n.t.Helper()
	out, err := p.Run(untilDone(n.t), args...)
	if err != nil {
		n.t.Fatalf("%v\n%s\n%s", err, out, n.log())
	}
	return strings.TrimSpace(out)
}

// pullWith pulls an image and returns its id.
func (n *node) pullWith(p podman, ref string) string {
	n.t.Helper()
	n.podman(p, "pull", "--quiet", ref)
	return n.podman(p, "image", "inspect", "--format", "{{.Id}}", ref)
}

// report says what a process in a container sees of [application]: content, and
// owners in its own ids.
const report = `set -e
cat /etc/top
test ! -e /etc/fstab
find /usr /srv /app /models /etc/top ! -type d -printf '%p %y %m %U %G %s %n %l\n' | sort | sha256sum
find /usr /srv /app /models -type d -printf '%p %m %U %G\n' | sort | sha256sum
find /usr/lib/python3 /etc/ssl /srv -type f -exec sha256sum {} + | sort | sha256sum
stat -c '%n %a %u %g' /etc/top /srv /srv/setuid
cat /proc/self/uid_map
python3 /app/serve.py 1000000`

// mapped are the flags that give a container ids of its own.
func mapped(first int) []string {
	if first == 0 {
		return nil
	}
	m := fmt.Sprintf("0:%d:65536", first)
	return []string{"--uidmap", m, "--gidmap", m}
}

// runReport runs a container that reports.
func (n *node) runReport(p podman, ref string, first int) string {
	n.t.Helper()
	args := append([]string{"run"}, lab.ContainerFlags()...)
	return n.podman(p, append(append(args, mapped(first)...), ref, "sh", "-c", report)...)
}

// containerTree reads the tree of a new container's root from the host.
func (n *node) containerTree(p podman, ref string, first int) tree {
	n.t.Helper()
	args := []string{"create", "--network=host", "--pull=never"}
	id := n.podman(p, append(append(args, mapped(first)...), ref)...)
	defer n.podman(p, "rm", "--force", id)
	dir := n.podman(p, "mount", id)
	defer n.podman(p, "unmount", id)
	all := readTree(n.t, dir)
	for _, name := range []string{"etc/hosts", "etc/resolv.conf", "etc/hostname", "run", "run/.containerenv", "etc", "etc/mtab"} {
		delete(all, name) // Podman writes there
	}
	return all
}

// compareReports compares what containers see.
func (n *node) compareReports(normal, lazy podman, ref string) {
	n.t.Helper()
	for _, first := range []int{0, firstID} {
		n.t.Run(fmt.Sprintf("ids from %d", first), func(t *testing.T) {
			n := n.in(t)
			if want, got := n.runReport(normal, ref, first), n.runReport(lazy, ref, first); want != got {
				t.Errorf("a container sees\n%s\nwant, as after a normal pull,\n%s", got, want)
			}
		})
	}
}

// compareContainers compares the containers of a lazy Podman with those of a
// normal one, with ids of the host and with their own.
func (n *node) compareContainers(normal, lazy podman, ref string, adjusts ...adjust) {
	n.t.Helper()
	n.compareReports(normal, lazy, ref)
	for _, first := range []int{0, firstID} {
		n.t.Run(fmt.Sprintf("tree with ids from %d", first), func(t *testing.T) {
			n := n.in(t)
			compareTrees(t, n.containerTree(normal, ref, first), n.containerTree(lazy, ref, first), adjusts...)
		})
	}
}
