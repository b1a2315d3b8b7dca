// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"encoding/json"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func TestLazy(t *testing.T) {
	for _, format := range []testimage.Format{testimage.EStargz, testimage.ZstdChunked, testimage.ZstdChunkedStargz} {
		t.Run(string(format), func(t *testing.T) {
			s := start(t, testregistry.Options{})
			n := newNode(t, trusting(), s)
			base, top := tree(1), tree(2)
			ref := push(t, s, "team/app", convert(t, base, format), convert(t, top, format))
			res := n.prepare(t, ref)
			if actions(res) != "lazy, lazy" || res.Reason != "" || res.Reference != ref {
				t.Fatalf("result %+v", res)
			}
			if r := n.records(t); len(r) != 2 || r[res.Layers[1].ChainID].Parent != res.Layers[0].ChainID {
				t.Errorf("records %+v", r)
			}
			n.compare(t, res.Layers[0], base)
			n.compare(t, res.Layers[1], top)
			for _, l := range n.layers.All() {
				if l.Verified {
					t.Errorf("layer %s counts as verified", l.Digest)
				}
			}
			if img, err := n.Find(ref); err != nil || img.Digest != res.Digest {
				t.Errorf("found %+v, error %v", img, err)
			}
			// Again, from what is there.
			if again := n.prepare(t, ref); again.Lazy() != 2 {
				t.Errorf("again: %+v", again)
			}
		})
	}
}

func TestUntrustedIsVerifiedFirst(t *testing.T) {
	for _, format := range []testimage.Format{testimage.EStargz, testimage.ZstdChunked, testimage.ZstdChunkedStargz} {
		t.Run(string(format), func(t *testing.T) {
			s := start(t, testregistry.Options{})
			n := newNode(t, prepare.Policy{}, s)
			plain := tree(1)
			ref := push(t, s, "team/app", convert(t, plain, format))
			var last prepare.Event
			res, err := n.Prepare(t.Context(), prepare.Request{Reference: parse(t, ref), Progress: func(e prepare.Event) { last = e }})
			if err != nil || actions(res) != "fetched" {
				t.Fatalf("result %+v, error %v", res, err)
			}
			if last.Done != last.Total || last.Done == 0 || last.Layer != res.Layers[0].Digest {
				t.Errorf("last event %+v", last)
			}
			l, ok := n.layers.Get(res.Layers[0].Digest)
			if !ok || !l.Verified || !l.Complete() {
				t.Errorf("layer %+v", l)
			}
			s.ResetCounts()
			n.compare(t, res.Layers[0], plain)
			if c := s.Counts(); c.Total != 0 {
				t.Errorf("reading took %d requests", c.Total)
			}
		})
	}
}

// Trust does not make a layer unverified again, and an image that is not
// trusted has what a trusted registry vouched for.
func TestTrustedAndUntrustedShare(t *testing.T) {
	good, other := start(t, testregistry.Options{}), start(t, testregistry.Options{})
	plain := tree(1)
	l := convert(t, plain, testimage.EStargz)
	refGood, refOther := push(t, good, "app", l), push(t, other, "app", l)
	n := newNode(t, prepare.Policy{Trusted: []string{good.Host()}}, good, other)
	if res := n.prepare(t, refGood); actions(res) != "lazy" {
		t.Errorf("trusted: %+v", res)
	}
	if res := n.prepare(t, refOther); res.Lazy() != 1 {
		t.Errorf("untrusted: %+v", res)
	}
	n.compare(t, n.prepare(t, refGood).Layers[0], plain)
}

