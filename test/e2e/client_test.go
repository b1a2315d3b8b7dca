// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/signature"
	istorage "go.podman.io/image/v5/storage"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage"
	"go.podman.io/storage/pkg/idtools"
	"go.podman.io/storage/pkg/reexec"
	storagetypes "go.podman.io/storage/types"
)

// clientName is the name under which this program is a client: each call is a
// process of its own, as with the runtimes, and the parent of the hook.
const clientName = "holdfast-e2e-client"

// client is go.podman.io/image and storage, the code inside CRI-O, with a storage
// of its own.
type client struct {
	node *node
	dir  string
	base call
}

// call is what the process of a client is asked to do.
type call struct {
	Op             string
	Root, RunRoot  string
	ImageStores    []string
	RegistriesConf string
	None           string // a directory that does not exist

	// Username and Password are shown to the registry; "" for a stranger.
	Username, Password string

	Ref string // of an image
	ID  string // of an image or container
	// Map gives a container ids of the host that start there; 0 means its own
	// are the host's.
	Map int
}

// answer is what comes back.
type answer struct {
	ID    string
	Path  string
	Names []string
	Size  int64
	Took  time.Duration
	Error string
}

// newClient returns a client. One that is lazy has the daemon's image store and
// the hook.
func (n *node) newClient(name string, lazy bool) *client {
	n.t.Helper()
	dir := n.path(name)
	n.must(os.MkdirAll(dir, 0o700))
	c := &client{node: n, dir: dir}
	c.base = call{
		Root: filepath.Join(dir, "root"), RunRoot: filepath.Join(dir, "run"),
		RegistriesConf: filepath.Join(dir, "registries.conf"), None: filepath.Join(dir, "none"),
	}
	hook := ""
	if lazy {
		hook = n.daemon.Hook()
		c.base.ImageStores = []string{n.daemon.Store()}
	}
	n.must(os.WriteFile(c.base.RegistriesConf, []byte(n.registriesConf(hook)), 0o600))
	return c
}

// do runs a call in a process and fails the test if it fails.
func (c *client) do(change func(*call)) answer {
	c.node.t.Helper()
	a, err := c.try(change)
	if err != nil {
		c.node.t.Fatal(err)
	}
	return a
}

func (c *client) try(change func(*call)) (answer, error) {
	q := c.base
	change(&q)
	in, err := json.Marshal(q)
	if err != nil {
		return answer{}, err
	}
	cmd := reexec.CommandContext(untilDone(c.node.t), clientName)
	cmd.Stdin = bytes.NewReader(in)
	cmd.Env = append(os.Environ(), "HOLDFAST_CONFIG="+c.node.daemon.Config())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return answer{}, fmt.Errorf("client: %s: %w: %s", q.Op, err, stderr.String())
	}
	var a answer
	if err := json.Unmarshal(out, &a); err != nil {
		return answer{}, fmt.Errorf("client: %s: %w in %q", q.Op, err, out)
	}
	if a.Error != "" {
		return a, fmt.Errorf("client: %s: %s", q.Op, a.Error)
	}
	return a, nil
}

func (c *client) pull(ref string) answer {
	c.node.t.Helper()
	return c.do(func(q *call) { q.Op, q.Ref = "pull", ref })
}

// mount makes a container of an image and mounts its root until the test ends.
func (c *client) mount(image string, firstID int) string {
	c.node.t.Helper()
	root, unmount := c.mountFor(image, firstID)
	c.node.t.Cleanup(unmount)
	return root
}

// mountFor makes a container of an image and mounts its root until unmount is
// called, after which there is no container.
func (c *client) mountFor(image string, firstID int) (root string, unmount func()) {
	c.node.t.Helper()
	a := c.do(func(q *call) { q.Op, q.ID, q.Map = "mount", image, firstID })
	return a.Path, func() { c.do(func(q *call) { q.Op, q.ID = "unmount", a.ID }) }
}

// mountImage mounts an image itself, as image volumes do, until the test ends.
func (c *client) mountImage(image string) string {
	c.node.t.Helper()
	a := c.do(func(q *call) { q.Op, q.ID = "mount image", image })
	c.node.t.Cleanup(func() { c.do(func(q *call) { q.Op, q.ID = "unmount image", image }) })
	return a.Path
}

// remove removes an image. The first try fails after it has done everything, for
// it also wants to remove our layers: go.podman.io/storage, DeleteImage.
func (c *client) remove(image string) {
	c.node.t.Helper()
	_, err := c.try(func(q *call) { q.Op, q.ID = "remove image", image })
	if err != nil && !strings.Contains(err.Error(), storage.ErrLayerUnknown.Error()) {
		c.node.t.Error(err)
	}
	if left := c.images(); slices.Contains(left, image) {
		c.node.t.Errorf("it is left among the images %v", left)
	}
}

