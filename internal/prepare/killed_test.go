// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/fill"
	"github.com/holdfast/holdfast/internal/killtest"
	"github.com/holdfast/holdfast/internal/layer/layertest"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// doomed is a node whose process is killed. It has an image that a runtime uses,
// which must survive whatever happens.
type doomed struct {
	*node
	server *testregistry.Server
	kept   *prepare.Result
	trees  map[digest.Digest][]byte // what the layers hold, by their blobs
	saved  string                   // a copy of the disk before the operation
}

func newDoomed(t *testing.T, policy prepare.Policy) *doomed {
	t.Helper()
	s := start(t, testregistry.Options{})
	return &doomed{node: makeNode(t, policy, s), server: s, trees: map[digest.Digest][]byte{}, saved: t.TempDir()}
}

// before does what comes before the operation.
func (d *doomed) before(t *testing.T, more func(t *testing.T)) {
	t.Helper()
	t.Run("before", func(t *testing.T) {
		d.start(t)
		ref := push(t, d.server, "kept", d.layer(t, 1, testimage.EStargz), d.layer(t, 2, testimage.EStargz))
		d.kept = d.prepare(t, ref)
		d.compare(t, d.kept.Layers[1], tree(2)) // so that some of it is local
		d.refer(t, d.kept.Layers[1].ChainID)
		more(t)
		d.shut(t)
		copyDisk(t, d.dir, d.saved)
	})
}

// layer is a layer for the registry.
func (d *doomed) layer(t *testing.T, seed uint64, f testimage.Format) testimage.Layer {
	t.Helper()
	l := convert(t, tree(seed), f)
	d.trees[l.Descriptor.Digest] = tree(seed)
	return l
}

// other is another image, on the same base.
func (d *doomed) other(t *testing.T) string {
	t.Helper()
	return push(t, d.server, "other", d.layer(t, 1, testimage.EStargz), d.layer(t, 3, testimage.EStargz))
}

// disk is what is on disk and not only in the kernel.
func disk() []string { return []string{"layers", "images", "store", "runtime"} }

// copyDisk makes the disk of one directory that of another.
func copyDisk(t *testing.T, from, to string) {
	t.Helper()
	args := []string{"-a"} // sparse files stay sparse
	for _, name := range disk() {
		if err := os.RemoveAll(filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
		args = append(args, filepath.Join(from, name))
	}
	if out, err := exec.CommandContext(t.Context(), "cp", append(args, to)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// boot makes the node one without mounts, and with the disk of a directory.
func (d *doomed) boot(t *testing.T, from string) {
	t.Helper()
	layertest.UnmountAll(t, d.dir)
	for _, name := range []string{"mounts", "records", "devices"} {
		if err := os.RemoveAll(filepath.Join(d.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	copyDisk(t, from, d.dir)
}

// doomedProcess is how the process that is killed comes up.
func doomedProcess(t *testing.T, in killtest.Inherited, policy prepare.Policy) *node {
	t.Helper()
	n := &node{dir: in.Args[0], log: &logs{}, policy: policy}
	n.policy.StallTimeout, n.policy.RuntimeRoots = 20*time.Second, []string{filepath.Join(n.dir, "runtime")}
	n.serve = func(t *testing.T) *layertest.Exporter { return layertest.ServeFile(t, in.Files[0], n.dir) }
	n.mounter = mount.New(mount.Method(in.Args[2]), slog.New(slog.DiscardHandler))
	n.start(t)
	if err := n.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// killAtEachStep kills an operation at each of its steps. Then the node is
// started twice: as the next worker, which finds the mounts of the one that was
// killed, and as after a boot, without any. again ends the operation.
func (d *doomed) killAtEachStep(t *testing.T, arg string, again func(t *testing.T)) {
	t.Helper()
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		left := t.TempDir()
		t.Run("next worker", func(t *testing.T) {
			d.boot(t, d.saved)
			held := layertest.Hold(t, d.dir)
			f, err := held.File()
			if err != nil {
				t.Fatal(err)
			}
			kill(t, []string{d.dir, arg, string(d.mounter.Method())}, f)
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			copyDisk(t, d.dir, left)
			d.serve = func(t *testing.T) *layertest.Exporter { return layertest.Serve(t, held, d.dir) }
			d.goOn(t, again)
		})
		t.Run("boot", func(t *testing.T) {
			d.boot(t, left)
			d.serve = nil
			d.goOn(t, again)
		})
	})
}

// goOn starts the node after a kill, and brings the operation to its end.
func (d *doomed) goOn(t *testing.T, again func(t *testing.T)) {
	t.Helper()
	d.start(t)
	if err := d.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.check(t)
	d.checkStore(t)
	again(t)
	d.collect(t, 0, false) // what no image has
	d.check(t)
	for _, l := range d.layers.All() {
		if !d.needs(t, l.Digest) {
			t.Errorf("layer %s is left", l.Digest)
		}
	}
	d.shut(t)
}

// needs reports whether an image has a layer.
func (d *doomed) needs(t *testing.T, blob digest.Digest) bool {
	t.Helper()
	all, err := d.Images()
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range all {
		for _, l := range img.Layers {
			if l.Digest == blob {
				return true
			}
		}
	}
	return false
}

// has checks which images are prepared.
func (d *doomed) has(t *testing.T, want ...digest.Digest) {
	t.Helper()
	all, err := d.Images()
	if err != nil || len(all) != len(want) {
		t.Fatalf("images %v, error %v", all, err)
	}
	for _, w := range want {
		if _, err := d.Find(w.String()); err != nil {
			t.Error(err)
		}
	}
}

func TestKilledPublish(t *testing.T) { killPublish(t, trusting()) }

// Layers that are verified first are complete: their files are the devices.
func TestKilledVerifiedPublish(t *testing.T) { killPublish(t, prepare.Policy{}) }

func killPublish(t *testing.T, policy prepare.Policy) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		n := doomedProcess(t, in, policy)
		return func() error {
			_, err := n.try(t.Context(), t, in.Args[1])
			return err
		}
	})
	t.Parallel()
	d := newDoomed(t, policy)
	var ref string
	d.before(t, func(t *testing.T) { ref = d.other(t) })
	d.killAtEachStep(t, ref, func(t *testing.T) {
		res := d.prepare(t, ref)
		if res.Lazy() != 2 {
			t.Errorf("result %+v", res)
		}
		d.has(t, d.kept.Digest, res.Digest)
	})
}

func TestKilledRemove(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		n := doomedProcess(t, in, trusting())
		return func() error { return n.Remove(t.Context(), in.Args[1]) }
	})
	t.Parallel()
	d := newDoomed(t, trusting())
	var ref string
	d.before(t, func(t *testing.T) {
		ref = d.other(t)
		d.prepare(t, ref)
	})
	d.killAtEachStep(t, ref, func(t *testing.T) {
		if err := d.Remove(t.Context(), ref); err != nil && !errors.Is(err, prepare.ErrUnknown) {
			t.Error(err)
		}
		d.has(t, d.kept.Digest)
	})
}