func TestLeftToTheRuntime(t *testing.T) {
	base, top := tree(1), tree(2)
	for _, c := range []struct {
		name    string
		policy  func(*prepare.Policy)
		base    testimage.Format
		top     testimage.Format
		change  func(*v1.Manifest, *v1.Image)
		actions string
		reason  string // of the first layer that is left, or of the image
	}{
		{name: "plain gzip", base: testimage.Gzip, top: testimage.Gzip, actions: "left to the runtime, left to the runtime", reason: "carries no index"},
		{name: "chain is cut", base: testimage.Gzip, top: testimage.EStargz, actions: "left to the runtime, left to the runtime", reason: "carries no index"},
		{name: "chain ends", base: testimage.EStargz, top: testimage.Gzip, actions: "lazy, left to the runtime", reason: "carries no index"},
		{
			name: "small top layer", base: testimage.EStargz, top: testimage.EStargz, actions: "lazy, left to the runtime", reason: "image volumes",
			policy: func(p *prepare.Policy) { p.TopLayerLimit = 8 << 20 },
		},
		{
			name: "excluded", base: testimage.EStargz, top: testimage.EStargz, reason: "excluded",
			policy: func(p *prepare.Policy) { p.Exclude = []string{"127.0.0.1*/app"} },
		},
		{
			name: "included", base: testimage.EStargz, top: testimage.EStargz, actions: "lazy, lazy",
			policy: func(p *prepare.Policy) { p.Include = []string{"127.0.0.1*/app"} },
		},
		{
			name: "not included", base: testimage.EStargz, top: testimage.EStargz, reason: "excluded",
			policy: func(p *prepare.Policy) { p.Include = []string{"127.0.0.1*/other"} },
		},
		{
			name: "no command", base: testimage.EStargz, top: testimage.EStargz, actions: "left to the runtime, left to the runtime", reason: "no entrypoint",
			change: func(_ *v1.Manifest, i *v1.Image) { i.Config.Cmd = nil },
		},
		{
			name: "entrypoint only", base: testimage.EStargz, top: testimage.EStargz, actions: "lazy, lazy",
			change: func(_ *v1.Manifest, i *v1.Image) { i.Config.Cmd, i.Config.Entrypoint = nil, []string{"/x"} },
		},
		{
			name: "foreign media type", base: testimage.EStargz, top: testimage.EStargz, actions: "lazy, left to the runtime", reason: "media type",
			change: func(m *v1.Manifest, _ *v1.Image) {
				m.Layers[1].MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
			},
		},
		{
			name: "a layer twice", base: testimage.EStargz, top: testimage.EStargz, actions: "lazy, left to the runtime", reason: "twice",
			change: func(m *v1.Manifest, i *v1.Image) { m.Layers[1], i.RootFS.DiffIDs[1] = m.Layers[0], i.RootFS.DiffIDs[0] },
		},
		{
			name: "wrong TOC digest", base: testimage.EStargz, top: testimage.EStargz, actions: "lazy, left to the runtime", reason: "does not match its digest",
			change: func(m *v1.Manifest, _ *v1.Image) {
				m.Layers[1].Annotations["containerd.io/snapshot/stargz/toc.digest"] = digestOf(nil).String()
			},
		},
		{
			name: "no such blob", base: testimage.EStargz, top: testimage.EStargz, actions: "lazy, left to the runtime", reason: "not found",
			change: func(m *v1.Manifest, _ *v1.Image) { m.Layers[1].Digest = digestOf(nil) },
		},
	} {
		for _, trusted := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, trusted %v", c.name, trusted), func(t *testing.T) {
				policy := prepare.Policy{}
				if trusted {
					policy = trusting()
				}
				if c.policy != nil {
					c.policy(&policy)
				}
				s := start(t, testregistry.Options{})
				n := newNode(t, policy, s)
				change := c.change
				if change == nil {
					change = func(*v1.Manifest, *v1.Image) {}
				}
				ref := pushAltered(t, s, "app", change, convert(t, base, c.base), convert(t, top, c.top))
				res := n.prepare(t, ref)
				want := c.actions
				if !trusted {
					want = strings.ReplaceAll(want, "lazy", "fetched")
					if c.name == "wrong TOC digest" { // nobody looks at it
						want, c.reason = "fetched, fetched", ""
					}
				}
				if actions(res) != want {
					t.Errorf("result %+v, want %s", res, want)
				}
				if len(n.records(t)) != res.Lazy() {
					t.Errorf("records %v", n.records(t))
				}
				reason := res.Reason
				for _, l := range res.Layers {
					if l.Action == prepare.Left {
						if l.ChainID != "" {
							t.Errorf("layer %+v", l)
						}
						if reason == "" {
							reason = l.Reason
						}
					}
				}
				if !strings.Contains(reason, c.reason) || (reason == "") != (c.reason == "") {
					t.Errorf("reason %q, want %q", reason, c.reason)
				}
				if res.Lazy() == 0 {
					n.nothing(t)
				}
			})
		}
	}
}