// images lists the images and finds out their sizes, as `crictl images` does.
func (c *client) images() []string {
	c.node.t.Helper()
	return c.do(func(q *call) { q.Op = "images" }).Names
}

// clientMain is the process of a client.
func clientMain() {
	var q call
	err := json.NewDecoder(os.Stdin).Decode(&q)
	var a answer
	if err == nil {
		a, err = q.run(context.Background())
	}
	if err != nil {
		a.Error = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func (q call) run(ctx context.Context) (a answer, err error) {
	options := storagetypes.StoreOptions{GraphRoot: q.Root, RunRoot: q.RunRoot, GraphDriverName: "overlay"}
	for _, s := range q.ImageStores {
		options.GraphDriverOptions = append(options.GraphDriverOptions, "overlay.imagestore="+s)
	}
	store, err := storage.GetStore(options)
	if err != nil {
		return a, err
	}
	defer func() {
		if _, e := store.Shutdown(false); e != nil && !errors.Is(e, storage.ErrLayerUsedByContainer) {
			err = errors.Join(err, e)
		}
	}()
	switch q.Op {
	case "pull":
		return q.pull(ctx, store)
	case "mount":
		return q.mount(store)
	case "unmount":
		if _, err := store.Unmount(q.ID, true); err != nil {
			return a, err
		}
		return a, store.DeleteContainer(q.ID)
	case "mount image":
		a.Path, err = store.MountImage(q.ID, nil, "")
		return a, err
	case "unmount image":
		_, err = store.UnmountImage(q.ID, true)
		return a, err
	case "images":
		a.Names, err = images(ctx, store)
		return a, err
	case "remove image":
		_, err = store.DeleteImage(q.ID, true)
		return a, err
	}
	return a, fmt.Errorf("no such operation: %q", q.Op)
}

// images lists the images of a store, whose sizes must be known.
func images(ctx context.Context, store storage.Store) (ids []string, err error) {
	all, err := store.Images()
	if err != nil {
		return nil, err
	}
	for _, i := range all {
		ids = append(ids, i.ID)
		ref, err := istorage.Transport.NewStoreReference(store, nil, i.ID)
		if err != nil {
			return nil, err
		}
		img, err := ref.NewImage(ctx, nil)
		if err != nil {
			return nil, err
		}
		size, err := img.Size()
		if err = errors.Join(err, img.Close()); err != nil || size <= 0 {
			return nil, fmt.Errorf("size %d: %w", size, err)
		}
	}
	return ids, nil
}

func (q call) pull(ctx context.Context, store storage.Store) (a answer, err error) {
	sys := &types.SystemContext{
		SystemRegistriesConfPath: q.RegistriesConf, SystemRegistriesConfDirPath: q.None,
		AuthFilePath: q.None, DockerRegistryUserAgent: "client",
	}
	if q.Username != "" {
		sys.DockerAuthConfig = &types.DockerAuthConfig{Username: q.Username, Password: q.Password}
	}
	policy, err := signature.NewPolicyContext(&signature.Policy{
		Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()},
	})
	if err != nil {
		return a, err
	}
	defer func() { err = errors.Join(err, policy.Destroy()) }()
	src, err := docker.ParseReference("//" + q.Ref)
	if err != nil {
		return a, err
	}
	dst, err := istorage.Transport.ParseStoreReference(store, q.Ref)
	if err != nil {
		return a, err
	}
	start := time.Now()
	if _, err := copy.Image(ctx, policy, dst, src, &copy.Options{SourceCtx: sys, DestinationCtx: sys}); err != nil {
		return a, err
	}
	a.Took = time.Since(start)
	img, err := store.Image(q.Ref)
	if err != nil {
		return a, err
	}
	a.ID = img.ID
	a.Size, err = store.ImageSize(img.ID)
	return a, err
}

// mount makes a container and mounts it, as CRI-O does.
func (q call) mount(store storage.Store) (a answer, err error) {
	const ids = 65536
	options := &storage.ContainerOptions{}
	if q.Map != 0 {
		m := []idtools.IDMap{{ContainerID: 0, HostID: q.Map, Size: ids}}
		options.IDMappingOptions = storagetypes.IDMappingOptions{UIDMap: m, GIDMap: m}
	}
	container, err := store.CreateContainer("", nil, q.ID, "", "", options)
	if err != nil {
		return a, err
	}
	a.ID = container.ID
	a.Path, err = store.Mount(container.ID, "")
	if err != nil {
		return a, errors.Join(err, store.DeleteContainer(container.ID))
	}
	return a, nil
}
