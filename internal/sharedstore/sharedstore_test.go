// SPDX-License-Identifier: Apache-2.0

package sharedstore_test

import (
	"archive/tar"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/sharedstore"
	"github.com/holdfast/holdfast/internal/testimage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// made is an image in a layout.
type made struct {
	testimage.Image
	dir, name string
	tars      [][]byte
}

func makeImage(t *testing.T, name string, f testimage.Format, tars ...[]byte) made {
	t.Helper()
	m := made{dir: filepath.Join(t.TempDir(), "layout"), name: name, tars: tars}
	m.Cmd = []string{"/app"}
	for _, plain := range tars {
		l, err := testimage.ConvertBytes(t.Context(), plain, f, testimage.Options{})
		if err != nil {
			t.Fatal(err)
		}
		m.Layers = append(m.Layers, l)
	}
	if err := m.WriteLayout(m.dir, name); err != nil {
		t.Fatal(err)
	}
	return m
}

// tree is a layer that differs by seed, on top of whatever.
func tree(seed uint64) []byte {
	return testimage.Tar(
		testimage.File{Header: tar.Header{Name: "d/", Typeflag: tar.TypeDir}},
		testimage.File{Header: tar.Header{Name: "d/file", Mode: 0o4755}, Content: testimage.Bytes(10_000, seed)},
		testimage.File{Header: tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "d/file"}},
	)
}

func noProgress(digest.Digest, int64, int64) {}

// load reads an image out of its layout.
func (m made) load(ctx context.Context) (*sharedstore.Image, error) {
	opened, err := image.Opener{Platform: image.Platform{OS: "linux", Architecture: "amd64"}}.Open(ctx, "oci:"+m.dir+":"+m.name)
	if err != nil {
		return nil, err
	}
	return sharedstore.Load(ctx, opened, m.name)
}

func add(ctx context.Context, s *sharedstore.Store, m made) (*sharedstore.Added, error) {
	img, err := m.load(ctx)
	if err != nil {
		return nil, err
	}
	return s.Add(ctx, img, noProgress)
}

