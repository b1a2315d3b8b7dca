// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// nowhere is a registry that no name server knows.
const nowhere = "registry.invalid/team/app:1"

// freePort is a loopback address where nobody listens.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // nobody has connected
	return l.Addr().String()
}

// offline is a node that has its images on a stick, and no registry at all.
type offline struct {
	*node
	small
	stick string
}

func newOffline(t *testing.T, f testimage.Format) *offline {
	t.Helper()
	o := &offline{}
	o.node = newNode(t, nodeOptions{shared: true, confDir: "registries.conf.d"})
	o.must(o.registry.Close())
	o.must(os.MkdirAll(o.path("registries.conf.d"), 0o755)) //nolint:gosec // as /etc
	o.small = newSmall(t, convertTo(t, f))
	o.stick = o.path("stick")
	o.must(o.WriteLayout(o.path("media"), nowhere))
	o.must(os.Mkdir(o.stick, 0o700))
	o.plugIn()
	t.Cleanup(func() { _ = unix.Unmount(o.stick, unix.MNT_DETACH) }) // it may be pulled
	o.configure(fmt.Sprintf("sources = [%q]\ntrusted_sources = [%q]\nsource_registry = %q\n", o.stick, o.stick, freePort(t)))
	o.node.start()
	o.await("the runtimes to be told", o.told)
	return o
}

// plugIn mounts the stick; unplug takes it away under whoever reads from it.
func (o *offline) plugIn() { o.must(unix.Mount(o.path("media"), o.stick, "", unix.MS_BIND, "")) }
func (o *offline) unplug() { o.must(unix.Unmount(o.stick, unix.MNT_DETACH)) }

// told reports whether the runtimes have been told of the stick.
func (o *offline) told() bool { return o.node.told("registries.conf.d") }

// told reports whether the runtimes have been told that something is attached.
func (n *node) told(confDir string) bool {
	_, err := os.Stat(n.path(confDir, "90-holdfast-sources.conf"))
	return err == nil
}

// conf12 has Podman of Debian 12 see the node's registries.conf.d.
func (o *offline) conf12() []string {
	return []string{"unshare", "--mount", "--propagation", "slave", "sh", "-c",
		`mount --bind "$1" /etc/containers/registries.conf.d && shift && exec "$@"`, "sh", o.path("registries.conf.d"), "podman"}
}

// Without any registry an image is pulled from a stick, by name, and runs lazily from
// there.
func TestWithoutRegistry(t *testing.T) {
	for _, f := range []testimage.Format{testimage.EStargz, testimage.Gzip} {
		t.Run(string(f), func(t *testing.T) {
			o := newOffline(t, f)
			p := o.newPodman13("podman", true)
			o.pullWith(p, nowhere)
			s := o.status(nowhere)
			if s == nil || len(s.Layers) != 3 {
				t.Fatalf("status %+v\n%s", s, o.log())
			}
			if out, err := o.run(p, nowhere, checkSums); err != nil {
				t.Errorf("%v: %s\n%s", err, out, o.log())
			}
			o.podman(p, "rmi", nowhere)
			// As imagePullPolicy: Always does.
			o.podman(p, append(append([]string{"run", "--pull=always"}, without(lab.ContainerFlags(), "--pull=never")...), nowhere)...)
			o.podman(p, "rmi", nowhere)
		})
	}
}

func without(list []string, item string) (rest []string) {
	for _, i := range list {
		if i != item {
			rest = append(rest, i)
		}
	}
	return rest
}

// Podman without a hook pulls from the stick, too, and has a whole image.
func TestWithoutRegistryPodman12(t *testing.T) {
	o := newOffline(t, testimage.Gzip)
	p, err := lab.NewPodman(o.path("client"), lab.PodmanOptions{Command: o.conf12()})
	o.must(err)
	t.Cleanup(func() { o.must(p.Reset(untilDone(t))) })
	o.pullWith(p, nowhere)
	if out, err := o.run(p, nowhere, checkSums); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// When the stick is gone the runtimes are told, and nothing of it stays. What has been
// read goes on; the rest waits for the stick, and goes on when it is back.
func TestStickIsPulled(t *testing.T) {
	o := newOffline(t, testimage.EStargz)
	o.configure("read_timeout = \"20s\"\nfill = \"off\"\nprofile = \"off\"\n")
	if _, err := o.daemon.CLI(t.Context(), nil, "serve", "--replace"); err != nil {
		t.Fatal(err)
	}
	p := o.newPodman13("podman", true)
	o.pullWith(p, nowhere)
	o.unplug()
	o.await("the runtimes to be told", func() bool { return !o.told() })
	ran := make(chan error, 1)
	go func() {
		out, err := o.run(p, nowhere, checkSums)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		ran <- err
	}()
	time.Sleep(time.Second) // the container waits for its data by then
	o.plugIn()
	if err := <-ran; err != nil {
		t.Errorf("%v\n%s", err, o.log())
	}
	o.await("the runtimes to be told", o.told)
}

// A bundle has the same image: digest, id, and what it does.
func TestBundle(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := newSmall(t, convertTo(t, testimage.Gzip))
	ref := n.push("app", img.Image)
	normal := n.newPodman("normal", false)
	wantID := n.pullWith(normal, ref)
	file := n.path("app.tar")
	for _, args := range [][]string{
		{"bundle", "create", "-o", file, "--index", ref}, {"bundle", "verify", file}, {"bundle", "list", file},
		{"store", "create", n.path("store")}, {"bundle", "import", file, "--image-store", n.path("store")}, {"store", "verify", n.path("store")},
		{"bundle", "import", file, "--to", n.path("layout")}, {"bundle", "verify", n.path("layout")},
	} {
		if out, err := n.daemon.CLI(t.Context(), nil, args...); err != nil {
			t.Fatalf("holdfast %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	p, err := lab.NewPodman(n.path("client"), lab.PodmanOptions{ImageStore: n.path("store")})
	n.must(err)
	t.Cleanup(func() { n.must(p.Reset(untilDone(t))) })
	if got := n.podman(p, "image", "inspect", "--format", "{{.Id}}", ref); got != wantID {
		t.Errorf("image ID %s, a normal pull's is %s", got, wantID)
	}
	digests := []string{n.podman(p, "image", "inspect", "--format", "{{.Digest}}", ref), n.podman(normal, "image", "inspect", "--format", "{{.Digest}}", ref)}
	if digests[0] != digests[1] {
		t.Errorf("digests %q", digests)
	}
	if out, err := n.run(p, ref, checkSums); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	// Others read it, too.
	n.output(nil, "skopeo", "copy", "--quiet", "oci-archive:"+file+":"+ref, "dir:"+n.path("copy"))
	if left, err := filepath.Glob(n.path(".app.tar*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

// The indexes in a bundle make layers lazy that carry none; nobody else is asked.
func TestBundleIsLazy(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := newSmall(t, convertTo(t, testimage.Gzip))
	ref, file := n.push("app", img.Image), n.path("app.tar")
	n.holdfast("bundle", "create", "-o", file, "--index", ref)
	n.must(n.registry.Close())
	n.configure(fmt.Sprintf("sources = [%q]\ntrusted_sources = [%q]\nsource_registry = \"\"\noffline = true\n", file, file))
	n.start()
	res := n.prepare(ref)
	if got := res.Layers[1]; got.Action != prepare.Lazy || got.Reason != "soci" {
		t.Errorf("%+v\n%s", got, n.log())
	}
	img.wantData(t, n.layerTree(res.Layers[1].Digest))
}
