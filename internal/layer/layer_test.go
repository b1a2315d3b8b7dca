// SPDX-License-Identifier: Apache-2.0

package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/estargz"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/layer/layertest"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/testimage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a set of layers on directories of its own.
type rig struct {
	*layer.Set
	dir      string
	mounter  *mount.Mounter
	exporter *layertest.Exporter
	log      *bytes.Buffer
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{dir: t.TempDir()}
	r.mounter, r.exporter = layertest.Start(t, r.dir)
	r.open(t)
	return r
}

// open makes a set as a start of the daemon does, with the layers on disk.
func (r *rig) open(t *testing.T) {
	t.Helper()
	r.log = &bytes.Buffer{}
	s, err := layer.NewSet(layer.Config{
		Root: filepath.Join(r.dir, "layers"), Mounts: filepath.Join(r.dir, "mounts"),
		Exporter: r.exporter, Scheduler: device.NewScheduler(4),
		Logger: slog.New(slog.NewTextHandler(r.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	r.Set = s
	t.Cleanup(func() {
		if err := errors.Join(s.Unmount(), s.Close()); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(s.Open(t.Context()), s.Export(), s.Mount(t.Context(), r.mounter)); err != nil {
		t.Fatal(err)
	}
}

// reopen stops and starts; what happens between is the caller's.
func (r *rig) reopen(t *testing.T, between func()) {
	t.Helper()
	if err := errors.Join(r.Unmount(), r.Close()); err != nil {
		t.Fatal(err)
	}
	between()
	r.open(t)
}

// content is a layer to add.
type content struct {
	testimage.Layer
	tar []byte
}

func newContent(t *testing.T, seed uint64) content {
	t.Helper()
	plain := testimage.Tar(
		testimage.File{Header: tar.Header{Name: "small"}, Content: testimage.Bytes(100, seed)},
		testimage.File{Header: tar.Header{Name: "large"}, Content: testimage.Bytes(300_000, seed)},
	)
	l, err := testimage.ConvertBytes(t.Context(), plain, testimage.EStargz, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return content{l, plain}
}

func (c content) meta() layer.Meta {
	return layer.Meta{Digest: c.Descriptor.Digest, Size: c.Descriptor.Size, DiffID: c.DiffID, BlobCompression: index.Gzip}
}

// add adds a layer that is lazy.
func (r *rig) add(ctx context.Context, c content) (*layer.Layer, error) {
	src := blobtest.NewMemory(c.Bytes)
	idx, err := estargz.Open(ctx, src, blob.Descriptor{Digest: c.Descriptor.Digest, Size: c.Descriptor.Size}, c.Descriptor.Annotations)
	if err != nil {
		return nil, err
	}
	st, err := r.Stage(c.Descriptor.Digest)
	if err != nil {
		return nil, err
	}
	l, err := st.Commit(ctx, c.meta(), idx, false)
	if err != nil {
		return nil, err
	}
	l.Device().AddSources([]blob.Source{src})
	return l, nil
}

func (r *rig) mustAdd(t *testing.T, c content) *layer.Layer {
	t.Helper()
	l, err := r.add(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// addWhole adds a layer all of which is there.
func (r *rig) addWhole(t *testing.T, c content) *layer.Layer {
	t.Helper()
	st, err := r.Stage(c.Descriptor.Digest)
	if err != nil {
		t.Fatal(err)
	}
	res, err := stream.Read(t.Context(), bytes.NewReader(c.Bytes), c.Descriptor.Size, st)
	if err != nil {
		t.Fatal(err)
	}
	m := c.meta()
	m.Verified = true
	l, err := st.Commit(t.Context(), m, res.Index, true)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (r *rig) check(t *testing.T, c content) {
	t.Helper()
	l, ok := r.Get(c.Descriptor.Digest)
	if !ok {
		t.Errorf("layer %s is not in the set", c.Descriptor.Digest)
		return
	}
	if difference := layertest.Compare(filepath.Join(l.MountDirectory(), "diff"), c.tar); difference != "" {
		t.Error(difference)
	}
}

// gone checks that nothing of a layer is left but, perhaps, its directory.
func (r *rig) gone(t *testing.T, c content) {
	t.Helper()
	if _, ok := r.Get(c.Descriptor.Digest); ok {
		t.Error("the layer is in the set")
	}
	if layertest.Mounted(t, r.MountDirectory(c.Descriptor.Digest)) {
		t.Error("the layer is mounted")
	}
}

func (r *rig) path(c content, name ...string) string {
	return filepath.Join(append([]string{r.dir, "layers", c.Descriptor.Digest.Encoded()}, name...)...)
}

func TestAddLoadRemove(t *testing.T) {
	r := newRig(t)
	lazy, whole := newContent(t, 1), newContent(t, 2)
	if l := r.mustAdd(t, lazy); l.Complete() || l.Kind != index.EStargz || l.DiffID != lazy.DiffID || l.Created.IsZero() {
		t.Errorf("layer %+v", l.Meta)
	}
	if l := r.addWhole(t, whole); !l.Complete() || l.LocalBytes() < 300_000 {
		t.Errorf("complete is %v with %d bytes", l.Complete(), l.LocalBytes())
	}
	r.check(t, lazy)
	r.check(t, whole)
	if all := r.All(); len(all) != 2 || all[0].Digest > all[1].Digest {
		t.Errorf("layers %v", all)
	}

	// As after a reboot: no mounts, no network.
	r.reopen(t, func() {
		r.gone(t, lazy)
		if err := os.RemoveAll(filepath.Join(r.dir, "mounts")); err != nil {
			t.Fatal(err)
		}
	})
	r.check(t, whole)
	r.check(t, lazy) // it was read before: it is local
	if l, _ := r.Get(lazy.Descriptor.Digest); len(l.Device().Sources()) != 0 || !l.Complete() {
		t.Errorf("sources %v, complete %v", l.Device().Sources(), l.Complete())
	}

	for range 2 { // again: it is not there any more
		if err := r.Remove(lazy.Descriptor.Digest); err != nil {
			t.Error(err)
		}
	}
	r.gone(t, lazy)
	if _, err := os.Stat(r.path(lazy)); !os.IsNotExist(err) {
		t.Errorf("its directory: %v", err)
	}
	r.check(t, whole)
	r.reopen(t, func() {})
	r.gone(t, lazy)
	r.check(t, r.restore(t, lazy))
}

// restore adds a layer again.
func (r *rig) restore(t *testing.T, c content) content {
	t.Helper()
	r.mustAdd(t, c)
	return c
}

// Others must not reach the files of images: they may be setuid.
func TestDirectoriesAreClosed(t *testing.T) {
	r := newRig(t)
	for _, dir := range []string{"layers", "mounts"} {
		info, err := os.Stat(filepath.Join(r.dir, dir))
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, error %v", dir, info.Mode(), err)
		}
	}
}

func TestStage(t *testing.T) {
	r := newRig(t)
	for _, d := range []digest.Digest{"", "sha256:x", "sha256:../../etc/passwd", digest.Digest("sha512:" + strings.Repeat("ab", 64))} {
		if st, err := r.Stage(d); err == nil {
			t.Errorf("staged %q: %v", d, st.Abort())
		}
	}
	c := newContent(t, 1)
	st, err := r.Stage(c.Descriptor.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := st.Abort(); err != nil {
			t.Error(err)
		}
	}
	r.gone(t, c)
	r.empty(t)
}

// empty checks that no directory is left.
func (r *rig) empty(t *testing.T) {
	t.Helper()
	left, err := os.ReadDir(filepath.Join(r.dir, "layers"))
	if err != nil || len(left) != 0 {
		t.Errorf("left over: %v, error %v", left, err)
	}
}

// Several who add the same layer end up with the same one.
func TestFirstCommitWins(t *testing.T) {
	r := newRig(t)
	c := newContent(t, 1)
	var mu sync.Mutex
	got := map[*layer.Layer]bool{}
	var g errgroup.Group
	for range 6 {
		g.Go(func() error {
			l, err := r.add(t.Context(), c)
			mu.Lock()
			defer mu.Unlock()
			got[l] = true
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if len(got) != 1 {
		t.Errorf("%d layers", len(got))
	}
	r.check(t, c)
	if left, err := filepath.Glob(filepath.Join(r.dir, "layers", ".*")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, error %v", left, err)
	}
}

func TestCommitFails(t *testing.T) {
	r := newRig(t)
	c := newContent(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	st, err := r.Stage(c.Descriptor.Digest)
	if err != nil {
		t.Fatal(err)
	}
	res, err := stream.Read(ctx, bytes.NewReader(c.Bytes), c.Descriptor.Size, st)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := st.Commit(ctx, c.meta(), res.Index, true); err == nil {
		t.Error("no error")
	}
	r.gone(t, c)
	r.empty(t)
	r.mustAdd(t, c)
	r.check(t, c)
}

func TestLoadRemovesWhatACrashLeft(t *testing.T) {
	r := newRig(t)
	c := newContent(t, 1)
	r.mustAdd(t, c)
	left := filepath.Join(r.dir, "layers", ".staging-123")
	r.reopen(t, func() {
		if err := os.MkdirAll(filepath.Join(left, "deep"), 0o700); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("staging directory: %v", err)
	}
	if _, ok := r.Get(c.Descriptor.Digest); !ok {
		t.Error("the layer is gone")
	}
}

// A layer that is damaged is reported and left out; the others are there, and it
// can be added anew.
func TestDamagedLayer(t *testing.T) {
	good, bad := newContent(t, 1), newContent(t, 2)
	replace := func(name, text string) func(*rig) error {
		return func(r *rig) error { return os.WriteFile(r.path(bad, name), []byte(text), 0o600) }
	}
	remove := func(name string) func(*rig) error {
		return func(r *rig) error { return os.Remove(r.path(bad, name)) }
	}
	for name, damage := range map[string]func(*rig) error{
		"empty meta":         replace("layer.json", ""),
		"meta is no JSON":    replace("layer.json", "}{"),
		"huge meta":          replace("layer.json", `"`+strings.Repeat("x", 2<<20)),
		"meta of another":    replace("layer.json", fmt.Sprintf(`{"digest":%q,"diffID":%q}`, good.Descriptor.Digest, good.DiffID)),
		"meta without ids":   replace("layer.json", `{}`),
		"no meta":            remove("layer.json"),
		"empty table":        replace("chunks", ""),
		"table is junk":      replace("chunks", strings.Repeat("junk", 100)),
		"no table":           remove("chunks"),
		"no image":           remove("image.erofs"),
		"empty image":        replace("image.erofs", ""),
		"image is junk":      replace("image.erofs", strings.Repeat("junk", 10_000)),
		"data is a symlink":  func(r *rig) error { return loop(r.path(bad, "data")) },
		"name is no digest":  func(r *rig) error { return os.Rename(r.path(bad), filepath.Join(r.dir, "layers", "odd")) },
		"name is of another": func(r *rig) error { return os.Rename(r.path(bad), r.path(newContent(t, 3))) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.mustAdd(t, good)
			r.mustAdd(t, bad)
			r.check(t, good)
			r.reopen(t, func() {
				if err := damage(r); err != nil {
					t.Fatal(err)
				}
			})
			r.check(t, good)
			r.gone(t, bad)
			if log := r.log.String(); strings.Count(log, "level=ERROR") != 1 {
				t.Errorf("the log says: %s", log)
			}
			r.check(t, r.restore(t, bad))
		})
	}
}

// loop makes a file a symbolic link to itself.
func loop(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return os.Symlink(path, path)
}

// A present map that is lost costs a fetch, nothing else.
func TestLostPresentMap(t *testing.T) {
	r := newRig(t)
	c := newContent(t, 1)
	r.mustAdd(t, c)
	r.check(t, c)
	r.reopen(t, func() {
		if err := os.Remove(r.path(c, "present")); err != nil {
			t.Fatal(err)
		}
	})
	l, _ := r.Get(c.Descriptor.Digest)
	if s := l.Device().Stats(); s.Present != 0 {
		t.Errorf("stats %+v", s)
	}
	l.Device().AddSources([]blob.Source{blobtest.NewMemory(c.Bytes)})
	r.check(t, c)
}

// A mount that a daemon left which was killed is replaced by one that answers.
func TestLoadReplacesDeadMounts(t *testing.T) {
	r := newRig(t)
	c := newContent(t, 1)
	l := r.mustAdd(t, c)
	r.check(t, c)
	target := l.MountDirectory()
	r.reopen(t, func() {
		if err := os.MkdirAll(target, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := r.mounter.Mount(t.Context(), r.path(c, "image.erofs"), r.path(c, "data"), target); err != nil {
			t.Fatal(err)
		}
	})
	r.check(t, c)
	if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if layertest.Mounted(t, target) {
		t.Error("mounted twice")
	}
}

// What is in use is unmounted from its place and goes on for those who use it.
func TestRemoveWhileInUse(t *testing.T) {
	r := newRig(t)
	c := newContent(t, 1)
	l := r.addWhole(t, c)
	f, err := os.Open(filepath.Join(l.MountDirectory(), "diff", "large"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // read only
	if err := r.Remove(c.Descriptor.Digest); err != nil {
		t.Fatal(err)
	}
	r.gone(t, c)
	p := make([]byte, 300_000)
	if _, err := f.ReadAt(p, 0); err != nil || !bytes.Equal(p, testimage.Bytes(300_000, 1)) {
		t.Errorf("reading a file that was open: %v", err)
	}
}

// TestStageWithinTheLimit: a layer that comes whole takes its space as it comes.
func TestStageWithinTheLimit(t *testing.T) {
	const limit = 1 << 20
	space := cache.NewSpace(limit, slog.New(slog.DiscardHandler))
	set, err := layer.NewSet(layer.Config{
		Root: filepath.Join(t.TempDir(), "layers"), Mounts: filepath.Join(t.TempDir(), "mounts"),
		Space: space, Scheduler: device.NewScheduler(1), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	st, err := set.Stage(digest.FromString("large"))
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100_000)
	written := 0
	for err == nil {
		var n int
		n, err = st.WriteAt(p, int64(written))
		written += n
	}
	if !errors.Is(err, layer.ErrNoRoom) || written < limit-len(p)-4096 || written > limit {
		t.Errorf("wrote %d bytes, %v", written, err)
	}
	if used := space.Stats().Used; used < int64(written) || used > limit {
		t.Errorf("%d bytes are taken for %d", used, written)
	}
	if err := st.Abort(); err != nil || space.Stats().Used != 0 {
		t.Errorf("after the end %d bytes are taken (%v)", space.Stats().Used, err)
	}
}
