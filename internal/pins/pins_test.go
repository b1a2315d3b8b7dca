// SPDX-License-Identifier: Apache-2.0

package pins_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/pins"
	"github.com/holdfast/holdfast/internal/sources"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is what pins images.
type node struct {
	*pins.Pinner
	dir     string
	sources *sources.Set
	config  pins.Config

	mu       sync.Mutex // protects the fields below
	prepared map[digest.Digest]bool
	asked    []string // of what Prepare was called for
}

// start starts a node whose sources are the registry.
func start(t *testing.T, s *testregistry.Server, change func(*pins.Config)) *node {
	t.Helper()
	n := &node{dir: t.TempDir(), prepared: map[digest.Digest]bool{}}
	conf := filepath.Join(n.dir, "registries.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", s.Host()), 0o600); err != nil {
		t.Fatal(err)
	}
	client := registry.New(registry.Config{RegistriesConf: conf, RegistriesConfDir: filepath.Join(n.dir, "none")})
	t.Cleanup(client.Close)
	n.config = pins.Config{
		Dir: filepath.Join(n.dir, "pins"), Create: true, State: filepath.Join(n.dir, "pins.json"), Interval: time.Hour,
		Prepare: n.prepare, IsPrepared: n.isPrepared, Yield: func(ctx context.Context) error { return ctx.Err() },
		Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&n.config)
	}
	n.sources = sources.New(sources.Config{Places: []sources.Place{sources.Registry}, Pins: n.config.Dir, Registry: client})
	n.config.Sources = n.sources
	n.run(t)
	return n
}

// run starts, and again after a stop.
func (n *node) run(t *testing.T) (stop func()) {
	t.Helper()
	var err error
	if n.Pinner, err = pins.New(n.config); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := n.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(stop)
	return stop
}

func (n *node) prepare(_ context.Context, ref reference.Named) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, ref.String())
	d, err := ocidir.New(n.config.Dir).Resolve(context.Background(), ref)
	n.prepared[d] = true
	return err
}

func (n *node) isPrepared(d digest.Digest) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.prepared[d]
}

// preparations are what was asked for, when there is something.
func (n *node) preparations() []string {
	for range 1000 {
		n.mu.Lock()
		asked := slices.Clone(n.asked)
		n.mu.Unlock()
		if asked != nil {
			return asked
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

func (n *node) collect(d digest.Digest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.prepared, d)
}

// settled waits until a pin is neither waiting nor being fetched.
func (n *node) settled(t *testing.T, name string) pins.Pin {
	t.Helper()
	for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		all := n.All()
		i := slices.IndexFunc(all, func(p pins.Pin) bool { return p.Name == name })
		if i >= 0 && (all[i].State == pins.Pinned || all[i].State == pins.Failed) {
			return all[i]
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("pins %+v", all)
		}
	}
}

// pin pins a name anew, and waits.
func (n *node) pin(t *testing.T, name string) pins.Pin {
	t.Helper()
	if err := n.Pin(name); err != nil {
		t.Fatal(err)
	}
	return n.settled(t, name)
}

// blobs are the blobs in the layout.
func (n *node) blobs(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.config.Dir, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func serve(t *testing.T, opts testregistry.Options) *testregistry.Server {
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

// push pushes an image with this content.
func push(t *testing.T, s *testregistry.Server, content string) (name string, d digest.Digest) {
	t.Helper()
	l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(testimage.File{Content: []byte(content)}), testimage.Gzip, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, err = testimage.Image{Layers: []testimage.Layer{l}, Cmd: []string{"/app"}}.PushTo(s, "team/app", "v1")
	if err != nil {
		t.Fatal(err)
	}
	return s.Host() + "/team/app:v1", d
}

// A pinned image is here whole, prepared, and needs its registry no more; when its tag
// moves, the new one is, too. The one before goes when nothing has it prepared.
func TestPin(t *testing.T) {
	s := serve(t, testregistry.Options{})
	name, d := push(t, s, "one")
	n := start(t, s, nil)
	if p := n.pin(t, name); p.State != pins.Pinned || p.Digest != d || p.From != "registry" || p.Configured {
		t.Errorf("%+v", p)
	}
	if got := n.preparations(); len(n.blobs(t)) != 3 || !slices.Equal(got, []string{name}) {
		t.Errorf("%d blobs, prepared %q", len(n.blobs(t)), got)
	}
	ref, err := pins.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	origins, err := n.sources.Origins(ref, nil, false)
	if err != nil || !origins[0].Pinned() {
		t.Errorf("origins %v, %v", origins, err)
	}
	if !n.sources.Believes(t.Context(), origins[0], ref, []string{"127.0.0.1*"}) || n.sources.Believes(t.Context(), origins[0], ref, nil) {
		t.Error("it counts as something else than where it was fetched")
	}
	requests := s.Counts().Blob
	if p := n.pin(t, name); p.State != pins.Pinned || s.Counts().Blob != requests {
		t.Errorf("fetched again: %+v", p)
	}
	_, moved := push(t, s, "two")
	if p := n.pin(t, name); p.Digest != moved || len(n.blobs(t)) != 6 {
		t.Errorf("after the tag moved: %+v, %d blobs", p, len(n.blobs(t)))
	}
	n.collect(d)
	if n.pin(t, name); len(n.blobs(t)) != 3 {
		t.Errorf("%d blobs", len(n.blobs(t)))
	}
	s.RemoveBlob(moved) // and everything else
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if p := n.pin(t, name); p.State != pins.Pinned {
		t.Errorf("without the registry: %+v", p)
	}
	n.collect(moved)
	if err := n.Unpin(name); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); len(n.blobs(t)) > 0; time.Sleep(2 * time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("left: %v", n.blobs(t))
		}
	}
	if err := n.Unpin(name); !errors.Is(err, pins.ErrUnknown) {
		t.Error(err)
	}
}

// What was pinned by request is pinned after a restart; what is damaged is put right.
func TestRestart(t *testing.T) {
	s := serve(t, testregistry.Options{})
	name, d := push(t, s, "one")
	n := start(t, s, func(c *pins.Config) { c.Interval = 10 * time.Millisecond })
	n.pin(t, name)
	var stop func()
	for _, file := range n.blobs(t) {
		if filepath.Base(file) != d.Encoded() {
			if err := os.Truncate(file, 1); err != nil {
				t.Fatal(err)
			}
		}
	}
	stop = n.run(t) // beside the other: they take turns
	if !n.Has(name) {
		t.Error("forgotten")
	}
	n.settled(t, name)
	for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		whole := true
		for _, file := range n.blobs(t) {
			body, err := os.ReadFile(file)
			whole = whole && err == nil && digest.FromBytes(body).Encoded() == filepath.Base(file)
		}
		if whole {
			break
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatal("still damaged")
		}
	}
	stop()
}