func TestUnusableImages(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	l := convert(t, tree(1), testimage.EStargz)
	for name, change := range map[string]func(*v1.Manifest, *v1.Image){
		"fewer diff IDs":  func(_ *v1.Manifest, i *v1.Image) { i.RootFS.DiffIDs = nil },
		"more diff IDs":   func(_ *v1.Manifest, i *v1.Image) { i.RootFS.DiffIDs = append(i.RootFS.DiffIDs, l.DiffID) },
		"odd diff ID":     func(_ *v1.Manifest, i *v1.Image) { i.RootFS.DiffIDs[0] = "sha256:../../../etc" },
		"odd digest":      func(m *v1.Manifest, _ *v1.Image) { m.Layers[0].Digest = "sha256:../x" },
		"sha512":          func(m *v1.Manifest, _ *v1.Image) { m.Layers[0].Digest = "sha512:" + v1.DescriptorEmptyJSON.Digest },
		"negative size":   func(m *v1.Manifest, _ *v1.Image) { m.Layers[0].Size = -1 },
		"fewer layers":    func(m *v1.Manifest, _ *v1.Image) { m.Layers = nil },
		"huge layer size": func(m *v1.Manifest, _ *v1.Image) { m.Layers[0].Size = 1<<63 - 1 },
	} {
		t.Run(name, func(t *testing.T) {
			res, err := n.try(t.Context(), t, pushAltered(t, s, "app", change, l))
			if err == nil && res.Lazy() > 0 {
				t.Errorf("result %+v", res)
			}
			n.nothing(t)
		})
	}
	t.Run("not an image", func(t *testing.T) {
		s.AddManifest("odd", "v1", "application/vnd.example+json", []byte("{}"))
		if _, err := n.try(t.Context(), t, s.Host()+"/odd:v1"); err == nil {
			t.Error("no error")
		}
	})
}

func TestImageIndex(t *testing.T) {
	s := start(t, testregistry.Options{})
	n := newNode(t, trusting(), s)
	plain := tree(1)
	ours, theirs := image(convert(t, plain, testimage.EStargz)), image(convert(t, tree(2), testimage.EStargz))
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	for _, m := range []struct {
		image    testimage.Image
		platform *v1.Platform
	}{
		{theirs, nil},
		{theirs, &v1.Platform{OS: "unknown", Architecture: "unknown"}},
		{theirs, &v1.Platform{OS: "windows", Architecture: runtime.GOARCH}},
		{theirs, &v1.Platform{OS: "linux", Architecture: "s390x"}},
		{ours, &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}},
		{theirs, &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}},
	} {
		d, err := m.image.PushTo(s, "multi", "")
		if err != nil {
			t.Fatal(err)
		}
		index.Manifests = append(index.Manifests, v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: d, Platform: m.platform})
	}
	body, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	s.AddManifest("multi", "v1", v1.MediaTypeImageIndex, body)
	res := n.prepare(t, s.Host()+"/multi:v1")
	if res.Digest != index.Manifests[4].Digest {
		t.Errorf("took %s", res.Digest)
	}
	n.compare(t, res.Layers[0], plain)

	index.Manifests = index.Manifests[:4]
	if body, err = json.Marshal(index); err != nil {
		t.Fatal(err)
	}
	s.AddManifest("none", "v1", v1.MediaTypeImageIndex, body)
	if _, err := n.try(t.Context(), t, s.Host()+"/none:v1"); err == nil || !strings.Contains(err.Error(), runtime.GOARCH) {
		t.Errorf("error %v", err)
	}
}

