// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/storage/pkg/reexec"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/credentials"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/layer/layertest"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/sources"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestMain(m *testing.M) {
	if reexec.Init() { // of containers/storage
		return
	}
	goleak.VerifyTestMain(m)
}

// node is a machine that prepares images: all of the daemon but its socket.
type node struct {
	*prepare.Preparer
	layers *layer.Set
	store  *imagestore.Store
	dir    string
	log    *logs
	policy prepare.Policy
	memory *os.File // of credentials, from one start to the next; may be nil
	// places are the sources, the registry alone if there is none; trusted those of them that are.
	places, trusted []sources.Place
	// look and publish are places of indexes.
	look, publish []index.Place
	// profiles that the node records and finds; zero: none.
	profiles prepare.Profiles
	// serve serves devices at a start; nil: in a FUSE mount of its own.
	serve   func(t *testing.T) *layertest.Exporter
	mounter *mount.Mounter // found at the first start

	stop func()
}

// logs keeps what was logged.
type logs struct {
	mu  sync.Mutex // protects buf
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func newNode(t *testing.T, policy prepare.Policy, servers ...*testregistry.Server) *node {
	t.Helper()
	n := makeNode(t, policy, servers...)
	n.start(t)
	return n
}

// makeNode is a node that has not been started.
func makeNode(t *testing.T, policy prepare.Policy, servers ...*testregistry.Server) *node {
	t.Helper()
	if policy.StallTimeout == 0 {
		policy.StallTimeout = 20 * time.Second
	}
	n := &node{dir: t.TempDir(), policy: policy, log: &logs{}}
	n.policy.RuntimeRoots = []string{filepath.Join(n.dir, "runtime")}
	conf := ""
	for _, s := range servers {
		conf += fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", s.Host())
	}
	write(t, filepath.Join(n.dir, "registries.conf"), conf)
	t.Cleanup(func() { layertest.UnmountAll(t, n.dir) }) // of records that are in use
	return n
}

// bareNode is a node that mounts nothing and starts nothing.
func bareNode(t *testing.T, grace time.Duration) *node {
	t.Helper()
	n := &node{dir: t.TempDir(), log: &logs{}}
	n.policy = prepare.Policy{Grace: grace, RuntimeRoots: []string{filepath.Join(n.dir, "runtime")}}
	log := slog.New(slog.NewTextHandler(n.log, nil))
	var err error
	if n.layers, err = layer.NewSet(layer.Config{Root: filepath.Join(n.dir, "layers"), Mounts: filepath.Join(n.dir, "mounts"), Logger: log}); err != nil {
		t.Fatal(err)
	}
	if n.store, err = imagestore.Create(filepath.Join(n.dir, "store"), filepath.Join(n.dir, "records")); err != nil {
		t.Fatal(err)
	}
	n.Preparer, err = prepare.New(t.Context(), prepare.Config{
		Policy: n.policy, Layers: n.layers, Store: n.store, Images: filepath.Join(n.dir, "images"), Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// start brings the node up as a start of the daemon does.
func (n *node) start(t *testing.T) {
	t.Helper()
	serve := n.serve
	if serve == nil {
		serve = func(t *testing.T) *layertest.Exporter { return layertest.Serve(t, layertest.Hold(t, n.dir), n.dir) }
	}
	exporter := serve(t)
	if n.mounter == nil {
		n.mounter = exporter.Probe(t, n.dir)
	}
	log := slog.New(slog.NewTextHandler(n.log, nil))
	var err error
	n.layers, err = layer.NewSet(layer.Config{
		Root: filepath.Join(n.dir, "layers"), Mounts: filepath.Join(n.dir, "mounts"),
		Exporter: exporter, Scheduler: device.NewScheduler(8), Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.layers.Open(t.Context()), n.layers.Export(), n.layers.Mount(t.Context(), n.mounter)); err != nil {
		t.Fatal(err)
	}
	if n.store, err = imagestore.Create(filepath.Join(n.dir, "store"), filepath.Join(n.dir, "records")); err != nil {
		t.Fatal(err)
	}
	client := registry.New(registry.Config{
		RegistriesConf:    filepath.Join(n.dir, "registries.conf"),
		RegistriesConfDir: filepath.Join(n.dir, "registries.conf.d"),
		Logger:            log,
	})
	kept, err := credentials.OpenKept(n.memory)
	if err != nil {
		t.Fatal(err)
	}
	finder, err := indexes.New(indexes.Config{
		Own: filepath.Join(n.dir, "indexes"), Look: n.look, Publish: n.publish, Registry: client, Logger: log, Tool: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	places := n.places
	if places == nil {
		places = []sources.Place{sources.Registry}
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.Preparer, err = prepare.New(ctx, prepare.Config{
		Policy: n.policy, Registry: client, Sources: sources.New(sources.Config{Places: places, Trusted: n.trusted, Registry: client}), Layers: n.layers, Store: n.store, Kept: kept,
		Images: filepath.Join(n.dir, "images"), Indexes: finder, Profiles: n.profiles, Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	n.RestoreSources()
	n.stop = func() {
		cancel()
		n.Wait()
		if err := n.Suspend(context.Background()); err != nil {
			t.Error(err)
		}
		client.Close()
		if err := errors.Join(n.layers.Unmount(), n.layers.Close()); err != nil {
			t.Error(err)
		}
	}
	// Before the FUSE server ends: cleanups run last first.
	t.Cleanup(func() { n.shut(t) })
}

func (n *node) shut(t *testing.T) {
	t.Helper()
	if n.stop == nil {
		return
	}
	n.stop()
	n.stop = nil
	if left, err := filepath.Glob(filepath.Join(n.dir, "layers", ".staging-*")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, error %v", left, err)
	}
}

func (n *node) prepare(t *testing.T, ref string) *prepare.Result {
	t.Helper()
	res, err := n.try(t.Context(), t, ref)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func (n *node) try(ctx context.Context, t *testing.T, ref string) (*prepare.Result, error) {
	t.Helper()
	return n.Prepare(ctx, prepare.Request{Reference: parse(t, ref)})
}

func parse(t *testing.T, ref string) reference.Named {
	t.Helper()
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		t.Fatal(err)
	}
	return named
}

// records are the ids in the node's image store.
func (n *node) records(t *testing.T) map[string]imagestore.Layer {
	t.Helper()
	all, err := n.store.Layers()
	if err != nil {
		t.Fatal(err)
	}
	byID := map[string]imagestore.Layer{}
	for _, l := range all {
		byID[l.ID] = l
	}
	return byID
}

// nothing checks that the node has published nothing and keeps nothing.
func (n *node) nothing(t *testing.T) {
	t.Helper()
	if r := n.records(t); len(r) > 0 {
		t.Errorf("published: %v", r)
	}
	if all := n.layers.All(); len(all) > 0 {
		t.Errorf("%d layers are mounted", len(all))
	}
	if all, err := n.Images(); err != nil || len(all) > 0 {
		t.Errorf("prepared images: %v, error %v", all, err)
	}
}

// compare reads a layer as a runtime does, through its record.
func (n *node) compare(t *testing.T, l prepare.LayerResult, plain []byte) {
	t.Helper()
	if _, ok := n.records(t)[l.ChainID]; !ok {
		t.Errorf("layer %s is not recorded", l.Digest)
		return
	}
	tree := filepath.Join(n.store.Root(), "overlay", l.ChainID, "diff")
	if difference := layertest.Compare(tree, plain); difference != "" {
		t.Errorf("layer %s: %s", l.Digest, difference)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func start(t *testing.T, opts testregistry.Options) *testregistry.Server {
	t.Helper()
	s, err := testregistry.Start(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// trusting is a policy that trusts all registries on this machine.
func trusting() prepare.Policy { return prepare.Policy{Trusted: []string{"127.0.0.1*"}} }

// tree is a tar with a root directory and some files, different for each seed.
func tree(seed uint64) []byte {
	files := []testimage.File{{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir}}}
	for i, size := range []int{1, 5000, 200_000} {
		files = append(files, testimage.File{
			Header:  tar.Header{Name: fmt.Sprintf("file-%d-%d", seed, i)},
			Content: testimage.Bytes(size, seed*100+uint64(i)), //nolint:gosec // small
		})
	}
	return testimage.Tar(files...)
}

func convert(t *testing.T, plain []byte, f testimage.Format) testimage.Layer {
	t.Helper()
	l, err := testimage.ConvertBytes(t.Context(), plain, f, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// push pushes an image of these layers and returns its reference.
func push(t *testing.T, s *testregistry.Server, name string, layers ...testimage.Layer) string {
	t.Helper()
	if _, err := image(layers...).PushTo(s, name, "v1"); err != nil {
		t.Fatal(err)
	}
	return s.Host() + "/" + name + ":v1"
}

func image(layers ...testimage.Layer) testimage.Image {
	return testimage.Image{Layers: layers, Cmd: []string{"/bin/true"}}
}

// pushAltered pushes an image whose manifest and configuration have been changed.
func pushAltered(t *testing.T, s *testregistry.Server, name string, change func(*v1.Manifest, *v1.Image), layers ...testimage.Layer) string {
	t.Helper()
	img := image(layers...)
	if _, err := img.PushTo(s, name, ""); err != nil {
		t.Fatal(err)
	}
	rawConfig, rawManifest, err := img.Build()
	if err != nil {
		t.Fatal(err)
	}
	var m v1.Manifest
	var c v1.Image
	if err := json.Unmarshal(rawManifest, &m); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(rawConfig, &c); err != nil {
		t.Fatal(err)
	}
	change(&m, &c)
	if rawConfig, err = json.Marshal(c); err != nil {
		t.Fatal(err)
	}
	m.Config.Digest, m.Config.Size = s.AddBlob(rawConfig), int64(len(rawConfig))
	if rawManifest, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	s.AddManifest(name, "v1", v1.MediaTypeImageManifest, rawManifest)
	return s.Host() + "/" + name + ":v1"
}

func actions(res *prepare.Result) string {
	var all []string
	for _, l := range res.Layers {
		all = append(all, string(l.Action))
	}
	return strings.Join(all, ", ")
}

// runtimeImages is a runtime's list of images, in its store.
const runtimeImages = "overlay-images/images.json"

// refer makes the runtime's own store refer to a layer, as an image does.
func (n *node) refer(t *testing.T, id string) {
	t.Helper()
	write(t, filepath.Join(n.policy.RuntimeRoots[0], runtimeImages),
		fmt.Sprintf(`[{"id":"x","layer":%q}]`, id))
}

func digestOf(p []byte) digest.Digest { return digest.FromBytes(p) }
