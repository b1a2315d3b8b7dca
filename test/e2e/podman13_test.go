// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// enter runs a program in the root file system $1. It sees the machine, with the
// directories $2 and $3, at their own places, and mounts that are made in them
// later, and with $2/registries.conf.d as its own, if there is one. No chroot: those who are in one may not make user namespaces.
const enter = `set -e
root=$1 dir=$2 bin=$3
shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
for d in run tmp var/tmp; do mount -t tmpfs tmpfs "$root/$d"; done
for d in "$dir" "$bin"; do mkdir -p "$root$d"; mount --rbind "$d" "$root$d"; done
printf '127.0.0.1 localhost\n' > "$root/run/hosts"
if [ -d "$dir/registries.conf.d" ]; then mount --bind "$dir/registries.conf.d" "$root/etc/containers/registries.conf.d"; fi
touch "$root/etc/hosts"
mount --bind "$root/run/hosts" "$root/etc/hosts"
mkdir "$root/run/old"
cd "$root"
pivot_root . run/old
umount -l /run/old
exec chroot . "$@"`

// debian13 is the command line that runs a program of Debian 13.
func (n *node) debian13(args ...string) []string {
	n.t.Helper()
	root := filepath.Join(cacheDir(n.t), "trixie-tools")
	n.must(os.MkdirAll(cacheDir(n.t), 0o700))
	n.must(lab.Debootstrap(n.t.Context(), root, "trixie", n.t.Logf, "podman", "runc", "conmon", "netavark", "skopeo"))
	return append([]string{
		"unshare", "--mount", "--propagation", "slave", "sh", "-c", enter, "sh", root, n.dir, filepath.Dir(holdfast),
	}, args...)
}

// newPodman13 returns the Podman of Debian 13, with the image store and the hook
// if it is to be lazy.
func (n *node) newPodman13(name string, lazy bool) *lab.Podman {
	n.t.Helper()
	o := lab.PodmanOptions{Insecure: []string{n.registry.Host()}, Command: n.debian13("podman")}
	if lazy {
		o.ImageStore, o.Hook, o.HookConfig = n.daemon.Store(), n.daemon.Hook(), n.daemon.Config()
	}
	p, err := lab.NewPodman(n.path(name), o)
	n.must(err)
	n.t.Cleanup(func() { n.must(p.Reset(untilDone(n.t))) })
	return p
}

// TestPodman13 pulls and runs with Podman of Debian 13, the hook doing everything.
func TestPodman13(t *testing.T) {
	n := newNode(t, nodeOptions{shared: true})
	img := application(t, testimage.EStargz)
	ref := n.push("app", img)
	normal, lazy := n.newPodman13("normal", false), n.newPodman13("podman", true)
	t.Log(n.podman(lazy, "--version"))
	wantID := n.pullWith(normal, ref)
	n.start()
	n.resetRequests()
	// Pull and run in one, as most people do.
	args := append([]string{"run"}, lab.ContainerFlags()...)
	args = append(strings.Split(strings.Replace(strings.Join(args, "\n"), "--pull=never", "--pull=missing", 1), "\n"), ref)
	if out := n.podman(lazy, args...); !strings.HasPrefix(out, lab.ReadyLine) {
		t.Errorf("the container printed %q", out)
	}
	if got := n.podman(lazy, "image", "inspect", "--format", "{{.Id}}", ref); got != wantID {
		t.Errorf("image ID %s, a normal pull's is %s", got, wantID)
	}
	n.wantPulled(img.Layers, img.Layers[2])
	n.compareReports(normal, lazy, ref)
	n.podman(lazy, "rmi", ref)
	if _, err := n.daemon.CLI(t.Context(), nil, "remove", ref); err != nil {
		t.Errorf("removing an image that nobody has: %v", err)
	}
}

// TestPodman13WithoutDaemon pulls and runs while no daemon runs.
func TestPodman13WithoutDaemon(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := application(t, testimage.EStargz)
	ref := n.push("app", img)
	normal, lazy := n.newPodman13("normal", false), n.newPodman13("podman", true)
	wantID := n.pullWith(normal, ref)
	n.start()
	n.must(n.daemon.Stop())
	n.resetRequests()
	if got := n.pullWith(lazy, ref); got != wantID {
		t.Errorf("image ID %s, a normal pull's is %s", got, wantID)
	}
	n.wantPulled(img.Layers, img.Layers...)
	n.compareReports(normal, lazy, ref)
}