func mustAdd(t *testing.T, s *sharedstore.Store, m made) *sharedstore.Added {
	t.Helper()
	a, err := add(t.Context(), s, m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func create(t *testing.T) *sharedstore.Store {
	t.Helper()
	s, err := sharedstore.Create(t.Context(), filepath.Join(t.TempDir(), "store"), false)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// clean fails the test if anything is wrong with a store.
func clean(t *testing.T, s *sharedstore.Store) *sharedstore.Report {
	t.Helper()
	r, err := s.Verify(t.Context(), noProgress)
	if err != nil || len(r.Problems) > 0 {
		t.Errorf("verified: %+v, %v", r, err)
	}
	return r
}

// runtime reads a store as CRI-O and Podman do, and returns the names of its images.
// Whatever happened to the store, that must not fail.
func runtime(t *testing.T, root string) (names []string) {
	t.Helper()
	dir := t.TempDir()
	st, err := storage.GetStore(storage.StoreOptions{
		GraphRoot: filepath.Join(dir, "root"), RunRoot: filepath.Join(dir, "run"), GraphDriverName: "overlay",
		GraphDriverOptions: []string{"overlay.imagestore=" + root, "overlay.skip_mount_home=true"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Free()
	images, err := st.Images()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range images {
		names = append(names, i.Names...)
		for _, key := range i.BigDataNames {
			if data, err := st.ImageBigData(i.ID, key); err != nil || int64(len(data)) != i.BigDataSizes[key] {
				t.Errorf("image %s: %s has %d bytes, %v", i.ID, key, len(data), err)
			}
		}
		size, err := st.ImageSize(i.ID)
		if err != nil || size <= 0 {
			t.Errorf("image %s has size %d, %v", i.ID, size, err)
		}
		for id := i.TopLayer; id != ""; {
			l, err := st.Layer(id)
			if err != nil {
				t.Errorf("image %s: layer %s: %v", i.ID, id, err)
				break
			}
			if _, err := os.Stat(filepath.Join(root, "overlay", id, "diff")); err != nil {
				t.Errorf("image %s: %v", i.ID, err)
			}
			id = l.Parent
		}
	}
	slices.Sort(names)
	return names
}

const (
	app   = "registry.example.com/team/app:v1"
	other = "registry.example.com/team/other:v1"
)

// Layers and images are recorded as a normal pull records them.
func TestAdd(t *testing.T) {
	for _, f := range []testimage.Format{testimage.Gzip, testimage.Uncompressed, testimage.Zstd} {
		t.Run(string(f), func(t *testing.T) {
			s, m := create(t), makeImage(t, app, f, tree(1), tree(2))
			config, manifest, err := m.Build()
			if err != nil {
				t.Fatal(err)
			}
			a := mustAdd(t, s, m)
			if a.ID != digest.FromBytes(config).Encoded() || a.Digest != digest.FromBytes(manifest) || a.Layers != 2 || a.Made != 2 {
				t.Errorf("%+v", a)
			}
			if got := runtime(t, s.Root()); !slices.Equal(got, []string{app}) {
				t.Errorf("a runtime sees %q", got)
			}
			if r := clean(t, s); r.Images != 1 || r.Layers != 2 || len(r.Notes) > 0 {
				t.Errorf("%+v", r)
			}
			diffs, err := filepath.Glob(filepath.Join(s.Root(), "overlay", m.Layers[0].DiffID.Encoded(), "diff"))
			if err != nil || len(diffs) != 1 {
				t.Fatal(diffs, err)
			}
			indextest.CheckDirectory(t, diffs[0], m.tars[0])
			if again := mustAdd(t, s, m); again.Made != 0 {
				t.Errorf("again: %+v", again)
			}
			list, err := s.List()
			if err != nil || len(list) != 1 || list[0].Layers != 2 || list[0].Platform != "linux/amd64" || !slices.Equal(list[0].Names, []string{app}) {
				t.Errorf("list %+v, %v", list, err)
			}
		})
	}
}

// A name that moves leaves its image, which can then be pruned.
func TestNameMoves(t *testing.T) {
	s := create(t)
	mustAdd(t, s, makeImage(t, app, testimage.Gzip, tree(1), tree(2)))
	mustAdd(t, s, makeImage(t, app, testimage.Gzip, tree(1), tree(3)))
	if got := runtime(t, s.Root()); !slices.Equal(got, []string{app}) {
		t.Errorf("a runtime sees %q", got)
	}
	decisions, err := s.Prune(t.Context(), sharedstore.PruneOptions{Grace: time.Hour})
	if err != nil || len(decisions) != 1 || decisions[0].Remove { // its layer goes after it
		t.Errorf("%+v, %v", decisions, err)
	}
	decisions, err = s.Prune(t.Context(), sharedstore.PruneOptions{})
	if err != nil || len(decisions) != 2 || !decisions[0].Remove || !decisions[1].Remove {
		t.Errorf("%+v, %v", decisions, err)
	}
	if r := clean(t, s); r.Images != 1 || r.Layers != 2 {
		t.Errorf("%+v", r)
	}
}

func TestRemoveAndPrune(t *testing.T) {
	s := create(t)
	mustAdd(t, s, makeImage(t, app, testimage.Gzip, tree(1), tree(2)))
	a := mustAdd(t, s, makeImage(t, other, testimage.Gzip, tree(1), tree(3)))
	if err := s.Remove(t.Context(), other, "registry.example.com/none:v1"); !errors.Is(err, sharedstore.ErrUnknown) {
		t.Error(err)
	}
	if got := runtime(t, s.Root()); len(got) != 2 {
		t.Errorf("a runtime sees %q", got)
	}
	if err := s.Remove(t.Context(), a.ID[:12]); err != nil {
		t.Error(err)
	}
	if got := runtime(t, s.Root()); !slices.Equal(got, []string{app}) {
		t.Errorf("a runtime sees %q", got)
	}
	// A runtime of this machine has a container on the layer.
	root := t.TempDir()
	top := layersOf(t, s, 2)
	text, err := json.Marshal([]map[string]any{{"id": "c", "names": []string{"web"}, "layer": "rw"}})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, "overlay-containers", "containers.json"), text)
	text, err = json.Marshal([]map[string]any{{"id": "rw", "parent": top}})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, "overlay-layers", "layers.json"), text)
	decisions, err := s.Prune(t.Context(), sharedstore.PruneOptions{RuntimeRoots: []string{root}})
	if err != nil || len(decisions) != 1 || decisions[0].Remove || !strings.Contains(decisions[0].Reason, "container web") {
		t.Errorf("%+v, %v", decisions, err)
	}
	decisions, err = s.Prune(t.Context(), sharedstore.PruneOptions{DryRun: true})
	if err != nil || len(decisions) != 1 || !decisions[0].Remove {
		t.Errorf("%+v, %v", decisions, err)
	}
	if r := clean(t, s); r.Layers != 3 {
		t.Errorf("%+v", r)
	}
	if _, err := s.Prune(t.Context(), sharedstore.PruneOptions{}); err != nil {
		t.Error(err)
	}
	if r := clean(t, s); r.Layers != 2 || r.Images != 1 {
		t.Errorf("%+v", r)
	}
	write(t, filepath.Join(root, "overlay-layers", "layers.json"), []byte("{"))
	if _, err := s.Prune(t.Context(), sharedstore.PruneOptions{RuntimeRoots: []string{root}}); err == nil {
		t.Error("pruned without knowing what is in use")
	}
}

func write(t *testing.T, name string, text []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, text, 0o600)); err != nil {
		t.Fatal(err)
	}
}