func TestConfigured(t *testing.T) {
	s := serve(t, testregistry.Options{})
	name, d := push(t, s, "one")
	n := start(t, s, func(c *pins.Config) { c.Configured = []string{name} })
	if p := n.settled(t, name); p.Digest != d || !p.Configured {
		t.Errorf("%+v", p)
	}
	if err := n.Unpin(name); !errors.Is(err, pins.ErrConfigured) {
		t.Error(err)
	}
}

func TestFails(t *testing.T) {
	s := serve(t, testregistry.Options{})
	name, _ := push(t, s, "one")
	missing := s.Host() + "/team/other:v1"
	n := start(t, s, func(c *pins.Config) { c.Create = false })
	if p := n.pin(t, name); p.State != pins.Failed || !strings.Contains(p.Error, "has to be there") {
		t.Errorf("without its disk: %+v", p)
	}
	if err := os.Mkdir(n.config.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if p := n.pin(t, name); p.State != pins.Pinned {
		t.Errorf("%+v", p)
	}
	if p := n.pin(t, missing); p.State != pins.Failed || !strings.Contains(p.Error, "not found") {
		t.Errorf("an image that is not there: %+v", p)
	}
	if err := n.Pin("Not A Name"); err == nil {
		t.Error("pinned what is no name")
	}
}

// A private image is not shown to every user of the node.
func TestPrivate(t *testing.T) {
	s := serve(t, testregistry.Options{})
	name, d := push(t, s, "one")
	n := start(t, s, nil)
	n.pin(t, name)
	repository, _, _ := strings.Cut(name, ":v1")
	if got := n.sources.Repositories(t.Context()); !slices.Equal(got, []sources.Attached{{Name: repository}}) {
		t.Errorf("repositories %v", got)
	}
	w := n.writer(t)
	idx, err := w.Index(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	list := slices.Clone(idx.Manifests)
	list[0].Annotations[sources.PrivateAnnotation] = "true"
	if err := errors.Join(os.Remove(filepath.Join(n.config.Dir, "index.json")), w.Close()); err != nil {
		t.Fatal(err)
	}
	w = n.writer(t)
	if err := errors.Join(w.List(t.Context(), func([]v1.Descriptor) ([]v1.Descriptor, error) { return list, nil }), w.Close()); err != nil {
		t.Fatal(err)
	}
	if got := n.sources.Repositories(t.Context()); len(got) > 0 {
		t.Errorf("repositories %v", got)
	}
	_, _, err = n.sources.Blob(t.Context(), repository, d)
	if _, merr := n.sources.Manifest(t.Context(), repository, d.String()); !errors.Is(err, blob.ErrNotFound) || !errors.Is(merr, blob.ErrNotFound) {
		t.Errorf("%v, %v", err, merr)
	}
}

// writer opens the layout for writing, when the pinner has done what it does.
func (n *node) writer(t *testing.T) *ocidir.Writer {
	t.Helper()
	for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		w, err := ocidir.Create(n.config.Dir)
		if err == nil {
			return w
		}
		if !errors.Is(err, ocidir.ErrBusy) || time.Since(begun) > 20*time.Second {
			t.Fatal(err)
		}
	}
}
