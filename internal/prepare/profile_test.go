// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/profile"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// profiling is a node that records and uses profiles, and has those of others from
// a directory, unless that is "".
func profiling(t *testing.T, dir string, servers ...*testregistry.Server) *node {
	t.Helper()
	n := makeNode(t, trusting(), servers...)
	store, err := profile.OpenStore(filepath.Join(n.dir, "profiles"))
	if err != nil {
		t.Fatal(err)
	}
	n.profiles = prepare.Profiles{Store: store, Settle: 200 * time.Millisecond}
	if dir != "" {
		n.look, n.publish = []index.Place{index.Place(dir)}, []index.Place{index.Place(dir)}
	}
	n.start(t)
	return n
}

// program is a layer of ten files that are far apart.
func program(t *testing.T, seed uint64) testimage.Layer {
	t.Helper()
	files := []testimage.File{{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir}}}
	for i := range 10 {
		files = append(files, testimage.File{
			Header:  tar.Header{Name: fmt.Sprintf("file-%d", i)},
			Content: testimage.Bytes(400_000, seed*100+uint64(i)), //nolint:gosec // small
		})
	}
	return convert(t, testimage.Tar(files...), testimage.EStargz)
}

// read reads files of a layer through its mount, as a container does.
func (n *node) read(t *testing.T, l prepare.LayerResult, files ...int) {
	t.Helper()
	for _, i := range files {
		name := filepath.Join(n.layers.MountDirectory(l.Digest), "diff", fmt.Sprintf("file-%d", i))
		if _, err := os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
}

// recorded waits for a profile of so many runs.
func (n *node) recorded(t *testing.T, ref string, runs int) *profile.Profile {
	t.Helper()
	var p *profile.Profile
	eventually(t, func() bool {
		var err error
		p, err = n.Profile(ref)
		return err == nil && p.Runs == runs
	})
	return p
}

// fetched waits until a start by the profile has fetched all.
func (n *node) fetched(t *testing.T, times int) {
	t.Helper()
	eventually(t, func() bool {
		return strings.Count(n.log.String(), "fetched by the profile") == times
	})
}

func encode(t *testing.T, p *profile.Profile) []byte {
	t.Helper()
	data, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestProfileGoesToAnotherNode(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref := push(t, s, "app", program(t, 1), program(t, 2))
	here := t.TempDir()
	a := profiling(t, here, s)
	res := a.prepare(t, ref)
	base, top := res.Layers[0], res.Layers[1]
	a.read(t, base, 7)
	a.read(t, top, 3)
	a.read(t, base, 2, 7)
	p := a.recorded(t, ref, 1)
	order := ""
	for _, touch := range p.Wanted() {
		order += fmt.Sprint(touch.Layer)
	}
	if order != "010" || p.Image != res.Digest || p.Layers[1].Digest != top.Digest || p.Layers[1].Size != top.Size {
		t.Errorf("touches of layers %s: %+v", order, p)
	}
	if err := a.PushProfile(t.Context(), ref); err != nil {
		t.Fatal(err)
	}

	b := profiling(t, here, s)
	res = b.prepare(t, ref)
	b.fetched(t, 1)
	for i, want := range []int{2, 1} { // chunks: a file each
		l, _ := b.layers.Get(res.Layers[i].Digest)
		if got := l.Device().Stats(); got.Present != want || got.Touched != 0 {
			t.Errorf("layer %d: %+v", i, got)
		}
	}
	s.RemoveBlob(base.Digest)
	s.RemoveBlob(top.Digest)
	b.read(t, base, 7)
	b.read(t, top, 3)
	b.read(t, base, 2)
	// What is recorded here is added.
	if p := b.recorded(t, ref, 2); len(p.Wanted()) != 3 || p.Touches[0].Runs != 2 {
		t.Errorf("merged: %+v", p)
	}
}

// The profile stays when its image goes, and helps when that comes again.
func TestProfileOutlivesItsImage(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref := push(t, s, "app", program(t, 1))
	n := profiling(t, "", s)
	n.read(t, n.prepare(t, ref).Layers[0], 7)
	n.recorded(t, ref, 1)
	if err := n.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	res := n.prepare(t, ref)
	n.fetched(t, 1)
	l, _ := n.layers.Get(res.Layers[0].Digest)
	if got := l.Device().Stats(); got.Present != 1 {
		t.Errorf("%+v", got)
	}
}

// What is read of a layer that was read before cannot be seen any more.
func TestProfileOfASharedLayer(t *testing.T) {
	s := start(t, testregistry.Options{})
	base := program(t, 1)
	first, second := push(t, s, "first", base), push(t, s, "second", base, program(t, 2))
	n := profiling(t, "", s)
	n.read(t, n.prepare(t, first).Layers[0], 1)
	n.recorded(t, first, 1)
	res := n.prepare(t, second)
	n.read(t, res.Layers[0], 5)
	n.read(t, res.Layers[1], 5)
	p := n.recorded(t, second, 1)
	if p.Layers[0].Runs != 0 || p.Layers[1].Runs != 1 || len(p.Touches) != 1 || p.Touches[0].Layer != 1 {
		t.Errorf("%+v", p)
	}
	// There is nothing to see of an image all of which has been read.
	third := pushAltered(t, s, "third", func(m *v1.Manifest, _ *v1.Image) { m.Annotations = map[string]string{"a": "b"} }, base)
	if n.prepare(t, third); n.Recordings() != 0 {
		t.Error("what cannot be seen is being recorded")
	}
}

// Whatever a profile from elsewhere says, the pull is a normal one.
func TestHostileProfiles(t *testing.T) {
	s := start(t, testregistry.Options{})
	plain := tree(1)
	l := convert(t, plain, testimage.EStargz)
	ref := push(t, s, "app", l)
	image := profiling(t, "", s).prepare(t, ref).Digest
	layers := []profile.Layer{{Digest: l.Descriptor.Digest, Size: l.Descriptor.Size, Runs: 1}}
	other := []profile.Layer{{Digest: digest.FromString("other"), Size: 100, Runs: 1}}
	larger := []profile.Layer{{Digest: l.Descriptor.Digest, Size: l.Descriptor.Size + 1, Runs: 1}}
	for _, c := range []struct {
		name string
		doc  []byte
		want string // in the log
	}{
		{"nothing", nil, "unexpected end of JSON input"},
		{"not JSON", []byte("\x00profile"), "invalid character"},
		{"too large", make([]byte, profile.MaxSize+1), "has 4194305 bytes, more than 4194304"},
		{"of another image", encode(t, profile.New(digest.FromString("x"), layers, nil)), "it is one of sha256:"},
		{"another layer", encode(t, profile.New(image, other, nil)), "the image has no layer " + other[0].Digest.String()},
		{"another size", encode(t, profile.New(image, larger, nil)), "the image has no layer " + l.Descriptor.Digest.String()},
		{"behind the end", []byte(strings.Replace(string(encode(t, profile.New(image, layers, nil))), `"touches":[]`, `"touches":[[0,0,9223372036854775807,1]]`, 1)), "9223372036854775807 bytes at 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, image.Encoded()+".profile"), c.doc, 0o600); err != nil {
				t.Fatal(err)
			}
			n := profiling(t, dir, s)
			res := n.prepare(t, ref)
			if actions(res) != "lazy" {
				t.Errorf("result %+v", res)
			}
			n.compare(t, res.Layers[0], plain)
			eventually(t, func() bool { return strings.Contains(n.log.String(), "starting without a profile") })
			if got := n.log.String(); !strings.Contains(got, c.want) {
				t.Errorf("log: %s", got)
			}
			n.recorded(t, ref, 1) // and the next one is its own
		})
	}
}

