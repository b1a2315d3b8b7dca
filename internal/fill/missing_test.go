// SPDX-License-Identifier: Apache-2.0

package fill

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/layer/layertest"
	"github.com/holdfast/holdfast/internal/testimage"
)

// newMissingRig is a node that fetches only what it does not have.
func newMissingRig(t *testing.T, rate int64) *rig {
	t.Helper()
	r := newRig(t)
	r.Filler = New(Config{Layers: r.Layers, Scheduler: r.Scheduler, Missing: true, Rate: rate, Logger: r.Logger})
	return r
}

// fillMissingOnce fills a layer the way Run does.
func (r *rig) fillMissingOnce(l *layer.Layer) error {
	r.t.Helper()
	r.Want([]digest.Digest{l.Digest})
	got, _, _ := r.take(time.Now().Add(time.Hour))
	if got != l {
		r.t.Fatal("there is nothing to do")
	}
	err := r.fillMissing(r.t.Context(), l)
	r.done(r.t.Context(), l, err)
	return err
}

// TestMissing fetches what readers have not, and what no other layer has, and
// concludes nothing.
func TestMissing(t *testing.T) {
	r := newMissingRig(t, 0)
	p := plain(0o644, 2)
	one, two := convert(t, p, testimage.EStargz), convert(t, plain(0o600, 2), testimage.EStargz)
	calls := 0
	count := func(content testimage.Layer) blob.Source {
		return blobtest.Inject(blobtest.NewMemory(content.Bytes), func(blobtest.Call) blobtest.Fault { calls++; return blobtest.Fault{} })
	}
	first := r.add(one, one, count(one))
	first.AddOrigin("example.com/app", true)
	if err := r.fillMissingOnce(first); err != nil {
		t.Fatal(err)
	}
	if v := first.Verdict(); v != (layer.Verdict{}) || !first.Complete() || r.State(first.Digest) != "filled, not verified" {
		t.Errorf("verdict %+v, complete %v, state %q", v, first.Complete(), r.State(first.Digest))
	}
	if r.todo(first.Digest) != nil {
		t.Error("it is to be filled again")
	}
	if diff := layertest.Compare(filepath.Join(first.MountDirectory(), "diff"), p); diff != "" || calls == 0 {
		t.Error(diff, calls)
	}
	// Its files are the same; the modes, in its table of contents, are not.
	calls = 0
	second := r.add(two, two, count(two))
	if err := r.fillMissingOnce(second); err != nil || !second.Complete() {
		t.Errorf("error %v, complete %v", err, second.Complete())
	}
	if s := second.Device().Stats(); calls != 1 || s.CopiedChunks != int64(s.Chunks)-1 {
		t.Errorf("%d requests, %+v", calls, s)
	}
	// Once it is not wanted any more, it may be wanted anew.
	r.Want(nil)
	r.Want([]digest.Digest{first.Digest})
	if r.todo(first.Digest) != first {
		t.Error("it is not to be filled any more")
	}
}

func TestMissingFails(t *testing.T) {
	r := newMissingRig(t, 0)
	content := convert(t, plain(0o644, 2), testimage.EStargz)
	l := r.add(content, content, blobtest.Inject(blobtest.NewMemory(content.Bytes), func(blobtest.Call) blobtest.Fault {
		return blobtest.Fault{OpenErr: blob.ErrUnauthorized}
	}))
	if err := r.fillMissingOnce(l); !errors.Is(err, blob.ErrUnauthorized) {
		t.Errorf("error %v", err)
	}
	if r.todo(l.Digest) != l {
		t.Error("it is not to be filled any more")
	}
}

// TestMissingPays takes the bytes that it fetches out of what the rate allows.
func TestMissingPays(t *testing.T) {
	r := newMissingRig(t, 1) // a byte a second, after the burst
	content := convert(t, plain(0o644, 2), testimage.EStargz)
	l := r.add(content, content, blobtest.NewMemory(content.Bytes))
	before := r.limit.Tokens()
	if err := r.fillMissingOnce(l); err != nil {
		t.Fatal(err)
	}
	fetched := float64(l.Device().Stats().Fetched)
	if paid := before - r.limit.Tokens(); fetched < 100_000 || paid < fetched*0.9 || paid > fetched*1.1 {
		t.Errorf("%.0f bytes were paid for, %.0f fetched", paid, fetched)
	}
}
