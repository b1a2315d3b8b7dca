// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestRemove(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	base, one, two := convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz), convert(t, tree(3), testimage.EStargz)
	refOne, refTwo := push(t, s, "one", base, one), push(t, s, "two", base, two)
	first, second := n.prepare(t, refOne), n.prepare(t, refTwo)
	if len(n.records(t)) != 3 {
		t.Fatalf("records %v", n.records(t))
	}
	if err := n.Remove(t.Context(), s.Host()+"/none"); !errors.Is(err, prepare.ErrUnknown) {
		t.Errorf("unknown image: %v", err)
	}

	// In use counts as in use: of a layer, and of all below it.
	n.refer(t, first.Layers[1].ChainID)
	if err := n.Remove(t.Context(), refOne); !errors.Is(err, prepare.ErrInUse) || !strings.Contains(err.Error(), "image x in "+n.policy.RuntimeRoots[0]) {
		t.Errorf("error %v", err)
	}
	if len(n.records(t)) != 3 || len(n.layers.All()) != 3 {
		t.Errorf("records %v", n.records(t))
	}
	// What cannot be read keeps everything.
	write(t, filepath.Join(n.policy.RuntimeRoots[0], "overlay-images", "images.json"), `[{"id":`)
	if err := n.Remove(t.Context(), refOne); err == nil || len(n.records(t)) != 3 {
		t.Errorf("error %v, records %v", err, n.records(t))
	}
	if err := os.RemoveAll(n.policy.RuntimeRoots[0]); err != nil {
		t.Fatal(err)
	}

	// What the other image needs stays, and works.
	if err := n.Remove(t.Context(), refOne); err != nil {
		t.Fatal(err)
	}
	if r := n.records(t); len(r) != 2 || r[first.Layers[1].ChainID].ID != "" {
		t.Errorf("records %v", r)
	}
	if _, ok := n.layers.Get(one.Descriptor.Digest); ok || exists(t, filepath.Join(n.dir, "layers", one.Descriptor.Digest.Encoded())) {
		t.Error("the layer is still there")
	}
	n.compare(t, second.Layers[0], tree(1))
	n.compare(t, second.Layers[1], tree(3))
	if err := n.Remove(t.Context(), refOne); !errors.Is(err, prepare.ErrUnknown) {
		t.Errorf("again: %v", err)
	}
	if err := n.Remove(t.Context(), second.Digest.String()); err != nil {
		t.Errorf("by digest: %v", err)
	}
	n.nothing(t)
	if exists(t, filepath.Join(n.dir, "layers", "*")) || exists(t, filepath.Join(n.dir, "mounts", "*")) {
		t.Error("something is left on disk")
	}
	// And all of it can be prepared again.
	n.compare(t, n.prepare(t, refOne).Layers[1], tree(2))
}

func TestNames(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	l := convert(t, tree(1), testimage.EStargz)
	first, second := push(t, s, "one", l), push(t, s, "two", l)
	res := n.prepare(t, first)
	n.prepare(t, second)
	if all, err := n.Images(); err != nil || len(all) != 1 || len(all[0].References) != 2 {
		t.Fatalf("images %+v, error %v", all, err)
	}
	if err := n.Remove(t.Context(), first); err != nil {
		t.Error(err)
	}
	n.compare(t, res.Layers[0], tree(1))
	// A tag that moves belongs to the newer image.
	moved := push(t, s, "two", convert(t, tree(2), testimage.EStargz))
	newer := n.prepare(t, moved)
	if img, err := n.Find(moved); err != nil || img.Digest != newer.Digest {
		t.Errorf("found %+v, error %v", img, err)
	}
	if img, err := n.Find(res.Digest.String()); err != nil || len(img.References) != 0 {
		t.Errorf("the older one: %+v, error %v", img, err)
	}
}

// An image that is named by digest and has been prepared needs no network.
func TestPreparedByDigest(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	res := n.prepare(t, push(t, s, "app", convert(t, tree(1), testimage.EStargz)))
	s.ResetCounts()
	again := n.prepare(t, s.Host()+"/app@"+res.Digest.String())
	if c := s.Counts(); again.Lazy() != 1 || c.Manifest != 0 {
		t.Errorf("result %+v after %+v", again, c)
	}
}

