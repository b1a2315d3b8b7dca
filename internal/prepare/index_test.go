// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// logs waits until the node has logged something.
func (n *node) logs(t *testing.T, text string) {
	t.Helper()
	for start := time.Now(); !strings.Contains(n.log.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatalf("nothing says %q:\n%s", text, n.log)
		}
	}
}

// plainFormats are those of layers that carry no index.
var plainFormats = []testimage.Format{testimage.Gzip, testimage.Zstd, testimage.Uncompressed}

// A layer without an index is read whole, verified and published, whoever serves
// it; its index then serves for everybody on the node, without a second look.
func TestBuiltIndex(t *testing.T) {
	for _, format := range plainFormats {
		t.Run(string(format), func(t *testing.T) {
			s := start(t, testregistry.Options{})
			n := newNode(t, prepare.Policy{Build: true}, s)
			base, top := tree(1), tree(2)
			layers := []testimage.Layer{convert(t, base, format), convert(t, top, format)}
			ref := push(t, s, "app", layers...)
			res := n.prepare(t, ref)
			if actions(res) != "fetched, fetched" {
				t.Fatalf("result %+v", res)
			}
			for _, l := range n.layers.All() {
				if !l.Verdict().Verified || l.Trust != index.Verified {
					t.Errorf("layer %s: verdict %+v, trust %v", l.Digest, l.Verdict(), l.Trust)
				}
			}
			n.compare(t, res.Layers[0], base)
			n.compare(t, res.Layers[1], top)

			if err := n.Remove(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
			n.nothing(t)
			res = n.prepare(t, ref)
			if actions(res) != "lazy, lazy" {
				t.Fatalf("with its index: %+v", res)
			}
			n.compare(t, res.Layers[0], base)
			n.compare(t, res.Layers[1], top)

			// A zTOC that the disk has damaged is not used, not even by who made it.
			ztoc := filepath.Join(n.dir, "indexes", layers[0].Descriptor.Digest.Encoded()+".ztoc")
			if p, err := os.ReadFile(ztoc); err == nil {
				p[len(p)-1] ^= 1
				if err := errors.Join(n.Remove(t.Context(), ref), os.WriteFile(ztoc, p, 0o600)); err != nil {
					t.Fatal(err)
				}
				if res = n.prepare(t, ref); actions(res) != "fetched, lazy" {
					t.Errorf("with a damaged index: %+v", res)
				}
				n.compare(t, res.Layers[0], base)
			} else {
				t.Error(err)
			}

			// The same blob with another diff ID is another matter.
			lied := layers[0]
			lied.DiffID = digest.FromString("another layer")
			if err := n.Remove(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
			if res := n.prepare(t, push(t, s, "lie", lied)); actions(res) != "left to the runtime" {
				t.Errorf("with another diff ID: %+v", res)
			}
		})
	}
}

// A zstd layer of one large frame has no index that is of use to others. It is read
// whole each time.
func TestNoIndexPossible(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, prepare.Policy{Build: true}, s)
	plain := testimage.Tar(testimage.File{Header: tar.Header{Name: "large"}, Content: bytes.Repeat(testimage.Bytes(1<<20, 1), 65)})
	ref := push(t, s, "app", convert(t, plain, testimage.Zstd))
	for range 2 {
		res := n.prepare(t, ref)
		if actions(res) != "fetched" {
			t.Fatalf("result %+v", res)
		}
		n.compare(t, res.Layers[0], plain)
		if err := n.Remove(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(n.dir, "indexes")); err != nil || len(left) > 0 {
		t.Errorf("kept: %v, %v", left, err)
	}
	if strings.Contains(n.log.String(), "level=WARN") {
		t.Errorf("log:\n%s", n.log)
	}
}

// A layer that has been read is published although the one above is not there yet,
// and stays published if that one never comes.
func TestPublishedEarly(t *testing.T) {
	base, top := convert(t, tree(1), testimage.Gzip), convert(t, tree(2), testimage.Gzip)
	release := make(chan struct{})
	s := start(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
		if strings.HasSuffix(r.URL.Path, top.Descriptor.Digest.String()) {
			<-release
		}
		return testregistry.Fault{}
	}})
	n := newNode(t, prepare.Policy{Build: true}, s)
	ref := push(t, s, "app", base, top)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := n.Prepare(ctx, prepare.Request{Reference: parse(t, ref)})
		ended <- err
	}()
	// The record is written a moment before its directory is there.
	eventually(t, func() bool {
		for id := range n.records(t) {
			return exists(t, filepath.Join(n.store.Root(), "overlay", id, "diff"))
		}
		return false
	})
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	close(release)
	img, err := n.Find(ref)
	if err != nil || img.Layers[0].Action != prepare.Fetched || img.Layers[1].Action != prepare.Left {
		t.Fatalf("image %+v, %v", img, err)
	}
	n.compare(t, img.Layers[0], tree(1))
	if res := n.prepare(t, ref); actions(res) != "fetched, fetched" {
		t.Errorf("then: %+v", res)
	}
}

// Without an index, and told not to make one, layers are the runtime's.
func TestNoIndexAndNoBuild(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	n.look = []index.Place{index.RegistryPlace}
	n.shut(t)
	n.start(t)
	res := n.prepare(t, push(t, s, "app", convert(t, tree(1), testimage.Gzip)))
	if actions(res) != "left to the runtime" || !strings.Contains(res.Layers[0].Reason, "carries no index") {
		t.Errorf("result %+v", res)
	}
	n.nothing(t)
}

