// SPDX-License-Identifier: Apache-2.0

package indexer_test

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexer"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tree is a layer that differs by n, and decompresses to several spans of text.
func tree(n int) []byte {
	text := strings.Repeat(fmt.Sprintf("line %d of a file that compresses well\n", n), 1<<17)
	return testimage.Tar(
		testimage.File{Header: tar.Header{Name: "etc", Typeflag: tar.TypeDir}},
		testimage.File{Header: tar.Header{Name: "etc/passwd"}, Content: fmt.Appendf(nil, "root:%d", n)},
		testimage.File{Header: tar.Header{Name: "empty"}},
		testimage.File{Header: tar.Header{Name: "text"}, Content: []byte(text)},
		testimage.File{Header: tar.Header{Name: "noise"}, Content: testimage.Bytes(64<<10, uint64(n))}, //nolint:gosec // small
	)
}

func layer(t *testing.T, tar []byte, f testimage.Format) testimage.Layer {
	t.Helper()
	l, err := testimage.ConvertBytes(t.Context(), tar, f, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func start(t *testing.T, o testregistry.Options) *testregistry.Server {
	t.Helper()
	s, err := testregistry.Start(o)
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

// push pushes an image, and returns its name.
func push(t *testing.T, s *testregistry.Server, repository string, layers ...testimage.Layer) string {
	t.Helper()
	if _, err := (testimage.Image{Cmd: []string{"/app"}, Layers: layers}).PushTo(s, repository, "v1"); err != nil {
		t.Fatal(err)
	}
	return s.Host() + "/" + repository + ":v1"
}

// layout writes an image to an OCI layout, and returns its name.
func layout(t *testing.T, layers ...testimage.Layer) string {
	t.Helper()
	dir := t.TempDir()
	if err := (testimage.Image{Cmd: []string{"/app"}, Layers: layers}).WriteLayout(dir, "v1"); err != nil {
		t.Fatal(err)
	}
	return dir
}

// node is where indexes are made.
type node struct {
	finder *indexes.Finder
}

// newNode returns a node that may use a registry, and looks for indexes in places.
func newNode(t *testing.T, s *testregistry.Server, look ...index.Place) node {
	t.Helper()
	dir := t.TempDir()
	conf, own, host := filepath.Join(dir, "registries.conf"), filepath.Join(dir, "own"), "none.example.com"
	if s != nil {
		host = s.Host()
	}
	if err := os.WriteFile(conf, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", host), 0o600); err != nil {
		t.Fatal(err)
	}
	account := func(_ context.Context, _ string, refused []registry.Credentials) (registry.Credentials, error) {
		if len(refused) > 0 {
			return registry.Credentials{}, nil
		}
		return registry.Credentials{Username: "user", Password: "secret"}, nil
	}
	client := registry.New(registry.Config{
		RegistriesConf: conf, RegistriesConfDir: "/nonexistent", CertsDir: []string{}, Credentials: account,
	})
	t.Cleanup(client.Close)
	finder, err := indexes.New(indexes.Config{
		Own: own, Limit: indexes.OwnLimit, Look: look, Registry: client, Logger: slog.New(slog.DiscardHandler), Tool: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	return node{finder}
}

// open opens an image.
func (n node) open(t *testing.T, name string) *indexer.Indexer {
	t.Helper()
	img, err := image.Opener{Registry: n.finder.Registry, Platform: image.Platform{OS: "linux", Architecture: "amd64"}}.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
		n.clean(t)
	})
	return &indexer.Indexer{Image: img, Finder: n.finder}
}

// clean fails the test if something temporary is left.
func (n node) clean(t *testing.T) {
	t.Helper()
	all, err := os.ReadDir(n.finder.Config.Own)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if ext := filepath.Ext(e.Name()); ext != ".ztoc" && ext != ".digests" {
			t.Errorf("%s is left", e.Name())
		}
	}
}

func (n node) build(t *testing.T, name string, want ...indexer.Outcome) []indexer.BuildResult {
	t.Helper()
	got, err := n.open(t, name).Build(t.Context(), false)
	if err != nil {
		t.Fatalf("%+v, error %v", got, err)
	}
	checkOutcomes(t, got, want...)
	return got
}

func checkOutcomes(t *testing.T, got []indexer.BuildResult, want ...indexer.Outcome) {
	t.Helper()
	var have []indexer.Outcome
	for _, r := range got {
		have = append(have, r.Outcome)
	}
	if fmt.Sprint(have) != fmt.Sprint(want) {
		t.Errorf("outcomes %v, want %v: %+v", have, want, got)
	}
}

func TestBuild(t *testing.T) {
	layers := []testimage.Layer{
		layer(t, tree(1), testimage.Gzip), layer(t, tree(2), testimage.Zstd), layer(t, tree(3), testimage.Uncompressed),
		layer(t, tree(4), testimage.EStargz), layer(t, tree(5), testimage.ZstdChunked),
	}
	layers = append(layers, layers[0]) // an image may have one twice
	n := newNode(t, nil)
	name := layout(t, layers...)
	got := n.build(t, name, indexer.Built, indexer.Built, indexer.Built, indexer.Carried, indexer.Carried)
	for i, r := range got[:3] {
		if d := layers[i].Descriptor; r.Digest != d.Digest || r.Size != d.Size {
			t.Errorf("layer %d is %s of %d bytes", i, r.Digest, r.Size)
		}
		if r.Uncompressed != int64(len(tree(i+1))) || r.Seconds <= 0 || r.Spans < 1 {
			t.Errorf("layer %d: %+v", i, r)
		}
		size := int64(0)
		for _, kind := range []string{".ztoc", ".digests"} {
			info, err := os.Stat(filepath.Join(n.finder.Config.Own, r.Digest.Encoded()+kind))
			if err != nil {
				t.Fatal(err)
			}
			size += info.Size()
		}
		if r.Index != size {
			t.Errorf("layer %d: index of %d bytes, want %d", i, r.Index, size)
		}
	}
	// The same again reads nothing.
	x := n.open(t, name)
	x.Progress = func(d digest.Digest, _, _ int64) { t.Errorf("layer %s is read", d) }
	again, err := x.Build(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	checkOutcomes(t, again, indexer.There, indexer.There, indexer.There, indexer.Carried, indexer.Carried)
	// Unless it must.
	x = n.open(t, name)
	read := map[digest.Digest]int64{}
	x.Progress = func(d digest.Digest, done, _ int64) { read[d] = done }
	forced, err := x.Build(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	checkOutcomes(t, forced, indexer.Built, indexer.Built, indexer.Built, indexer.Built, indexer.Built)
	for _, r := range forced {
		if read[r.Digest] != r.Size {
			t.Errorf("progress ends at %d of %d", read[r.Digest], r.Size)
		}
	}
}

// An index that is not sound, or that of another image's claim, is made anew.
func TestBuildReplaces(t *testing.T) {
	l := layer(t, tree(1), testimage.Gzip)
	n := newNode(t, nil)
	name := layout(t, l)
	n.build(t, name, indexer.Built)
	file := filepath.Join(n.finder.Config.Own, l.Descriptor.Digest.Encoded()+".ztoc")
	if err := os.Truncate(file, 1000); err != nil {
		t.Fatal(err)
	}
	n.build(t, name, indexer.Built)
	n.build(t, name, indexer.There)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	n.build(t, name, indexer.Built)
}

// Nothing is kept of what is not what it is said to be.
func TestBuildCompares(t *testing.T) {
	good, other := layer(t, tree(1), testimage.Gzip), layer(t, tree(2), testimage.Gzip)
	changed, lied, broken, short := good, good, good, good
	changed.Bytes = append([]byte(nil), good.Bytes...)
	changed.Bytes[9] ^= 1 // in the header, where only the digest tells
	lied.DiffID = other.DiffID
	broken.Bytes = testimage.Bytes(len(good.Bytes), 1)
	short.Bytes = good.Bytes[:len(good.Bytes)-1]
	for name, c := range map[string]struct {
		layer testimage.Layer
		want  string
	}{
		"other bytes":     {changed, "blob is sha256:"},
		"another diff ID": {lied, "diff ID is sha256:"},
		"no tar":          {broken, "invalid"},
		"too short":       {short, "bytes, not"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, nil)
			got, err := n.open(t, layout(t, c.layer, other)).Build(t.Context(), false)
			if err == nil || !strings.Contains(err.Error(), string(good.Descriptor.Digest)) || strings.Contains(err.Error(), string(other.Descriptor.Digest)) {
				t.Errorf("error %v", err)
			}
			checkOutcomes(t, got, indexer.Failed, indexer.Built)
			if !strings.Contains(got[0].Reason, c.want) {
				t.Errorf("reason %q, want %q", got[0].Reason, c.want)
			}
			all, err := indexer.Contents(n.finder.Own())
			if err != nil || len(all) != 1 || all[0].Subject != other.Descriptor.Digest {
				t.Errorf("kept %+v, error %v", all, err)
			}
		})
	}
}

// A layer that no zTOC can describe is named, and does not fail the others.
func TestBuildNone(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600), os.Truncate(filepath.Join(dir, "file"), 1<<20)); err != nil {
		t.Fatal(err)
	}
	holes, err := exec.CommandContext(t.Context(), "tar", "-C", dir, "--sparse", "--format=posix", "-c", "file").Output()
	if err != nil {
		t.Fatal(err)
	}
	sparse, good := layer(t, holes, testimage.Gzip), layer(t, tree(1), testimage.Gzip)
	n := newNode(t, nil)
	got, err := n.open(t, layout(t, sparse)).Build(t.Context(), false)
	if !errors.Is(err, indexer.ErrNone) {
		t.Errorf("error %v", err)
	}
	checkOutcomes(t, got, indexer.None)
	if !strings.Contains(got[0].Reason, "sparse file") {
		t.Errorf("reason %q", got[0].Reason)
	}
	n.build(t, layout(t, sparse, good), indexer.None, indexer.Built)
}