// A layer that was left because the registry had a bad day is tried again.
func TestLeftLayerIsTriedAgain(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	base, top := convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz)
	ref := push(t, s, "app", base, top)
	s.RemoveBlob(top.Descriptor.Digest)
	res := n.prepare(t, ref)
	if res.Lazy() != 1 {
		t.Fatalf("result %+v", res)
	}
	s.AddBlob(top.Bytes)
	if again := n.prepare(t, s.Host()+"/app@"+res.Digest.String()); again.Lazy() != 2 {
		t.Errorf("result %+v", again)
	}
	n.compare(t, n.prepare(t, ref).Layers[1], tree(2))
}

func TestSuspendAndRestore(t *testing.T) {
	for name, policy := range map[string]prepare.Policy{"lazy": trusting(), "fetched": {}} {
		t.Run(name, func(t *testing.T) {
			s, err := testregistry.Start(testregistry.Options{})
			if err != nil {
				t.Fatal(err)
			}
			n := newNode(t, policy, s)
			used := n.prepare(t, push(t, s, "used", convert(t, tree(1), testimage.EStargz)))
			idle := n.prepare(t, push(t, s, "idle", convert(t, tree(2), testimage.EStargz), convert(t, tree(3), testimage.EStargz)))
			n.compare(t, used.Layers[0], tree(1)) // local from now on
			n.refer(t, used.Layers[0].ChainID)
			n.shut(t)
			if r := n.records(t); len(r) != 1 || r[used.Layers[0].ChainID].ID == "" {
				t.Errorf("while it is stopped: records %v", r)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			// The network is gone.
			n.start(t)
			if err := n.Restore(t.Context()); err != nil {
				t.Fatal(err)
			}
			if r := n.records(t); len(r) != 3 {
				t.Errorf("after the start: records %v", r)
			}
			n.compare(t, used.Layers[0], tree(1))
			if name == "fetched" {
				n.compare(t, idle.Layers[0], tree(2))
				n.compare(t, idle.Layers[1], tree(3))
			}
		})
	}
}

// After a restart, a layer that is not complete is read from where it was.
func TestRestoreSources(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	res := n.prepare(t, push(t, s, "app", convert(t, tree(1), testimage.EStargz)))
	n.shut(t)
	n.start(t)
	if err := n.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.compare(t, res.Layers[0], tree(1))
}

// A layer that is damaged on disk is not served, and its record goes, so that
// the next pull is a normal one; or, at the next preparation, it is made anew.
func TestRestoreWithoutALayer(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	ref := push(t, s, "app", convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz))
	res := n.prepare(t, ref)
	n.shut(t)
	write(t, filepath.Join(n.dir, "layers", res.Layers[1].Digest.Encoded(), "chunks"), "damaged")
	n.start(t)
	if err := n.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := n.records(t); len(r) != 1 || r[res.Layers[0].ChainID].ID == "" {
		t.Errorf("records %v", r)
	}
	if !strings.Contains(n.log.String(), res.Layers[1].Digest.Encoded()) {
		t.Errorf("the log does not name the layer: %s", n.log)
	}
	if again := n.prepare(t, ref); again.Lazy() != 2 {
		t.Fatalf("result %+v", again)
	}
	n.compare(t, res.Layers[0], tree(1))
	n.compare(t, res.Layers[1], tree(2))
}

// A kill right after the verdict: the next start takes the layer out of sight.
func TestRestoreHidesWhatIsInQuarantine(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	res := n.prepare(t, push(t, s, "app", convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz)))
	n.refer(t, res.Layers[1].ChainID)
	l, ok := n.layers.Get(res.Layers[1].Digest)
	if !ok {
		t.Fatal("the layer is gone")
	}
	if err := l.SetVerdict(layer.Verdict{Quarantined: "for a test"}); err != nil {
		t.Fatal(err)
	}
	n.restart(t)
	r := n.records(t)
	if base, top := r[res.Layers[0].ChainID], r[res.Layers[1].ChainID]; base.ID == "" || base.Hidden || top.ID == "" || !top.Hidden {
		t.Errorf("records %+v", r)
	}
	n.compare(t, res.Layers[0], tree(1))
}

func TestPrepareEndsWithItsContext(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.try(ctx, t, push(t, s, "app", convert(t, tree(1), testimage.EStargz))); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}