// layersOf is the id of the n-th record.
func layersOf(t *testing.T, s *sharedstore.Store, n int) string {
	t.Helper()
	var all []struct{ ID string }
	text, err := os.ReadFile(filepath.Join(s.Root(), "overlay-layers", "layers.json"))
	if err := errors.Join(err, json.Unmarshal(text, &all)); err != nil || len(all) <= n {
		t.Fatal(all, err)
	}
	return all[n].ID
}

func TestCreate(t *testing.T) {
	s := create(t)
	if nfs, err := sharedstore.Create(t.Context(), filepath.Join(t.TempDir(), "store"), true); err != nil || nfs.Keeps().TrustedXattrs {
		t.Error(err)
	}
	if again, err := sharedstore.Create(t.Context(), s.Root(), false); err != nil || again.Keeps() != s.Keeps() {
		t.Error(err)
	}
	full := t.TempDir()
	write(t, filepath.Join(full, "file"), nil)
	if _, err := sharedstore.Create(t.Context(), full, false); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Error(err)
	}
	theirs := t.TempDir()
	write(t, filepath.Join(theirs, "overlay-layers", "layers.json"), []byte(`[{"id":"x"}]`))
	if _, err := sharedstore.Create(t.Context(), theirs, false); err == nil || !strings.Contains(err.Error(), "something else") {
		t.Error(err)
	}
	if _, err := sharedstore.Open(full); !errors.Is(err, sharedstore.ErrNoStore) {
		t.Error(err)
	}
	state := filepath.Join(s.Root(), "holdfast-store.json")
	write(t, state, []byte(`{"version": 2}`))
	for _, err := range []error{open(s.Root()), createError(t, s.Root())} {
		if !errors.Is(err, sharedstore.ErrNewer) {
			t.Errorf("a newer store: %v", err)
		}
	}
}

func open(root string) error {
	_, err := sharedstore.Open(root)
	return err
}

func createError(t *testing.T, root string) error {
	t.Helper()
	_, err := sharedstore.Create(t.Context(), root, false)
	return err
}

