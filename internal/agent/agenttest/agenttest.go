// SPDX-License-Identifier: Apache-2.0

// Package agenttest is a node for tests of the agent: a root directory with a
// stand-in for CRI-O that really reads its configuration, and one for systemd.
//
// It is for tests only and imports testing; production code must not import it.
package agenttest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.podman.io/storage"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast/holdfast/internal/agent"
)

// The commands of a test's program by which it is something else.
const (
	crioCommand      = "standin-crio"
	checkCommand     = "standin-crio-check"
	daemonCommand    = "standin-daemon"
	systemctlCommand = "standin-systemctl"
	daemonSocket     = "/run/holdfast/holdfast.sock"
)

// Main runs a command if the program was started as one, and then does not return. It
// comes first in TestMain.
func Main() {
	// A program with the race detector sleeps for a second before it ends; those that tests
	// start, which are many, need not.
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0")
	if len(os.Args) < 3 {
		return
	}
	var err error
	switch os.Args[1] {
	case crioCommand:
		err = standIn(os.Args[2], false)
	case checkCommand:
		err = standIn(os.Args[2], true)
	case daemonCommand:
		err = standInDaemon(os.Args[2])
	case systemctlCommand:
		os.Exit(systemctl(os.Args[2], os.Args[3:]))
	case agent.ProbeCommand:
		err = agent.ProbeImageStore(os.Args[2], os.Args[3])
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// standInDaemon answers where the Holdfast daemon does.
func standInDaemon(root string) error {
	l, err := listen(filepath.Join(root, daemonSocket))
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		_ = c.Close()
	}
}

// listen opens a socket, in place of one that a process has left.
func listen(socket string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return nil, err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", socket)
}

// Node is a node.
type Node struct {
	Root    string
	Systemd *Systemd

	listener net.Listener
}

// storageConf is what the node's administrator has written.
const storageConf = `# The administrator's own.
[storage]
driver = "overlay"
graphroot = "/var/lib/containers/storage"
runroot = "/run/containers/storage"

[storage.options]
additionalimagestores = [
]

[storage.options.overlay]
skip_mount_home = "true"
`

// New makes a node, on which CRI-O does not run yet.
func New(t testing.TB) *Node {
	t.Helper()
	n, err := Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// Start is New for programs that are no tests: in an empty directory, until Close.
func Start(root string) (*Node, error) {
	n := &Node{Root: root, Systemd: &Systemd{root: root, units: map[string]*unit{}}}
	for _, dir := range []string{"/proc", "/tmp", "/var/tmp", "/run", "/usr/share/containers", "/usr/local/bin", "/etc/containers"} {
		if err := os.MkdirAll(n.Path(dir), 0o755); err != nil {
			return nil, err
		}
	}
	err := os.WriteFile(n.Path("/etc/containers/storage.conf"), []byte(storageConf), 0o644)
	if err == nil {
		n.listener, err = net.Listen("unix", systemdSocket(root))
	}
	if err == nil {
		// containers/storage looks up mounts, and whether the kernel has overlayfs.
		err = unix.Mount("/proc", n.Path("/proc"), "", unix.MS_BIND, "")
	}
	if err != nil {
		return nil, err
	}
	go n.Systemd.serve(n.listener)
	return n, nil
}

// Close ends what runs on the node.
func (n *Node) Close() error {
	err := n.listener.Close()
	n.Systemd.Boot()
	return errors.Join(err, unix.Unmount(n.Path("/proc"), unix.MNT_DETACH))
}

// Path is where a path of the node is.
func (n *Node) Path(p string) string { return filepath.Join(n.Root, p) }

// Write writes a file of the node.
func (n *Node) Write(t testing.TB, path, text string) {
	t.Helper()
	name := n.Path(path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// Read reads a file of the node, "" if there is none.
func (n *Node) Read(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(n.Path(path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(data)
}

// Behave says what CRI-O does from its next start on.
func (n *Node) Behave(t testing.TB, b Behaviour) {
	t.Helper()
	text, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	n.Write(t, behaviourFile, string(text))
}

// Systemctl is a program that calls [Main], with the arguments by which it has the node's
// units started and stopped.
func (n *Node) Systemctl(program string) []string { return []string{program, systemctlCommand, n.Root} }

// Options are an agent's for this node.
func (n *Node) Options() agent.Options {
	o := agent.Defaults()
	o.Root, o.Systemctl = n.Root, n.Systemctl("/proc/self/exe")
	o.CheckTimeout, o.ReadyTimeout, o.Failures = 3*time.Second, 5*time.Second, 1
	return o
}

// ImageStore makes an image store with an image at a path, and returns its layer.
func (n *Node) ImageStore(t testing.TB, path, image string) string {
	t.Helper()
	run := t.TempDir()
	store, err := storage.GetStore(storage.StoreOptions{
		GraphRoot: n.Path(path), RunRoot: run, GraphDriverName: "overlay", GraphDriverOptions: []string{"overlay.skip_mount_home=true"},
	})
	if err != nil {
		t.Fatal(err)
	}
	layer, err := store.CreateLayer("", "", nil, "", false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.CreateImage("", []string{image}, layer.ID, "", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Shutdown(true); err != nil {
		t.Fatal(err)
	}
	return layer.ID
}

// Refer makes the runtime's own storage refer to a layer, as an image does that was
// pulled while the layer was in another store.
func (n *Node) Refer(t testing.TB, layer, image string) {
	t.Helper()
	n.Write(t, "/var/lib/containers/storage/overlay-images/images.json",
		fmt.Sprintf(`[{"id":"%064d","names":[%q],"layer":%q,"created":"2026-01-01T00:00:00Z"}]`, 1, image, layer))
}

// WouldStart returns why CRI-O would not start with the files that are there now.
func (n *Node) WouldStart(t testing.TB) error {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "/proc/self/exe", checkCommand, n.Root).CombinedOutput() //nolint:gosec // ourselves
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// Images lists what CRI-O lists.
func (n *Node) Images(t testing.TB) ([]string, error) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.Path(crioSocket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // there is nothing more to say
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	r, err := cri.NewImageServiceClient(conn).ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, i := range r.Images {
		names = append(names, i.RepoTags...)
	}
	return names, nil
}