// A registry that fails costs a message, never a record.
func TestRegistryFails(t *testing.T) {
	status := func(code int, kind string) func(*http.Request, int) testregistry.Fault {
		return func(r *http.Request, _ int) testregistry.Fault {
			if kind == "" || strings.Contains(r.URL.Path, "/"+kind+"/") {
				return testregistry.Fault{Status: code}
			}
			return testregistry.Fault{}
		}
	}
	for _, c := range []struct {
		name  string
		fault func(*http.Request, int) testregistry.Fault
		want  error
	}{
		{"401", status(401, ""), blob.ErrUnauthorized},
		{"403 for manifests", status(403, "manifests"), blob.ErrUnauthorized},
		{"404 for manifests", status(404, "manifests"), blob.ErrNotFound},
		{"404 for blobs", status(404, "blobs"), blob.ErrNotFound},
		{"500", status(500, ""), nil},
		{"broken connections", func(*http.Request, int) testregistry.Fault { return testregistry.Fault{Reset: true} }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := start(t, testregistry.Options{Fault: c.fault})
			n := newNode(t, trusting(), s)
			_, err := n.try(t.Context(), t, push(t, s, "app", convert(t, tree(1), testimage.EStargz)))
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			n.nothing(t)
		})
	}
	t.Run("down", func(t *testing.T) {
		s, err := testregistry.Start(testregistry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		n := newNode(t, trusting(), s)
		ref := push(t, s, "app", convert(t, tree(1), testimage.EStargz))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := n.try(t.Context(), t, ref); err == nil {
			t.Error("no error")
		}
		n.nothing(t)
	})
	t.Run("no such image", func(t *testing.T) {
		s := start(t, testregistry.Options{})
		n := newNode(t, trusting(), s)
		if _, err := n.try(t.Context(), t, s.Host()+"/none:v1"); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("error %v", err)
		}
		n.nothing(t)
	})
}

// Without ranges a layer cannot be lazy, but it can be fetched.
func TestRegistryWithoutRanges(t *testing.T) {
	whole := func(*http.Request, int) testregistry.Fault { return testregistry.Fault{IgnoreRange: true} }
	s := start(t, testregistry.Options{Fault: whole})
	plain := tree(1)
	ref := push(t, s, "app", convert(t, plain, testimage.ZstdChunked))
	lazy := newNode(t, trusting(), s)
	if res := lazy.prepare(t, ref); res.Lazy() != 0 || !strings.Contains(res.Layers[0].Reason, "range") {
		t.Errorf("trusted: %+v", res)
	}
	lazy.nothing(t)
	n := newNode(t, prepare.Policy{}, s)
	res := n.prepare(t, ref)
	if actions(res) != "fetched" {
		t.Fatalf("untrusted: %+v", res)
	}
	n.compare(t, res.Layers[0], plain)
}

func TestStall(t *testing.T) {
	for _, at := range []string{"manifests", "blobs"} {
		for _, policy := range []prepare.Policy{{}, trusting()} {
			t.Run(fmt.Sprintf("%s, trusting %v", at, policy.Trusted), func(t *testing.T) {
				s := start(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
					return testregistry.Fault{Stall: strings.Contains(r.URL.Path, at), At: 10}
				}})
				policy.StallTimeout = 200 * time.Millisecond
				n := newNode(t, policy, s)
				_, err := n.try(t.Context(), t, push(t, s, "app", convert(t, tree(1), testimage.EStargz)))
				if err == nil || !strings.Contains(err.Error(), "no progress") {
					t.Errorf("error %v", err)
				}
				n.Wait()
				n.nothing(t)
			})
		}
	}
}

func TestConcurrentCallersShare(t *testing.T) {
	release := make(chan struct{})
	var manifests atomic.Int32
	s := start(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
		if strings.Contains(r.URL.Path, "/manifests/") {
			manifests.Add(1)
			<-release
		}
		return testregistry.Fault{}
	}})
	n := newNode(t, trusting(), s)
	ref := push(t, s, "app", convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz))
	var g errgroup.Group
	var started atomic.Int32
	for range 10 {
		g.Go(func() error {
			started.Add(1)
			res, err := n.try(t.Context(), t, ref)
			if err == nil && res.Lazy() != 2 {
				err = fmt.Errorf("result %+v", res)
			}
			return err
		})
	}
	eventually(t, func() bool { return started.Load() == 10 && manifests.Load() > 0 })
	close(release)
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(n.records(t)) != 2 || len(n.layers.All()) != 2 {
		t.Errorf("records %v", n.records(t))
	}
	// The first request of each kind may come before others have joined.
	served := map[string]int{}
	for _, r := range s.Served() {
		served[fmt.Sprint(r)]++
	}
	for what, times := range served {
		if times > 2 {
			t.Errorf("%s was fetched %d times", what, times)
		}
	}
}