func TestBuildEnds(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	x := newNode(t, nil).open(t, layout(t, layer(t, tree(1), testimage.Gzip), layer(t, tree(2), testimage.Gzip)))
	x.Progress = func(digest.Digest, int64, int64) { cancel(stop) }
	if got, err := x.Build(ctx, false); got != nil || !errors.Is(err, stop) {
		t.Errorf("%+v, error %v", got, err)
	}
}

// A mirror that has something else is left for the registry.
func TestBuildFromMirrors(t *testing.T) {
	good, s := layer(t, tree(1), testimage.Gzip), start(t, testregistry.Options{})
	bad := start(t, testregistry.Options{})
	name := push(t, s, "app", good)
	push(t, bad, "app", good)
	bad.AddBlobAs(good.Descriptor.Digest, testimage.Bytes(len(good.Bytes), 1))
	n := newNode(t, s)
	conf := filepath.Join(t.TempDir(), "registries.conf")
	text := fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n[[registry.mirror]]\nlocation = %q\ninsecure = true\n", s.Host(), bad.Host())
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	client := registry.New(registry.Config{RegistriesConf: conf, RegistriesConfDir: "/nonexistent", CertsDir: []string{}})
	t.Cleanup(client.Close)
	n.finder.Registry = client
	x := n.open(t, name)
	if len(x.Image.Repositories) != 2 {
		t.Fatalf("read from %v", x.Image.Repositories)
	}
	got, err := x.Build(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	checkOutcomes(t, got, indexer.Built)
	img, err := image.Opener{Registry: client, Platform: image.Machine(), NoMirrors: true}.Open(t.Context(), name)
	if err != nil || len(img.Repositories) != 1 || !strings.HasPrefix(img.Repositories[0].Name(), s.Host()) {
		t.Errorf("without mirrors: %v, %v", img, err)
	}
}