// Whatever is wrong with an image, the store stays as it was.
func TestBadImages(t *testing.T) {
	s := create(t)
	mustAdd(t, s, makeImage(t, other, testimage.Gzip, tree(1)))
	state := func() string {
		var all []string
		err := filepath.WalkDir(s.Root(), func(p string, d os.DirEntry, err error) error {
			if err == nil && !strings.HasSuffix(p, ".lock") && filepath.Base(p) != "holdfast-store.json" {
				info, _ := d.Info()
				all = append(all, strings.TrimPrefix(p, s.Root())+" "+info.Mode().String())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(all, "\n")
	}
	before := state()
	lose := func(m made, damage func(file string) error) error {
		return damage(filepath.Join(m.dir, "blobs", "sha256", m.Layers[0].Descriptor.Digest.Encoded()))
	}
	for name, c := range map[string]struct {
		tar    []byte
		name   string
		damage func(m made) error
		want   string
	}{
		"path tricks":         {testimage.Tar(testimage.File{Header: tar.Header{Name: "../../../etc/cron.d/x"}, Content: []byte("x")}), app, nil, "invalid"},
		"link that leads out": {testimage.Tar(testimage.File{Header: tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "/etc/shadow"}}), app, nil, "invalid"},
		"not a tar":           {[]byte(strings.Repeat("text", 1000)), app, nil, "invalid"},
		"missing blob":        {tree(7), app, func(m made) error { return lose(m, os.Remove) }, "not found"},
		"short blob":          {tree(7), app, func(m made) error { return lose(m, func(f string) error { return os.Truncate(f, 100) }) }, "100 bytes"},
		"lying blob": {tree(7), app, func(m made) error {
			return lose(m, func(f string) error {
				info, err := os.Stat(f)
				if err != nil {
					return err
				}
				plain := tree(8)
				return os.WriteFile(f, append(plain, make([]byte, info.Size())...)[:info.Size()], 0o600)
			})
		}, "layer sha256:"},
		"no registry": {tree(7), "v1", nil, "with a registry"},
	} {
		t.Run(name, func(t *testing.T) {
			m := makeImage(t, c.name, testimage.Gzip, c.tar)
			if c.damage != nil {
				if err := c.damage(m); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := add(t.Context(), s, m); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v; want %q", err, c.want)
			}
			if after := state(); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			if got := runtime(t, s.Root()); !slices.Equal(got, []string{other}) {
				t.Errorf("a runtime sees %q", got)
			}
		})
	}
}

// slow is a source that waits.
type slow struct {
	blob.Source
	asked, release chan struct{}
}

func (s slow) Open(ctx context.Context, d blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	s.asked <- struct{}{}
	<-s.release
	return s.Source.Open(ctx, d, offset, length)
}

func TestTwoWriters(t *testing.T) {
	s, m := create(t), makeImage(t, app, testimage.Gzip, tree(1))
	img, err := m.load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wait := slow{img.Sources[0], make(chan struct{}), make(chan struct{})}
	img.Sources[0] = wait
	done := make(chan error, 1)
	go func() {
		_, err := s.Add(t.Context(), img, noProgress)
		done <- err
	}()
	<-wait.asked
	second, err := sharedstore.Open(s.Root())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := add(t.Context(), second, makeImage(t, other, testimage.Gzip, tree(2))); !errors.Is(err, sharedstore.ErrBusy) || !strings.Contains(err.Error(), "process ") {
		t.Errorf("second writer: %v", err)
	}
	if got := runtime(t, s.Root()); len(got) != 0 {
		t.Errorf("a runtime sees %q", got)
	}
	close(wait.release)
	if err := <-done; err != nil {
		t.Error(err)
	}
	clean(t, s)
}

// A full disk leaves the store as it was, and what can be done then is said.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=3m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s, err := sharedstore.Create(t.Context(), filepath.Join(dir, "store"), false)
	if err != nil {
		t.Fatal(err)
	}
	mustAdd(t, s, makeImage(t, other, testimage.Gzip, tree(1)))
	large := testimage.Tar(testimage.File{Header: tar.Header{Name: "large"}, Content: testimage.Bytes(4<<20, 1)})
	if _, err := add(t.Context(), s, makeImage(t, app, testimage.Gzip, large)); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "make room") {
		t.Errorf("error %v", err)
	}
	if got := runtime(t, s.Root()); !slices.Equal(got, []string{other}) {
		t.Errorf("a runtime sees %q", got)
	}
	mustAdd(t, s, makeImage(t, app, testimage.Gzip, tree(1), tree(2)))
	clean(t, s)
}