// Images that have layers in common and come at the same time.
func TestConcurrentImagesShareLayers(t *testing.T) {
	for _, policy := range []prepare.Policy{{}, trusting()} {
		s := start(t, testregistry.Options{})
		n := newNode(t, policy, s)
		base := convert(t, tree(1), testimage.EStargz)
		var g errgroup.Group
		for i := range 5 {
			ref := push(t, s, fmt.Sprint("app", i), base, convert(t, tree(uint64(10+i)), testimage.EStargz)) //nolint:gosec // small
			g.Go(func() error {
				res, err := n.try(t.Context(), t, ref)
				if err == nil && res.Lazy() != 2 {
					err = fmt.Errorf("result %+v", res)
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		if len(n.records(t)) != 6 || len(n.layers.All()) != 6 {
			t.Errorf("%d records, %d layers", len(n.records(t)), len(n.layers.All()))
		}
	}
}

// A caller that leaves hears nothing any more, although others go on with what
// it began.
func TestProgressEndsWithTheCaller(t *testing.T) {
	release := make(chan struct{})
	var held atomic.Bool
	l := convert(t, tree(1), testimage.EStargz)
	s := start(t, testregistry.Options{Fault: func(r *http.Request, _ int) testregistry.Fault {
		if strings.HasSuffix(r.URL.Path, l.Descriptor.Digest.String()) {
			held.Store(true)
			<-release
		}
		return testregistry.Fault{}
	}})
	n := newNode(t, prepare.Policy{}, s)
	ref := push(t, s, "app", l)
	var left atomic.Bool
	ctx, leave := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := n.Prepare(ctx, prepare.Request{Reference: parse(t, ref), Progress: func(prepare.Event) {
			if left.Load() {
				t.Error("an event after the caller has left")
			}
		}})
		left.Store(true)
		first <- err
	}()
	eventually(t, held.Load)
	joined := make(chan struct{})
	go func() {
		close(joined)
		_, err := n.try(t.Context(), t, ref)
		second <- err
	}()
	<-joined
	leave()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("who left: %v", err)
	}
	close(release)
	if err := <-second; err != nil {
		t.Errorf("who stayed: %v", err)
	}
}

// What a pull may cost before anything is read.
func TestRequests(t *testing.T) {
	for name, manner := range map[string]testregistry.Manner{
		"plain": testregistry.Plain, "Docker Hub": testregistry.DockerHub, "Quay": testregistry.Quay,
		"GHCR": testregistry.GHCR, "ECR": testregistry.ECR,
	} {
		for _, format := range []testimage.Format{testimage.EStargz, testimage.ZstdChunked} {
			t.Run(fmt.Sprintf("%s, %s", name, format), func(t *testing.T) {
				s := start(t, testregistry.Options{Manner: manner, Private: true})
				n := newNode(t, trusting(), s)
				base, top := tree(1), tree(2)
				ref := push(t, s, "team/app", convert(t, base, format), convert(t, top, format))
				user := "user"
				if manner == testregistry.ECR {
					user = "AWS"
				}
				res, err := n.Prepare(t.Context(), prepare.Request{
					Reference: parse(t, ref), Credentials: &registry.Credentials{Username: user, Password: "secret"},
				})
				c := s.Counts()
				if err != nil || actions(res) != "lazy, lazy" {
					t.Fatalf("result %+v, error %v", res, err)
				}
				if c.Total > 10 {
					t.Errorf("%d requests: %+v", c.Total, c)
				}
				n.compare(t, res.Layers[0], base)
				n.compare(t, res.Layers[1], top)
			})
		}
	}
}

func TestCredentials(t *testing.T) {
	s := start(t, testregistry.Options{Manner: testregistry.DockerHub, Private: true})
	n := newNode(t, trusting(), s)
	ref := push(t, s, "team/app", convert(t, tree(1), testimage.EStargz))
	for _, creds := range []*registry.Credentials{nil, {Username: "user", Password: "wrong"}} {
		if _, err := n.Prepare(t.Context(), prepare.Request{Reference: parse(t, ref), Credentials: creds}); !errors.Is(err, blob.ErrUnauthorized) {
			t.Errorf("error %v", err)
		} else if strings.Contains(err.Error(), "wrong") {
			t.Errorf("the error holds the password: %v", err)
		}
	}
	n.nothing(t)
	if log := n.log.String(); strings.Contains(log, "wrong") {
		t.Errorf("the log holds the password: %s", log)
	}
}

func eventually(t *testing.T, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	timeout := time.After(20 * time.Second)
	for !condition() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatal("it did not happen within 20 seconds")
		}
	}
}

func exists(t *testing.T, pattern string) bool {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return len(found) > 0
}
