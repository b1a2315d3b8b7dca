// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

const far = 1 << 20 // so far apart that nothing becomes one

func TestNew(t *testing.T) {
	for _, c := range []struct {
		name       string
		give, want []Touch
	}{
		{"nothing", nil, []Touch{}},
		{"order stays", []Touch{touch(0, 9*far, 10, 0), touch(1, 0, 10, 0), touch(0, 0, 10, 0)},
			[]Touch{touch(0, 9*far, 10, 1), touch(1, 0, 10, 1), touch(0, 0, 10, 1)}},
		{"neighbours become one", []Touch{touch(0, 0, 10, 0), touch(0, 10, 10, 0)}, []Touch{touch(0, 0, 20, 1)}},
		{"backwards too", []Touch{touch(0, 10, 10, 0), touch(0, 0, 10, 0)}, []Touch{touch(0, 0, 20, 1)}},
		{"at most so far apart", []Touch{touch(0, 0, 10, 0), touch(0, 10+maxGap, 10, 0)}, []Touch{touch(0, 0, 20+maxGap, 1)}},
		{"and no farther", []Touch{touch(0, 0, 10, 0), touch(0, 11+maxGap, 10, 0)}, []Touch{touch(0, 0, 10, 1), touch(0, 11+maxGap, 10, 1)}},
		{"not across layers", []Touch{touch(0, 0, 10, 0), touch(1, 10, 10, 0)}, []Touch{touch(0, 0, 10, 1), touch(1, 10, 10, 1)}},
		{"two readers take turns", []Touch{touch(0, 0, 10, 0), touch(1, 0, 10, 0), touch(0, 10, 10, 0), touch(1, 10, 10, 0)},
			[]Touch{touch(0, 0, 20, 1), touch(1, 0, 20, 1)}},
		{"large ones stay apart", []Touch{touch(0, 0, maxTouch-1, 0), touch(0, maxTouch-1, 1, 0), touch(0, maxTouch, 1, 0)},
			[]Touch{touch(0, 0, maxTouch, 1), touch(0, maxTouch, 1, 1)}},
		{"bytes count once", []Touch{touch(0, 5, 10, 0), touch(0, 0, 10, 0), touch(0, 5, 5, 0), touch(0, 2, 3, 0)}, []Touch{touch(0, 0, 15, 1)}},
		{"an upper bound is cut", []Touch{touch(0, 1<<30-5, 10, 0)}, []Touch{touch(0, 1<<30-5, 5, 1)}},
		{"nonsense is dropped", []Touch{touch(-1, 0, 1, 0), touch(3, 0, 1, 0), touch(0, -1, 5, 0), touch(0, 1<<30, 1, 0), touch(0, 0, 0, 0), touch(0, 0, -5, 0)}, []Touch{}},
		{"so is what cannot be seen", []Touch{touch(2, 0, 10, 0)}, []Touch{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			layers := append(seen(base, top), Layer{Digest: image, Size: 1 << 30})
			p := New(image, layers, c.give)
			if err := p.check(); err != nil {
				t.Error(err)
			}
			if d := cmp.Diff(c.want, p.Touches); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestNewIsBounded(t *testing.T) {
	var many []Touch
	for i := range MaxTouches + 1 {
		many = append(many, touch(0, int64(i)*(maxGap+2), 1, 0))
	}
	layers := seen(base)
	layers[0].Size = maxLayerSize
	p := New(image, layers, many)
	if err := p.check(); err != nil || len(p.Touches) != MaxTouches || p.Touches[MaxTouches-1] != touch(0, (MaxTouches-1)*(maxGap+2), 1, 1) {
		t.Errorf("%d touches, error %v", len(p.Touches), err)
	}
}

func TestMergeCounts(t *testing.T) {
	a, b, c := touch(0, 0, far, 0), touch(0, 2*far, far, 0), touch(0, 4*far, far, 0)
	p := New(image, seen(base), []Touch{a, b})
	p = Merge(p, New(image, seen(base), []Touch{a, c}))
	p = Merge(p, New(image, seen(base), []Touch{a, c}))
	want := []Touch{touch(0, 0, far, 3), touch(0, 2*far, far, 1), touch(0, 4*far, far, 2)}
	if d := cmp.Diff(want, p.Touches); d != "" || p.Runs != 3 || p.Layers[0].Runs != 3 {
		t.Errorf("runs %d %+v: %s", p.Runs, p.Layers, d)
	}
	if d := cmp.Diff([]Touch{want[0], want[2]}, p.Wanted()); d != "" || p.Bytes(0) != 2*far {
		t.Errorf("%d bytes wanted: %s", p.Bytes(0), d)
	}
}

// Half of the recordings are enough.
func TestWanted(t *testing.T) {
	for _, c := range []struct {
		runs, of int
		want     bool
	}{{1, 1, true}, {1, 2, true}, {1, 3, false}, {2, 4, true}, {3, 8, false}, {4, 8, true}} {
		p := &Profile{Layers: []Layer{{Runs: c.of}}, Touches: []Touch{touch(0, 0, 1, c.runs)}}
		if got := len(p.Wanted()) > 0; got != c.want {
			t.Errorf("%d of %d: wanted %v", c.runs, c.of, got)
		}
	}
}

func TestMergeSplitsWhatOverlaps(t *testing.T) {
	p := Merge(New(image, seen(base), []Touch{touch(0, 0, 2*far, 0)}), New(image, seen(base), []Touch{touch(0, far, 2*far, 0)}))
	want := []Touch{touch(0, 0, far, 1), touch(0, far, far, 2), touch(0, 2*far, far, 1)}
	if d := cmp.Diff(want, p.Touches); d != "" {
		t.Error(d)
	}
}

// What is read of a layer that was on the node already is not seen there: that
// says nothing against those who saw it.
func TestMergeOfWhatWasNotSeen(t *testing.T) {
	old := New(image, seen(base, top), []Touch{touch(0, 0, far, 0), touch(1, 0, far, 0)})
	layers := seen(base, top)
	layers[0].Runs = 0
	p := Merge(old, New(image, layers, []Touch{touch(1, 0, far, 0)}))
	want := []Touch{touch(0, 0, far, 1), touch(1, 0, far, 2)}
	if d := cmp.Diff(want, p.Touches); d != "" || p.Layers[0].Runs != 1 || p.Layers[1].Runs != 2 {
		t.Errorf("layers %+v: %s", p.Layers, d)
	}
	if n := len(p.Wanted()); n != 2 {
		t.Errorf("%d touches are wanted", n)
	}
}

// Layers are told apart by their digests, wherever they are in the list.
func TestMergeOfLayersInAnotherOrder(t *testing.T) {
	p := Merge(New(image, seen(base, top), []Touch{touch(1, 0, far, 0)}), New(image, seen(top), []Touch{touch(0, 0, far, 0)}))
	want := []Touch{touch(0, 0, far, 2)}
	if d := cmp.Diff(want, p.Touches); d != "" || len(p.Layers) != 2 || p.Layers[0].Digest != top {
		t.Errorf("layers %+v: %s", p.Layers, d)
	}
}

func TestMergeReplacesWhatDoesNotFit(t *testing.T) {
	other := seen(base)
	other[0].Size /= 2
	recorded := New(image, seen(base), []Touch{touch(0, 0, far, 0)})
	if p := Merge(New(image, other, []Touch{touch(0, far, far, 0)}), recorded); p != recorded {
		t.Errorf("merged to %+v", p)
	}
	var many []Layer
	for i := range MaxLayers {
		many = append(many, Layer{Digest: digest.FromBytes([]byte{byte(i), byte(i >> 8)}), Runs: 1})
	}
	if p := Merge(New(image, many, nil), recorded); p != recorded {
		t.Errorf("merged to %d layers", len(p.Layers))
	}
}

// After many recordings the latest count: what is not read any more goes.
func TestMergeForgets(t *testing.T) {
	always, before, lately := touch(0, 0, far, 0), touch(0, 2*far, far, 0), touch(0, 4*far, far, 0)
	p := New(image, seen(base), []Touch{always, before})
	for range 20 {
		p = Merge(p, New(image, seen(base), []Touch{always, before}))
	}
	if p.Runs != MaxRuns || p.Touches[0].Runs != MaxRuns || len(p.Wanted()) != 2 {
		t.Errorf("runs %d, touches %+v", p.Runs, p.Touches)
	}
	for range MaxRuns {
		p = Merge(p, New(image, seen(base), []Touch{always, lately}))
	}
	want := []Touch{touch(0, 0, far, MaxRuns), touch(0, 4*far, far, 1)}
	if len(p.Wanted()) == 0 || p.Wanted()[0] != want[0] {
		t.Errorf("wanted %+v", p.Wanted())
	}
	for _, w := range p.Wanted() {
		if w.Offset == before.Offset {
			t.Errorf("what %d recordings do not have is still wanted: %+v", MaxRuns, w)
		}
	}
}

// TestMergeAgainstBlocks compares with counting each block by itself. Blocks are
// larger than the gaps that are bridged.
func TestMergeAgainstBlocks(t *testing.T) {
	const blocks, block = 300, maxGap + 1
	r := rand.New(rand.NewPCG(1, 2))
	layers := []Layer{{Digest: base, Size: blocks * block, Runs: 1}}
	for range 300 {
		p := (*Profile)(nil)
		var want, got [blocks]int
		for range 1 + r.IntN(5) {
			var touches []Touch
			for range r.IntN(6) {
				touches = append(touches, touch(0, int64(r.IntN(blocks))*block, int64(1+r.IntN(60))*block, 0))
			}
			recorded := New(image, slices.Clone(layers), touches)
			for _, t := range recorded.Touches {
				for i := t.Offset; i < t.End(); i += block {
					want[i/block]++
				}
			}
			if p == nil {
				p = recorded
			} else {
				p = Merge(p, recorded)
			}
		}
		if err := p.check(); err != nil {
			t.Fatal(err)
		}
		for _, t := range p.Touches {
			for i := t.Offset; i < t.End(); i += block {
				got[i/block] = t.Runs
			}
		}
		if got != want {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
}
