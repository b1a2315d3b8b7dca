// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// age makes an image one that was prepared long ago, and unused for so long.
func (n *node) age(t *testing.T, res *prepare.Result, unused time.Duration) {
	t.Helper()
	img, err := n.Find(res.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	img.Prepared = time.Now().Add(-unused - time.Hour)
	img.UnusedSince = time.Now().Add(-unused)
	n.writeImage(t, img)
}

func (n *node) writeImage(t *testing.T, img prepare.Image) {
	t.Helper()
	data, err := json.Marshal(img)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(n.dir, "images", img.Digest.Encoded()+".json"), string(data))
}

func (n *node) collect(t *testing.T, grace time.Duration, dryRun bool) *prepare.Collection {
	t.Helper()
	c, err := n.Collect(t.Context(), grace, dryRun)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// removed are the names of what a collection removed, or would.
func removed(c *prepare.Collection) string {
	var names []string
	for _, d := range c.Decisions {
		if d.Remove {
			names = append(names, d.Kind+" "+d.Name)
		}
	}
	return strings.Join(names, "; ")
}

func reasons(c *prepare.Collection) string {
	var all []string
	for _, d := range c.Decisions {
		all = append(all, d.Reason)
	}
	return strings.Join(all, "; ")
}

func TestCollect(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	base, one, two := convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz), convert(t, tree(3), testimage.EStargz)
	refOne, refTwo := push(t, s, "one", base, one), push(t, s, "two", base, two)
	first, second := n.prepare(t, refOne), n.prepare(t, refTwo)
	n.compare(t, first.Layers[1], tree(2)) // so that there are bytes to free

	// A runtime may be about to refer to them, however short the grace period is.
	if c := n.collect(t, 0, false); removed(c) != "" || !strings.Contains(reasons(c), "a runtime may be about to refer to it") {
		t.Errorf("just prepared: %+v", c)
	}
	n.age(t, first, 2*time.Hour)
	n.age(t, second, 2*time.Hour)
	n.refer(t, second.Layers[1].ChainID)
	if c := n.collect(t, 3*time.Hour, false); removed(c) != "" || !strings.Contains(reasons(c), "unused for 2h, grace period 3h") ||
		!strings.Contains(reasons(c), "in use: image x in "+n.policy.RuntimeRoots[0]) {
		t.Errorf("within the grace period: %+v", c)
	}
	if img, err := n.Find(refTwo); err != nil || !img.UnusedSince.IsZero() {
		t.Errorf("in use: %+v, error %v", img, err)
	}

	// A dry run says what would go, and touches nothing.
	before := n.files(t)
	c := n.collect(t, time.Hour, true)
	if removed(c) != "image "+refOne || c.Freed == 0 || !c.DryRun {
		t.Errorf("dry run: %+v", c)
	}
	if after := n.files(t); after != before {
		t.Errorf("a dry run changed\n%s\nto\n%s", before, after)
	}
	if c := n.collect(t, time.Hour, false); removed(c) != "image "+refOne || c.Freed == 0 {
		t.Errorf("collected %+v", c)
	}
	if r := n.records(t); len(r) != 2 || len(n.layers.All()) != 2 {
		t.Errorf("records %v", r)
	}
	n.compare(t, second.Layers[0], tree(1))
	n.compare(t, second.Layers[1], tree(3))

	// What cannot be read keeps everything, and says so.
	n.age(t, second, 2*time.Hour)
	images := filepath.Join(n.policy.RuntimeRoots[0], "overlay-images", "images.json")
	write(t, images, `[{"id":`)
	if c := n.collect(t, 0, false); removed(c) != "" || !strings.Contains(reasons(c), images) {
		t.Errorf("unreadable root: %+v", c)
	}
	// A root that is not there refers to nothing.
	if err := os.RemoveAll(n.policy.RuntimeRoots[0]); err != nil {
		t.Fatal(err)
	}
	if c := n.collect(t, 0, false); removed(c) != "image "+refTwo {
		t.Errorf("no root: %+v", c)
	}
	n.nothing(t)
	if exists(t, filepath.Join(n.dir, "layers", "*")) || exists(t, filepath.Join(n.dir, "mounts", "*")) {
		t.Error("something is left on disk")
	}
}

// files describes what a collection could change.
func (n *node) files(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, dir := range []string{"images", "layers", "mounts", "store/overlay-layers", "store/overlay", "records"} {
		entries, err := os.ReadDir(filepath.Join(n.dir, dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			all.WriteString(dir + "/" + e.Name() + " " + info.ModTime().String() + "\n")
		}
	}
	return all.String()
}

// Preparing an image again starts its grace period anew, also when there is
// nothing to do.
func TestPrepareStartsGraceAnew(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	ref := push(t, s, "app", convert(t, tree(1), testimage.EStargz))
	res := n.prepare(t, ref)
	for _, again := range []string{ref, s.Host() + "/app@" + res.Digest.String()} {
		n.age(t, res, 48*time.Hour)
		n.prepare(t, again)
		if c := n.collect(t, 24*time.Hour, false); removed(c) != "" {
			t.Errorf("%s: %+v", again, c)
		}
	}
}

// What a preparation has added is not collected while it goes on.
func TestCollectDuringPreparation(t *testing.T) {
	base, top := convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz)
	release := make(chan struct{})
	s := start(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
		if strings.Contains(r.URL.Path, top.Descriptor.Digest.String()) {
			<-release
		}
		return testregistry.Fault{}
	}})
	n := newNode(t, trusting(), s)
	ref := push(t, s, "app", base, top)
	done := make(chan error, 1)
	var res *prepare.Result
	go func() {
		var err error
		res, err = n.try(t.Context(), t, ref)
		done <- err
	}()
	for len(n.layers.All()) == 0 {
		time.Sleep(time.Millisecond)
	}
	if c := n.collect(t, 0, false); removed(c) != "" || !strings.Contains(reasons(c), "being prepared") {
		t.Errorf("collected %+v", c)
	}
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	n.compare(t, res.Layers[0], tree(1))
	n.compare(t, res.Layers[1], tree(2))
}