// What one node has made is found by others, where both are told to look; what it is
// worth there depends on who says so.
func TestFoundIndex(t *testing.T) {
	s := start(t, testregistry.Options{Push: testregistry.PushAllowed})
	base, top := tree(1), tree(2)
	ref := push(t, s, "team/app", convert(t, base, testimage.Gzip), convert(t, top, testimage.Uncompressed))
	shared := index.Place(filepath.Join(t.TempDir(), "shared"))
	other := index.Place(index.RepositoryPlace + s.Host() + "/indexes")
	for _, place := range []index.Place{shared, index.RegistryPlace, other} {
		t.Run(string(place[:3]), func(t *testing.T) {
			first := makeNode(t, prepare.Policy{Build: true}, s)
			first.publish = []index.Place{place}
			first.start(t)
			if res := first.prepare(t, ref); actions(res) != "fetched, fetched" {
				t.Fatalf("first node: %+v", res)
			}
			first.logs(t, "published indexes")
			first.shut(t)
			for _, c := range []struct {
				name   string
				policy prepare.Policy
				want   string
			}{
				{"trusted", trusting(), "lazy, lazy"},
				{"bound at least", prepare.Policy{Trusted: trusting().Trusted, IndexTrust: index.Bound, Build: true}, "fetched, fetched"},
				{"not trusted", prepare.Policy{Build: true}, "fetched, fetched"},
			} {
				t.Run(c.name, func(t *testing.T) {
					n := makeNode(t, c.policy, s)
					n.look = []index.Place{"/nonexistent", place}
					n.start(t)
					res := n.prepare(t, ref)
					if actions(res) != c.want {
						t.Fatalf("result %+v\n%s", res, n.log)
					}
					n.compare(t, res.Layers[0], base)
					n.compare(t, res.Layers[1], top)
				})
			}
		})
	}
}

// An index that is of no use is named, once a pull, and the layer is read whole.
func TestUselessIndex(t *testing.T) {
	s := start(t, testregistry.Options{})
	l, other := convert(t, tree(1), testimage.Gzip), convert(t, tree(2), testimage.Gzip)
	dir := t.TempDir()
	for _, c := range []testimage.Layer{l, other} {
		n := makeNode(t, prepare.Policy{Build: true}, s)
		n.publish = []index.Place{index.Place(dir)}
		n.start(t)
		n.prepare(t, push(t, s, "app", c))
		n.logs(t, "published indexes")
		n.shut(t)
	}
	document := func(l testimage.Layer, kind string) string {
		return filepath.Join(dir, l.Descriptor.Digest.Encoded()+"."+kind)
	}
	read := func(name string) []byte {
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	ztoc, digests := read(document(l, "ztoc")), read(document(l, "digests"))
	damaged := bytes.Clone(ztoc)
	damaged[len(damaged)-1] ^= 1 // of a window: nothing else would notice
	newer := []byte(strings.Replace(string(ztoc), "0.9", "1.0", 1))
	noDigest := []byte(strings.Replace(string(ztoc), "sha256:", "sha255:", 1))
	for name, c := range map[string]struct {
		ztoc, digests []byte
		want          string
	}{
		"damaged":             {damaged, digests, "its zTOC has digest"},
		"of another layer":    {read(document(other, "ztoc")), nil, "that of a layer of"},
		"digests of another":  {ztoc, read(document(other, "digests")), "digests of layer"},
		"newer version":       {newer, nil, "version"},
		"missing span digest": {noDigest, nil, "span 0"},
		"cut off":             {ztoc[:len(ztoc)/2], nil, "reading zTOC"},
		"empty":               {nil, nil, "zTOC of 0 bytes"},
		"junk":                {[]byte(strings.Repeat("junk", 1000)), nil, "reading zTOC"},
	} {
		t.Run(name, func(t *testing.T) {
			err := os.WriteFile(document(l, "ztoc"), c.ztoc, 0o600)
			if c.digests != nil {
				err = errors.Join(err, os.WriteFile(document(l, "digests"), c.digests, 0o600))
			} else if rmErr := os.Remove(document(l, "digests")); !errors.Is(rmErr, fs.ErrNotExist) { // as where others put zTOCs
				err = errors.Join(err, rmErr)
			}
			if err != nil {
				t.Fatal(err)
			}
			policy := trusting()
			policy.Build = true
			n := makeNode(t, policy, s)
			n.look = []index.Place{index.Place(dir)}
			n.start(t)
			res := n.prepare(t, push(t, s, "app", l))
			if actions(res) != "fetched" {
				t.Errorf("result %+v", res)
			}
			n.compare(t, res.Layers[0], tree(1))
			if log := n.log.String(); strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, c.want) {
				t.Errorf("log, want one warning with %q:\n%s", c.want, log)
			}
		})
	}
}

// A registry that does not let one push, or knows no referrers, costs a warning.
func TestPublishingRefused(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := makeNode(t, prepare.Policy{Build: true}, s)
	n.publish = []index.Place{index.RegistryPlace}
	n.start(t)
	for _, name := range []string{"app", "other"} {
		l := convert(t, tree(uint64(len(name))), testimage.Gzip)
		if res := n.prepare(t, push(t, s, name, l)); actions(res) != "fetched" {
			t.Errorf("%s: %+v", name, res)
		}
		n.logs(t, "for=publishing")
	}
	n.shut(t)
	if log := n.log.String(); strings.Count(log, "for=publishing") > 2 || strings.Count(log, "for=publishing") == 0 {
		t.Errorf("log:\n%s", log)
	}
}
