// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/sources"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// stick is an OCI layout that has an image under a name.
func stick(t *testing.T, ref string, layers ...testimage.Layer) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "stick")
	if err := image(layers...).WriteLayout(dir, ref); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sourced is a node with these sources, all layouts among them trusted.
func sourced(t *testing.T, policy prepare.Policy, servers []*testregistry.Server, places ...string) *node {
	t.Helper()
	n := makeNode(t, policy, servers...)
	for _, p := range places {
		n.places = append(n.places, sources.Place(p))
		if p != string(sources.Registry) {
			n.trusted = append(n.trusted, sources.Place(p))
		}
	}
	n.start(t)
	return n
}

// A layer of an image on a stick is mounted lazily from there; nobody else is asked.
func TestLazyFromAStick(t *testing.T) {
	for _, c := range []struct {
		format testimage.Format
		want   string
	}{{testimage.EStargz, "lazy"}, {testimage.ZstdChunked, "lazy"}, {testimage.Gzip, "fetched"}} {
		t.Run(string(c.format), func(t *testing.T) {
			s := start(t, testregistry.Options{})
			ref, plain := s.Host()+"/team/app:v1", tree(1)
			n := sourced(t, prepare.Policy{Build: true}, []*testregistry.Server{s}, stick(t, ref, convert(t, plain, c.format)), "registry")
			res := n.prepare(t, ref)
			if actions(res) != c.want {
				t.Fatalf("result %+v", res)
			}
			n.compare(t, res.Layers[0], plain)
			if c := s.Counts(); c.Total != 0 {
				t.Errorf("the registry was asked: %+v", c)
			}
		})
	}
}

// The names on a stick say nothing about whom to trust, not even those of registries
// that are trusted.
func TestStickThatNobodyTrusts(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref, plain := s.Host()+"/team/app:v1", tree(1)
	n := makeNode(t, trusting(), s)
	n.policy.Build = true
	n.places = []sources.Place{sources.Place(stick(t, ref, convert(t, plain, testimage.EStargz))), sources.Registry}
	n.start(t)
	res := n.prepare(t, ref)
	if actions(res) != "fetched" || !n.layers.All()[0].Verdict().Verified {
		t.Fatalf("result %+v", res)
	}
	n.compare(t, res.Layers[0], plain)
}

// Of two sources with the same name the first counts, for the image and its layers.
func TestFirstSourceWins(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref := push(t, s, "team/app", convert(t, tree(3), testimage.EStargz))
	one, two := stick(t, ref, convert(t, tree(1), testimage.EStargz)), stick(t, ref, convert(t, tree(2), testimage.EStargz))
	for _, c := range []struct {
		places []string
		want   uint64
	}{
		{[]string{one, two, "registry"}, 1},
		{[]string{two, one, "registry"}, 2},
		{[]string{"registry", one, two}, 3},
		{[]string{filepath.Join(t.TempDir(), "not there"), two, "registry"}, 2},
	} {
		n := sourced(t, trusting(), []*testregistry.Server{s}, c.places...)
		n.compare(t, n.prepare(t, ref).Layers[0], tree(c.want))
	}
}

// A source that loses or damages a blob after the image was mounted costs its
// readers nothing while another has it.
func TestStickIsPulled(t *testing.T) {
	for name, harm := range map[string]func(dir string) error{
		"pulled": func(dir string) error { return os.Rename(dir, dir+".gone") },
		"empty":  func(dir string) error { return os.RemoveAll(filepath.Join(dir, "blobs")) },
		"corrupt": func(dir string) error {
			files, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*"))
			for _, f := range files {
				info, e := os.Stat(f)
				if e == nil && info.Size() > 100_000 { // the layer
					err = os.WriteFile(f, make([]byte, info.Size()), 0o600)
				}
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, testregistry.Options{})
			plain := tree(1)
			l := convert(t, plain, testimage.EStargz)
			ref := push(t, s, "team/app", l)
			dir := stick(t, ref, l)
			n := sourced(t, trusting(), []*testregistry.Server{s}, dir, "registry")
			res := n.prepare(t, ref)
			if actions(res) != "lazy" || s.Counts().Total != 0 {
				t.Fatalf("result %+v, the registry was asked %d times", res, s.Counts().Total)
			}
			if err := harm(dir); err != nil {
				t.Fatal(err)
			}
			n.compare(t, res.Layers[0], plain)
			if s.Counts().Total == 0 {
				t.Error("nobody was asked")
			}
		})
	}
}

// Offline no registry is asked, and what is missing is named.
func TestOffline(t *testing.T) {
	s := start(t, testregistry.Options{})
	layers := []testimage.Layer{convert(t, tree(1), testimage.EStargz), convert(t, tree(2), testimage.EStargz)}
	ref := push(t, s, "team/app", layers...)
	dir := stick(t, ref, layers...)
	n := sourced(t, trusting(), []*testregistry.Server{s}, "registry", dir)
	try := func(ref string) error {
		_, err := n.Prepare(t.Context(), prepare.Request{Reference: parse(t, ref), Offline: true})
		return err
	}
	if err := try(s.Host() + "/team/other:v1"); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("an image that is not there: %v", err)
	}
	lost := filepath.Join(dir, "blobs", "sha256", layers[1].Descriptor.Digest.Encoded())
	if err := os.Rename(lost, lost+".away"); err != nil {
		t.Fatal(err)
	}
	err := try(ref)
	if err == nil || !strings.Contains(err.Error(), layers[1].Descriptor.Digest.String()+" (") || strings.Contains(err.Error(), layers[0].Descriptor.Digest.String()) {
		t.Errorf("a layer that is not there: %v", err)
	}
	n.nothing(t)
	if err := os.Rename(lost+".away", lost); err != nil {
		t.Fatal(err)
	}
	if err := try(ref); err != nil {
		t.Error(err)
	}
	if c := s.Counts(); c.Total != 0 {
		t.Errorf("the registry was asked: %+v", c)
	}
	alone := sourced(t, trusting(), []*testregistry.Server{s}, "registry")
	if _, err := alone.Prepare(t.Context(), prepare.Request{Reference: parse(t, ref), Offline: true}); err == nil || !strings.Contains(err.Error(), "no OCI layout is among the sources") {
		t.Error(err)
	}
}

// Another registry has an image under its path.
func TestOtherRegistry(t *testing.T) {
	s, other := start(t, testregistry.Options{}), start(t, testregistry.Options{})
	plain := tree(1)
	push(t, other, "cache/team/app", convert(t, plain, testimage.EStargz))
	n := sourced(t, trusting(), []*testregistry.Server{s, other}, "registry", "docker://"+other.Host()+"/cache")
	n.compare(t, n.prepare(t, s.Host()+"/team/app:v1").Layers[0], plain)
}
