// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
	"github.com/holdfast/holdfast/test/lab"
)

// node is a machine to itself, in one directory: a registry, a daemon, and the
// clients that a test adds.
type node struct {
	t        *testing.T
	dir      string
	registry *testregistry.Server
	daemon   *lab.Daemon
	traffic  *traffic
}

// traffic is what the registry was asked for.
type traffic struct {
	mu       sync.Mutex // protects the field below
	requests []request
}

// request is what the registry saw of a client.
type request struct{ agent, method, path string }

// nodeOptions says how a node differs from one that trusts its registry.
type nodeOptions struct {
	untrusted bool
	private   bool // the registry wants to know who reads
	pushable  bool // and lets them push
	// shared lets mounts that the daemon makes appear in the namespaces of
	// others, as it is where systemd runs.
	shared   bool
	settings string // more of the daemon's configuration
	confDir  string // where in the node's directory registries.conf.d is, if it has one
}

// newNode sets up a node; its daemon does not run yet. At the end of the test
// everything of it is gone, or the test fails.
func newNode(t *testing.T, o nodeOptions) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf-e2e-") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, traffic: &traffic{}}
	t.Cleanup(n.checkNothingLeft) // after all other cleanups
	if o.shared {
		n.must(unix.Mount(dir, dir, "", unix.MS_BIND, ""))
		t.Cleanup(func() { n.must(unix.Unmount(dir, unix.MNT_DETACH)) })
		n.must(unix.Mount("", dir, "", unix.MS_SHARED, ""))
	}
	options := testregistry.Options{Private: o.private}
	if o.pushable {
		options.Push = testregistry.PushAllowed
	}
	n.startRegistry(options)
	if err := os.WriteFile(n.path("registries.conf"), []byte(n.registriesConf("")), 0o600); err != nil {
		t.Fatal(err)
	}
	settings := fmt.Sprintf("registries_conf = %q\nregistries_conf_dir = %q\nruntimes = [\"podman\", %q]\nruntime_roots = %s\n",
		n.path("registries.conf"), n.path(cmp.Or(o.confDir, "none")), self(t), tomlList(n.path("client", "root"), n.path("podman", "root")))
	if !o.untrusted {
		settings += fmt.Sprintf("trusted = [%q]\n", n.registry.Host())
	}
	n.daemon, err = lab.NewDaemon(holdfast, n.path("daemon"), settings+o.settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.stopDaemon)
	return n
}

// startRegistry starts the node's registry, empty.
func (n *node) startRegistry(o testregistry.Options) {
	n.t.Helper()
	o.Fault = n.traffic.observe
	server, err := testregistry.Start(o)
	n.must(err)
	n.t.Cleanup(func() { n.must(server.Close()) })
	n.registry = server
}

// self is the name of this program, as the hook sees its parent's.
func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Base(exe)
}

func tomlList(items ...string) string { return `["` + strings.Join(items, `", "`) + `"]` }

func (n *node) path(elem ...string) string { return filepath.Join(append([]string{n.dir}, elem...)...) }

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// registriesConf is a registries.conf for a client of the node's registry.
func (n *node) registriesConf(hook string) string {
	conf := "unqualified-search-registries = []\n"
	if hook != "" {
		conf += fmt.Sprintf("additional-layer-store-auth-helper = %q\n", hook)
	}
	return conf + fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", n.registry.Host())
}

// configure adds to the daemon's configuration.
func (n *node) configure(settings string) {
	n.t.Helper()
	f, err := os.OpenFile(n.daemon.Config(), os.O_APPEND|os.O_WRONLY, 0)
	n.must(err)
	_, err = f.WriteString(settings)
	n.must(errors.Join(err, f.Close()))
}

// start starts the daemon.
func (n *node) start() {
	n.t.Helper()
	n.must(n.daemon.Start(n.t.Context()))
}

// stopDaemon stops the daemon, which must leave no mount.
func (n *node) stopDaemon() {
	n.t.Helper()
	if err := n.daemon.Stop(); err != nil {
		n.t.Error(err)
	}
	if left := n.mounts(n.daemon.RunRoot()); len(left) > 0 {
		n.t.Errorf("the daemon left mounts: %v", left)
	}
}

func (n *node) mounts(dir string) []string {
	n.t.Helper()
	points, err := lab.MountsBelow(dir)
	n.must(err)
	return points
}

// push adds an image to the registry and returns its reference.
func (n *node) push(name string, img testimage.Image) string {
	n.t.Helper()
	_, err := img.PushTo(n.registry, name, "1")
	n.must(err)
	return n.registry.Host() + "/" + name + ":1"
}

