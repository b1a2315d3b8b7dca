// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/sharedstore"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// sharedStore is an image store at a path, and the same one where it cannot be written
// to, as nodes have it.
func (n *node) sharedStore(name string) (path, readOnly string) {
	n.t.Helper()
	path, readOnly = n.path(name), n.path(name+"-ro")
	n.holdfast("store", "create", path)
	n.must(os.Mkdir(readOnly, 0o700))
	n.must(unix.Mount(path, readOnly, "", unix.MS_BIND, ""))
	n.t.Cleanup(func() { n.must(unix.Unmount(readOnly, unix.MNT_DETACH)) })
	n.must(unix.Mount("", readOnly, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	return path, readOnly
}

// holdfast runs a command that needs no daemon.
func (n *node) holdfast(args ...string) string {
	n.t.Helper()
	out, err := n.daemon.CLI(n.t.Context(), nil, args...)
	if err != nil {
		n.t.Fatalf("holdfast %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// storePodman is a Podman with these image stores and nothing else of ours.
func (n *node) storePodman(name string, command []string, stores ...string) *lab.Podman {
	n.t.Helper()
	p, err := lab.NewPodman(n.path(name), lab.PodmanOptions{Insecure: []string{n.registry.Host()}, MoreStores: stores, Command: command})
	n.must(err)
	n.t.Cleanup(func() { n.must(p.Reset(untilDone(n.t))) })
	return p
}

// Podman of Debian 12 and 13, and the code inside CRI-O, run an image from a store that
// they cannot write to, as they do after a normal pull, and download nothing.
func TestImageStore(t *testing.T) {
	n := newNode(t, nodeOptions{shared: true})
	img := application(t, testimage.Gzip)
	ref := n.push("app", img)
	normal := n.newPodman("normal", false)
	wantID := n.pullWith(normal, ref)
	path, store := n.sharedStore("store")
	n.holdfast("store", "add", path, ref)
	n.holdfast("store", "verify", store)
	n.resetRequests()
	for name, command := range map[string][]string{"12": nil, "13": n.debian13("podman")} {
		t.Run("Podman of Debian "+name, func(t *testing.T) {
			n := n.in(t)
			p := n.storePodman("client"+name, command, store)
			if got := n.podman(p, "image", "inspect", "--format", "{{.Id}}", ref); got != wantID {
				t.Errorf("image ID %s, a normal pull's is %s", got, wantID)
			}
			n.compareReports(normal, p, ref)
		})
	}
	t.Run("copy.Image", func(t *testing.T) {
		n := n.in(t)
		c := n.newClient("client", false)
		c.base.ImageStores = []string{store}
		if a := c.pull(ref); a.ID != wantID {
			t.Errorf("image ID %s, a normal pull's is %s", a.ID, wantID)
		}
		if got := n.pulled(img.Layers); len(got) > 0 {
			t.Errorf("downloaded %v", got)
		}
		whole := n.newClient("whole", false)
		whole.pull(ref)
		for _, first := range []int{0, firstID} {
			compareTrees(t, readTree(t, whole.mount(wantID, first)), readTree(t, c.mount(wantID, first)), ofContainer)
		}
		n.resetRequests() // of that pull
	})
	if got := n.pulled(img.Layers); len(got) > 0 {
		t.Errorf("downloaded %v", got)
	}
	if after := n.holdfast("store", "verify", path); !strings.Contains(after, " 0 problems") {
		t.Error(after)
	}
}

// Ten clients with storage of their own start an image from one store: the registry
// sends it once, when it is added.
func TestTenClientsOfAStore(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := newSmall(t, convertTo(t, testimage.Gzip))
	ref := n.push("app", img.Image)
	path, store := n.sharedStore("store")
	n.resetRequests()
	n.registry.ResetCounts()
	n.holdfast("store", "add", path, ref)
	var g errgroup.Group
	g.SetLimit(4)
	for i := range 10 {
		p := n.storePodman(fmt.Sprint("client", i), nil, store)
		g.Go(func() error {
			out, err := n.run(p, ref, checkSums)
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	n.must(g.Wait())
	var size int64
	for _, l := range img.Layers {
		size += l.Descriptor.Size
	}
	if sent := n.registry.Counts().BlobBytes; sent < size || sent > size+16<<10 { // and the configuration
		t.Errorf("the registry sent %d bytes; the image has %d", sent, size)
	}
}

// Of two stores with one name, the first in the configured order wins; a runtime's own
// store comes before both.
func TestFirstStoreWins(t *testing.T) {
	n := newNode(t, nodeOptions{})
	var stores []string
	ref := ""
	for i := range 2 {
		img := tiny(t)
		img.Cmd = []string{fmt.Sprint("/", i)}
		ref = n.push("app", img)
		path, store := n.sharedStore(fmt.Sprint("store", i))
		n.holdfast("store", "add", path, ref)
		stores = append(stores, store)
	}
	command := func(p podman) string { return n.podman(p, "image", "inspect", "--format", "{{.Config.Cmd}}", ref) }
	forth := n.storePodman("forth", nil, stores...)
	back := n.storePodman("back", nil, stores[1], stores[0])
	if a, b := command(forth), command(back); a != "[/0]" || b != "[/1]" {
		t.Errorf("%s, %s", a, b)
	}
	n.pullWith(forth, ref)
	if got := command(forth); got != "[/1]" {
		t.Errorf("after a pull: %s", got)
	}
}

// Images that come and go in a store do no harm to runtimes that have it open, nor do
// damage and a medium that is not what it was.
func TestStoreInUse(t *testing.T) {
	n := newNode(t, nodeOptions{})
	a, b := newSmall(t, convertTo(t, testimage.Gzip)), tiny(t)
	refA, refB := n.push("a", a.Image), n.push("b", b)
	path, store := n.sharedStore("store")
	n.holdfast("store", "add", path, refA)
	p := n.storePodman("client", nil, store)
	c := n.startReader(p, refA, lab.ContainerFlags()...)
	n.holdfast("store", "add", path, refB)
	if got := n.podman(p, "images", "--quiet"); len(strings.Fields(got)) != 2 {
		t.Errorf("images %q", got)
	}
	n.holdfast("store", "remove", path, refA, refB)
	if got := n.podman(p, "images", "--quiet"); got != "" {
		t.Errorf("images %q", got)
	}
	out := n.holdfast("store", "prune", path, "--grace", "0s", "--runtime-root", p.Root())
	if !strings.Contains(out, "in use: container") {
		t.Error(out)
	}
	c.stop()
	n.podman(p, "rm", "--all", "--force", "--time=0")
	n.holdfast("store", "prune", path, "--grace", "0s", "--runtime-root", p.Root())
	s, err := sharedstore.Open(path)
	n.must(err)
	if left, err := s.List(); err != nil || len(left) > 0 {
		t.Errorf("left: %+v, %v", left, err)
	}
	n.podman(p, "images")
}