// What a preparation that failed has left goes, too.
func TestCollectWhatNoImageHas(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	res := n.prepare(t, push(t, s, "app", convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz)))
	if err := n.store.Withdraw(t.Context(), res.Layers[1].ChainID, res.Layers[0].ChainID); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(n.dir, "images", res.Digest.Encoded()+".json")); err != nil {
		t.Fatal(err)
	}
	if c := n.collect(t, time.Hour, false); removed(c) != "" || len(c.Decisions) != 2 {
		t.Errorf("young: %+v", c)
	}
	if c := n.collect(t, 0, false); strings.Count(removed(c), "layer ") != 2 {
		t.Errorf("collected %+v", c)
	}
	n.nothing(t)
}

// A removal that stops at any step has left nothing that leads to what is gone.
func TestOrderOfRemoval(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	res := n.prepare(t, push(t, s, "app", convert(t, tree(1), testimage.EStargz)))
	n.age(t, res, time.Hour)
	l := res.Layers[0]
	record := filepath.Join(n.dir, "store", "overlay", l.ChainID)
	image := filepath.Join(n.dir, "images", res.Digest.Encoded()+".json")
	mounted := filepath.Join(n.dir, "mounts", "*", "diff")
	cache := filepath.Join(n.dir, "layers", l.Digest.Encoded())
	lock := filepath.Join(n.dir, "store", "overlay-layers", "layers.lock")

	there := func(step string, want ...string) {
		t.Helper()
		for _, path := range []string{record, image, mounted, cache} {
			if got := exists(t, path); got != slices.Contains(want, path) {
				t.Errorf("%s: %s is there: %v", step, path, got)
			}
		}
		if got := len(n.records(t)); (got > 0) != slices.Contains(want, record) {
			t.Errorf("%s: %d records", step, got)
		}
	}
	fails := func() {
		t.Helper()
		if c := n.collect(t, 0, false); removed(c) != "" || !strings.Contains(reasons(c), "removing it") {
			t.Errorf("collected %+v", c)
		}
	}
	// What is a mount point cannot be removed or renamed.
	pin := func(path string) {
		t.Helper()
		if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	unpin := func(path string) {
		t.Helper()
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}

	if err := os.Rename(lock, lock+".away"); err != nil {
		t.Fatal(err)
	}
	fails()
	there("the records do not change", record, image, mounted, cache)
	n.compare(t, l, tree(1))
	if err := os.Rename(lock+".away", lock); err != nil {
		t.Fatal(err)
	}
	pin(image)
	fails()
	there("the image does not go", image, mounted, cache)
	unpin(image)
	pin(cache)
	n.collect(t, 0, false)
	there("the cache does not go", cache)
	unpin(cache)
}

// A runtime may store an image just when its records go: they come back.
func TestReferenceDuringRemoval(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	ref := push(t, s, "app", convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz))
	res := n.prepare(t, ref)
	n.refer(t, res.Layers[1].ChainID)
	if err := n.RemoveUnchecked(t.Context(), ref); !errors.Is(err, prepare.ErrInUse) {
		t.Errorf("error %v", err)
	}
	n.compare(t, res.Layers[0], tree(1))
	n.compare(t, res.Layers[1], tree(2))
}

// Run tells which images are in use, and collects the others.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := bareNode(t, time.Hour)
		img := prepare.Image{
			References: []string{"quay.io/app:v1"}, Digest: digest.FromString("app"), Prepared: time.Now(), UnusedSince: time.Now(),
			Layers: []prepare.LayerResult{{Digest: digest.FromString("layer"), ChainID: digest.FromString("layer").Encoded(), Action: prepare.Lazy}},
		}
		n.writeImage(t, img)
		ctx, stop := context.WithCancel(t.Context())
		var mu sync.Mutex // protects told
		var told []string
		ended := make(chan error, 1)
		go func() {
			ended <- n.Run(ctx, func(used []prepare.Image) {
				names := []string{}
				for _, i := range used {
					names = append(names, i.References...)
				}
				mu.Lock()
				defer mu.Unlock()
				told = append(told, strings.Join(names, ","))
			})
		}()
		last := func() (string, int) {
			time.Sleep(2 * time.Second) // of the bubble's time
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return told[len(told)-1], len(told)
		}
		if got, _ := last(); got != "" {
			t.Errorf("before a pull: in use %q", got)
		}
		n.refer(t, img.Layers[0].ChainID)
		got, calls := last()
		if got != "quay.io/app:v1" {
			t.Errorf("after a pull: in use %q", got)
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if found, err := n.Find("quay.io/app:v1"); err != nil || !found.UnusedSince.IsZero() {
			t.Errorf("after two hours in use: %+v, error %v", found, err)
		}
		if err := os.RemoveAll(n.policy.RuntimeRoots[0]); err != nil {
			t.Fatal(err)
		}
		if got, n := last(); got != "" || n <= calls {
			t.Errorf("after rmi: in use %q", got)
		}
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		if _, err := n.Find("quay.io/app:v1"); err != nil {
			t.Errorf("within the grace period: %v", err)
		}
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if _, err := n.Find("quay.io/app:v1"); !errors.Is(err, prepare.ErrUnknown) {
			t.Errorf("after the grace period: %v", err)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