// prepare has an image prepared, as an administrator does.
func (n *node) prepare(ref string) *prepare.Result {
	n.t.Helper()
	var res prepare.Result
	if _, err := n.daemon.CLI(n.t.Context(), &res, "prepare", ref); err != nil {
		n.t.Fatalf("%v\n%s", err, n.log())
	}
	return &res
}

// status is the daemon's state of an image, nil if it has not been prepared.
func (n *node) status(ref string) *control.ImageStatus {
	n.t.Helper()
	s, err := n.daemon.Client().Image(n.t.Context(), ref)
	if errors.Is(err, prepare.ErrUnknown) {
		return nil
	}
	n.must(err)
	return s
}

func (n *node) log() string {
	data, err := os.ReadFile(n.daemon.LogFile())
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// layerTree is where the daemon has mounted the tree of a layer.
func (n *node) layerTree(d digest.Digest) string {
	return filepath.Join(n.daemon.RunRoot(), "layers", d.Encoded()[:32], "diff")
}

// observe notes who asks the registry for what; it lets everything pass.
func (tr *traffic) observe(r *http.Request, _ int) testregistry.Fault {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.requests = append(tr.requests, request{r.UserAgent(), r.Method, r.URL.Path})
	return testregistry.Fault{}
}

// resetRequests forgets what was asked for.
func (n *node) resetRequests() {
	n.traffic.mu.Lock()
	defer n.traffic.mu.Unlock()
	n.traffic.requests = nil
	n.registry.ResetCounts()
}

// pulled returns which of the layers were asked for by anybody but the daemon.
func (n *node) pulled(layers []testimage.Layer) []digest.Digest {
	n.traffic.mu.Lock()
	defer n.traffic.mu.Unlock()
	var got []digest.Digest
	for _, l := range layers {
		if slices.ContainsFunc(n.traffic.requests, func(r request) bool {
			return !strings.HasPrefix(r.agent, "holdfast/") && strings.HasSuffix(r.path, "/blobs/"+l.Descriptor.Digest.String())
		}) {
			got = append(got, l.Descriptor.Digest)
		}
	}
	return got
}

// wantPulled fails the test unless the clients asked for exactly these layers
// of all.
func (n *node) wantPulled(all []testimage.Layer, want ...testimage.Layer) {
	n.t.Helper()
	if got := n.pulled(all); !slices.Equal(got, digests(want)) {
		n.t.Errorf("clients downloaded the layers %v of %v, want %v\n%s", got, digests(all), digests(want), n.log())
	}
}

func digests(layers []testimage.Layer) []digest.Digest {
	var all []digest.Digest
	for _, l := range layers {
		all = append(all, l.Descriptor.Digest)
	}
	return all
}

// checkNothingLeft fails the test if something of the node is still mounted,
// running or behind a loop device, and removes its directory.
func (n *node) checkNothingLeft() {
	// The storage driver of the runtimes leaves this one, see
	// go.podman.io/storage, drivers/overlay, Init.
	home := func(p string) bool {
		return filepath.Base(p) == "overlay" && filepath.Base(filepath.Dir(p)) == "root"
	}
	if left := slices.DeleteFunc(n.mounts(n.dir), home); len(left) > 0 {
		n.t.Errorf("mounts are left: %v", left)
	}
	// What ends a container goes on for a moment after `podman run`.
	var left []string
	for range 100 {
		if left = n.remains(); len(left) == 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if len(left) > 0 {
		n.t.Errorf("processes or devices are left: %q", left)
	}
	if n.t.Failed() {
		n.t.Logf("log of the daemon:\n%s", n.log())
	}
	if err := lab.RemoveAll(n.dir); err != nil {
		n.t.Error(err)
	}
}

// remains are the processes and loop devices that know of the node.
func (n *node) remains() []string {
	n.t.Helper()
	var left []string
	for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/proc/[0-9]*/mountinfo", "/sys/block/loop*/loop/backing_file"} {
		names, err := filepath.Glob(pattern)
		n.must(err)
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil { // it has ended
				continue
			}
			for line := range strings.Lines(string(data)) {
				if !strings.Contains(line, n.dir+"/") {
					continue
				}
				if filepath.Base(name) == "mountinfo" && strings.HasSuffix(strings.Fields(line)[4], "/root/overlay") {
					continue // see above
				}
				left = append(left, name+": "+line)
				break
			}
		}
	}
	return left
}

// untilDone is a context for what must be done after the test's own has ended.
func untilDone(t *testing.T) context.Context { return context.WithoutCancel(t.Context()) }

// info asks the daemon about itself.
func (n *node) info() control.Info {
	n.t.Helper()
	info, err := n.daemon.Client().Info(n.t.Context())
	n.must(err)
	return info
}