// An image goes the way of TestKilledRemove; what a collection takes besides are
// records and layers that no image has.
func TestKilledCollection(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		n := doomedProcess(t, in, trusting())
		// The file of an image got lost.
		if err := os.Remove(filepath.Join(n.dir, "images", in.Args[1])); err != nil {
			t.Fatal(err)
		}
		return func() error {
			_, err := n.Collect(t.Context(), 0, false)
			return err
		}
	})
	t.Parallel()
	d := newDoomed(t, trusting())
	var lost *prepare.Result
	d.before(t, func(t *testing.T) {
		lost = d.prepare(t, push(t, d.server, "lost", d.layer(t, 4, testimage.EStargz)))
		d.compare(t, lost.Layers[0], tree(4)) // local, since nobody will know its source
	})
	d.killAtEachStep(t, lost.Digest.Encoded()+".json", func(t *testing.T) {
		d.collect(t, 0, false)
		d.has(t, d.kept.Digest)
	})
}

// fillAll fills the layers of a node.
func (n *node) fillAll(ctx context.Context) error {
	filler := fill.New(fill.Config{Layers: n.layers, Scheduler: device.NewScheduler(4), Logger: slog.New(slog.DiscardHandler)})
	var all []digest.Digest
	for _, l := range n.layers.All() {
		all = append(all, l.Digest)
	}
	filler.Want(all)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var g errgroup.Group
	g.Go(func() error { return filler.Run(ctx) })
	for slices.ContainsFunc(all, func(d digest.Digest) bool { return filler.State(d) != "" }) && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	cancel()
	return g.Wait()
}

func TestKilledFill(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		n := doomedProcess(t, in, trusting())
		return func() error { return n.fillAll(t.Context()) }
	})
	t.Parallel()
	d := newDoomed(t, trusting())
	d.before(t, func(*testing.T) {})
	d.killAtEachStep(t, "", func(t *testing.T) {
		if err := d.fillAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, l := range d.layers.All() {
			if !l.Complete() || !l.Verdict().Verified {
				t.Errorf("layer %s: complete is %v, verdict %+v", l.Digest, l.Complete(), l.Verdict())
			}
		}
	})
}
