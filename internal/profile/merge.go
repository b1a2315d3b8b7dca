// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"cmp"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
)

// Touches that are near, in the blob and in time, become one: fewer requests, and
// a smaller document.
const (
	maxGap    = 16 << 10 // bytes of the blob between them
	maxBefore = 64       // touches between them: several readers take turns
	// Larger ones would displace what was read at the same time.
	maxTouch = 4 << 20
)

// New makes a profile of one recording: touches in the order in which they came.
// The layers' Runs are 1 if the recording could see what is read of them, and
// else 0. What lies outside of its layer is dropped, and so is the rest of a
// recording that is too large.
func New(image digest.Digest, layers []Layer, touches []Touch) *Profile {
	p := &Profile{Version: version, Image: image, Created: now(), Runs: 1, Layers: layers}
	all := make([]placed, 0, len(touches))
	for i, t := range touches {
		if t.Layer < 0 || t.Layer >= len(layers) || layers[t.Layer].Runs == 0 || t.Offset < 0 || t.Offset >= layers[t.Layer].Size {
			continue
		}
		t.Length, t.Runs = min(t.Length, layers[t.Layer].Size-t.Offset), 1 // it may be an upper bound
		if t.Length > 0 {
			all = append(all, placed{t, float64(i)})
		}
	}
	p.Touches = tidy(all)
	return p
}

func now() time.Time { return time.Now().UTC().Truncate(time.Second) }

// Merge adds a recording to a profile of the same image, or replaces one that
// cannot be of that image. Bytes that both have are wanted when they were wanted
// on average, counted from the first touch to the last.
func Merge(old, recorded *Profile) *Profile {
	p := &Profile{
		Version: version, Image: recorded.Image, Created: now(),
		Runs: min(old.Runs+1, MaxRuns), Layers: slices.Clone(recorded.Layers),
	}
	number := map[digest.Digest]int{}
	for i, l := range p.Layers {
		number[l.Digest] = i
	}
	before := make([]int, len(old.Layers)) // its layers' numbers now
	for i, l := range old.Layers {
		n, ok := number[l.Digest]
		if !ok {
			n = len(p.Layers)
			p.Layers = append(p.Layers, Layer{Digest: l.Digest, Size: l.Size})
		}
		if p.Layers[n].Size != l.Size || n >= MaxLayers {
			return recorded
		}
		before[i] = n
	}
	olds, news := perLayer(old, before, len(p.Layers)), perLayer(recorded, nil, len(p.Layers))
	runs := make([]int, len(p.Layers))
	for i, n := range before {
		runs[n] = old.Layers[i].Runs
	}
	var all []placed
	for i := range p.Layers {
		l := &p.Layers[i]
		c := counting{seen: l.Runs > 0, full: runs[i] == MaxRuns}
		l.Runs = min(runs[i]+l.Runs, MaxRuns)
		all = append(all, c.merge(olds[i], news[i])...)
	}
	p.Touches = tidy(all)
	return p
}

// placed is a touch and when it is wanted, compared with others.
type placed struct {
	Touch
	when float64
}

func (a placed) compare(b placed) int {
	return cmp.Or(byPlace(a.Touch, b.Touch), cmp.Compare(a.when, b.when))
}

// perLayer returns the touches of each layer in the order of its bytes. number
// gives layers other numbers, if it is not nil.
func perLayer(p *Profile, number []int, layers int) [][]placed {
	all := make([][]placed, layers)
	for i, t := range p.Touches {
		if number != nil {
			t.Layer = number[t.Layer]
		}
		all[t.Layer] = append(all[t.Layer], placed{t, float64(i) / float64(len(p.Touches))})
	}
	for _, l := range all {
		slices.SortFunc(l, placed.compare)
	}
	return all
}

// counting is how the touches of a layer are counted when a recording is added.
type counting struct {
	seen bool // the recording could see them
	full bool // there have been MaxRuns: the oldest count less
}

// merge returns what either has, in pieces that have been seen equally often.
func (c counting) merge(olds, news []placed) []placed {
	var cuts []int64
	for _, list := range [][]placed{olds, news} {
		for _, t := range list {
			cuts = append(cuts, t.Offset, t.End())
		}
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	var all []placed
	for i := 1; i < len(cuts); i++ {
		start, end := cuts[i-1], cuts[i]
		o, inOld := covering(&olds, start)
		n, inNew := covering(&news, start)
		piece := n
		switch {
		case inOld && inNew:
			piece.when = (o.when + n.when) / 2
		case inOld:
			piece = o
		case !inNew:
			continue
		}
		piece.Range, piece.Runs = blob.Range{Offset: start, Length: end - start}, 0
		if inOld {
			piece.Runs = c.old(o.Runs)
		}
		if inNew {
			piece.Runs++
		}
		if piece.Runs > 0 {
			all = append(all, piece)
		}
	}
	return all
}

// old is how often something counts that earlier recordings have so often.
func (c counting) old(runs int) int {
	if c.seen && c.full {
		return runs * (MaxRuns - 1) / MaxRuns
	}
	return runs
}

// covering returns the touch that has the byte at an offset. It drops those that
// lie before: offsets ascend.
func covering(list *[]placed, at int64) (placed, bool) {
	for len(*list) > 0 && (*list)[0].End() <= at {
		*list = (*list)[1:]
	}
	if len(*list) == 0 || (*list)[0].Offset > at {
		return placed{}, false
	}
	return (*list)[0], true
}

// tidy puts touches in order, with each byte once, and makes one of those that
// are near.
func tidy(all []placed) []Touch {
	byTime := func(a, b placed) int { return cmp.Or(cmp.Compare(a.when, b.when), a.compare(b)) }
	slices.SortFunc(all, byTime)
	for i := range all {
		all[i].when = float64(i)
	}
	slices.SortFunc(all, placed.compare)
	kept := all[:0]
	var last float64 // when the latest part of the last one was wanted
	for _, t := range all {
		if n := len(kept); n > 0 && kept[n-1].Layer == t.Layer {
			prev := &kept[n-1]
			if over := prev.End() - t.Offset; over > 0 {
				t.Offset, t.Length = t.Offset+over, t.Length-over
			}
			if t.Length <= 0 {
				continue
			}
			if prev.Runs == t.Runs && t.Offset-prev.End() <= maxGap && t.End()-prev.Offset <= maxTouch && max(last-t.when, t.when-last) <= maxBefore {
				prev.Length, prev.when, last = t.End()-prev.Offset, min(prev.when, t.when), t.when
				continue
			}
		}
		kept, last = append(kept, t), t.when
	}
	slices.SortFunc(kept, byTime)
	touches := make([]Touch, 0, min(len(kept), MaxTouches))
	for _, t := range kept[:min(len(kept), MaxTouches)] {
		touches = append(touches, t.Touch)
	}
	return touches
}