// Damage is named exactly.
func TestVerify(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(root, layer, image string) error
		want string
	}{
		"content": {func(r, l, _ string) error {
			return os.Truncate(filepath.Join(r, "overlay", l, "diff", "d", "file"), 5000)
		}, "layer "},
		"missing": {func(r, l, _ string) error { return os.RemoveAll(filepath.Join(r, "overlay", l)) }, "its directory is missing"},
		"link": {func(r, l, _ string) error {
			return os.WriteFile(filepath.Join(r, "overlay", l, "link"), []byte("x"), 0o600)
		}, "its file link is wrong"},
		"manifest": {func(r, _, i string) error {
			return os.WriteFile(filepath.Join(r, "overlay-images", i, "manifest"), []byte("{}"), 0o600)
		}, "its manifest is not what was recorded"},
		"stray": {func(r, _, _ string) error {
			return os.Mkdir(filepath.Join(r, "overlay", strings.Repeat("a", 64)), 0o700)
		}, "no record leads to it"},
		"lock": {func(r, _, _ string) error { return os.Remove(filepath.Join(r, "overlay-layers", "layers.lock")) }, "runtimes need it"},
	} {
		t.Run(name, func(t *testing.T) {
			s := create(t)
			a := mustAdd(t, s, makeImage(t, app, testimage.Gzip, tree(1), tree(2)))
			if err := c.harm(s.Root(), layersOf(t, s, 0), a.ID); err != nil {
				t.Fatal(err)
			}
			r, err := s.Verify(t.Context(), noProgress)
			if err != nil || len(r.Problems) == 0 || !slices.ContainsFunc(r.Problems, func(p sharedstore.Problem) bool { return strings.Contains(p.String(), c.want) }) {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// The signatures that cosign has put beside an image are what containers/storage keeps.
func TestSignatures(t *testing.T) {
	s, m := create(t), makeImage(t, app, testimage.Gzip, tree(1))
	_, manifest, err := m.Build()
	if err != nil {
		t.Fatal(err)
	}
	sign(t, m.dir, digest.FromBytes(manifest))
	a := mustAdd(t, s, m)
	clean(t, s)
	key := "signature-" + a.Digest.Encoded()
	text, err := os.ReadFile(filepath.Join(s.Root(), "overlay-images", a.ID, "="+base64.StdEncoding.EncodeToString([]byte(key))))
	if err != nil || !strings.HasPrefix(string(text), "\x00sigstore-json\n{") || !strings.Contains(string(text), "dev.cosignproject.cosign/signature") {
		t.Errorf("%q, %v", text, err)
	}
}

// sign puts a signature into a layout, as cosign does.
func sign(t *testing.T, dir string, d digest.Digest) {
	t.Helper()
	put := func(body []byte) v1.Descriptor {
		desc := v1.Descriptor{Digest: digest.FromBytes(body), Size: int64(len(body))}
		write(t, filepath.Join(dir, "blobs", "sha256", desc.Digest.Encoded()), body)
		return desc
	}
	payload := put([]byte(`{"critical":{}}`))
	payload.MediaType = "application/vnd.dev.cosign.simplesigning.v1+json"
	payload.Annotations = map[string]string{"dev.cosignproject.cosign/signature": "MEUC"}
	body, err := json.Marshal(v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: put([]byte("{}")), Layers: []v1.Descriptor{payload}})
	if err != nil {
		t.Fatal(err)
	}
	desc := put(body)
	desc.MediaType = v1.MediaTypeImageManifest
	desc.Annotations = map[string]string{v1.AnnotationRefName: "registry.example.com/team/app:sha256-" + d.Encoded() + ".sig"}
	index := filepath.Join(dir, "index.json")
	var idx v1.Index
	text, err := os.ReadFile(index)
	if err := errors.Join(err, json.Unmarshal(text, &idx)); err != nil {
		t.Fatal(err)
	}
	idx.Manifests = append(idx.Manifests, desc)
	if text, err = json.Marshal(idx); err != nil {
		t.Fatal(err)
	}
	write(t, index, text)
}

// An image goes from one store to another.
func TestFromAnotherStore(t *testing.T) {
	from, to := create(t), create(t)
	m := makeImage(t, app, testimage.Gzip, tree(1), tree(2))
	_, manifest, err := m.Build()
	if err != nil {
		t.Fatal(err)
	}
	sign(t, m.dir, digest.FromBytes(manifest))
	first := mustAdd(t, from, m)
	img, err := from.Image(app)
	if err != nil {
		t.Fatal(err)
	}
	a, err := to.Add(t.Context(), img, noProgress)
	if err != nil || a.ID != first.ID || a.Digest != first.Digest || a.Made != 2 {
		t.Errorf("%+v, %v", a, err)
	}
	clean(t, to)
	if got := runtime(t, to.Root()); !slices.Equal(got, []string{app}) {
		t.Errorf("a runtime sees %q", got)
	}
	if again, err := to.Image(app); err != nil || len(again.Signatures) != 1 || !slices.Equal(again.Signatures[0], img.Signatures[0]) {
		t.Errorf("%+v, %v", again, err)
	}
	if _, err := from.Image(other); !errors.Is(err, sharedstore.ErrUnknown) {
		t.Error(err)
	}
	// What is damaged there does not get here.
	name := filepath.Join(from.Root(), "overlay", layersOf(t, from, 0), "diff", "d", "file")
	if err := os.WriteFile(name, make([]byte, 10_000), 0o600); err != nil {
		t.Fatal(err)
	}
	third := create(t)
	if _, err := third.Add(t.Context(), img, noProgress); err == nil {
		t.Error("took a damaged layer")
	}
	clean(t, third)
}