// Nobody waits for a place that does not answer.
func TestProfileSourceFails(t *testing.T) {
	s := start(t, testregistry.Options{})
	plain := tree(1)
	ref := push(t, s, "app", convert(t, plain, testimage.EStargz))
	broken := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(broken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n := profiling(t, broken, s)
	n.compare(t, n.prepare(t, ref).Layers[0], plain)
	n.recorded(t, ref, 1)
	if err := n.PushProfile(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "pushing the profile of "+ref+": ") {
		t.Errorf("error %v", err)
	}
}

func TestRecordProfile(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref := push(t, s, "app", program(t, 1))
	n := profiling(t, "", s)
	res := n.prepare(t, ref)
	n.read(t, res.Layers[0], 1, 2)
	n.recorded(t, ref, 1)
	if _, err := n.RecordProfile(t.Context(), ref, time.Millisecond); err == nil || !strings.Contains(err.Error(), "nothing was read within 1ms") {
		t.Errorf("error %v", err)
	}
	n.recorded(t, ref, 1) // is still there
	type answer struct {
		*profile.Profile
		error
	}
	done := make(chan answer, 1)
	go func() {
		p, err := n.RecordProfile(t.Context(), ref, time.Second)
		done <- answer{p, err}
	}()
	var got answer
	for waiting := true; waiting; { // what was read before is seen again
		n.read(t, res.Layers[0], 2)
		select {
		case got = <-done:
			waiting = false
		case <-time.After(10 * time.Millisecond):
		}
	}
	if got.error != nil || len(got.Touches) != 1 || got.Runs != 1 {
		t.Errorf("got %+v, error %v", got.Profile, got.error)
	}
	if p := n.recorded(t, ref, 1); len(p.Touches) != 1 {
		t.Errorf("kept: %+v", p)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.RecordProfile(ctx, ref, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// An image that goes before it was read leaves no recording behind.
func TestRecordingEndsWithItsImage(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref := push(t, s, "app", program(t, 1))
	n := profiling(t, "", s)
	for range 3 {
		n.prepare(t, ref)
		if got := n.Recordings(); got != 1 {
			t.Errorf("%d recordings", got)
		}
		if err := n.Remove(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		if got := n.Recordings(); got != 0 {
			t.Errorf("%d recordings of images that have gone", got)
		}
	}
}

func TestProfileByName(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref := push(t, s, "app", program(t, 1))
	n := profiling(t, "", s)
	n.prepare(t, ref)
	if _, err := n.Profile(ref); !errors.Is(err, prepare.ErrNoProfile) {
		t.Errorf("not recorded yet: %v", err)
	}
	if err := n.DropProfile(ref); !errors.Is(err, prepare.ErrNoProfile) {
		t.Errorf("not recorded yet: %v", err)
	}
	if _, err := n.Profile(s.Host() + "/none"); !errors.Is(err, prepare.ErrUnknown) {
		t.Errorf("not prepared: %v", err)
	}
	if _, err := n.RecordProfile(t.Context(), s.Host()+"/none", time.Second); !errors.Is(err, prepare.ErrUnknown) {
		t.Errorf("not prepared: %v", err)
	}
	if err := n.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	res := n.prepare(t, ref) // the first drop has ended the recording
	n.read(t, res.Layers[0], 1)
	n.recorded(t, ref, 1)
	if err := n.PushProfile(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "the configuration has no index.publish") {
		t.Errorf("error %v", err)
	}
	if err := n.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if p, err := n.Profile(res.Digest.String()); err != nil || p.Image != res.Digest {
		t.Errorf("after the image has gone: %+v, error %v", p, err)
	}
	if err := n.DropProfile(res.Digest.String()); err != nil {
		t.Error(err)
	}
	if _, err := n.Profile(res.Digest.String()); !errors.Is(err, prepare.ErrNoProfile) {
		t.Errorf("dropped: %v", err)
	}
}

func TestProfilesOff(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref := push(t, s, "app", program(t, 1))
	n := newNode(t, trusting(), s)
	n.read(t, n.prepare(t, ref).Layers[0], 1)
	_, showErr := n.Profile(ref)
	_, recordErr := n.RecordProfile(t.Context(), ref, time.Second)
	for _, err := range []error{showErr, recordErr, n.DropProfile(ref), n.PushProfile(t.Context(), ref)} {
		if !errors.Is(err, prepare.ErrProfilesOff) {
			t.Errorf("error %v", err)
		}
	}
	if n.Recordings() != 0 {
		t.Error("a recording is under way")
	}
}
