// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast/holdfast/internal/imagestore"
)

// pullTime is how long an image that was just prepared is kept whatever the
// grace period: the runtime that wanted it refers to nothing before it has
// pulled the rest.
const pullTime = 10 * time.Minute

// What a Decision is about.
const (
	KindImage  = "image"
	KindRecord = "record" // one that no prepared image has
	KindLayer  = "layer"  // one that no prepared image has
)

// Decision is what a collection does with one thing, and why.
type Decision struct {
	Kind   string `json:"kind"`
	Name   string `json:"name"`   // an image's references, a record's id, a layer's digest
	Remove bool   `json:"remove"` // it was removed, or would be; else it is kept
	Reason string `json:"reason"`
	Bytes  int64  `json:"bytes,omitempty"` // disk space that this frees
}

// verdict is a decision, and what goes by it.
type verdict struct {
	Decision
	going going
}

// gone completes a decision about what no grace is due to.
func (v verdict) gone(reason string, g going) verdict {
	v.Reason, v.Remove, v.going, v.Bytes = reason, true, g, g.bytes()
	return v
}

// Collection is what a collection did, or would do.
type Collection struct {
	DryRun    bool       `json:"dryRun"`
	Decisions []Decision `json:"decisions"`
	Freed     int64      `json:"freed"` // bytes of disk space
}

func (c *Collection) add(all ...verdict) {
	for _, v := range all {
		c.Decisions = append(c.Decisions, v.Decision)
		c.Freed += v.Bytes
	}
}

// Collect removes what no runtime refers to, and has not for the grace period:
// images with what only they have, and records and layers that no image has.
// With dryRun it changes nothing. What must stay, or cannot be removed, is kept
// with the reason; while it is not known what is in use, that is everything.
func (p *Preparer) Collect(ctx context.Context, grace time.Duration, dryRun bool) (*Collection, error) {
	c := &Collection{DryRun: dryRun, Decisions: []Decision{}}
	j := judge{grace: grace, now: time.Now(), pinned: p.pinned, failed: map[string]error{}}
	for {
		all, removed, err := p.collectNext(ctx, j, dryRun)
		if err != nil {
			return nil, fmt.Errorf("collecting: %w", err)
		}
		if removed == nil {
			c.add(all...)
			return c, nil
		}
		c.add(*removed)
	}
}

// collectNext removes the first thing that is to go, in a turn of its own, since
// preparations wait for theirs. If there is none it returns all decisions.
func (p *Preparer) collectNext(ctx context.Context, j judge, dryRun bool) (all []verdict, removed *verdict, err error) {
	done, err := p.takeTurn(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	for ctx.Err() == nil {
		s, err := p.survey(j.now, !dryRun)
		if err != nil {
			return nil, nil, err
		}
		all := j.decide(s)
		i := slices.IndexFunc(all, func(d verdict) bool { return d.Remove })
		if dryRun || i < 0 {
			return all, nil, nil
		}
		d := &all[i]
		if err := p.remove(ctx, d.going); err != nil {
			p.log.Warn("collecting", "kind", d.Kind, "name", d.Name, "err", err)
			j.failed[d.Name] = err
			continue
		}
		p.log.Info("collected", "kind", d.Kind, "name", d.Name, "reason", d.Reason, "bytes", d.Bytes)
		return nil, d, nil
	}
	return nil, nil, context.Cause(ctx)
}

// judge decides what goes.
type judge struct {
	grace  time.Duration
	now    time.Time
	pinned func(name string) bool // nil: nothing is
	failed map[string]error       // why something was not removed that was to go, by its name
}

// decide judges all that there is, as if what is to go went at once. Records that
// no image has come first: they may be built on those of an image.
func (j judge) decide(s *stock) []verdict {
	var all []verdict
	for _, r := range slices.Backward(slices.Clone(s.records)) { // parents come first
		if s.imagesWith[r.ID] > 0 {
			continue
		}
		d := j.record(s, r)
		if d.Remove {
			s.drop(d.going)
		}
		all = append(all, d)
	}
	for _, img := range slices.Clone(s.images) {
		d := j.image(s, img)
		if d.Remove {
			s.drop(d.going)
		}
		all = append(all, d)
	}
	for _, l := range s.layers {
		if s.imagesWith[l.digest.String()] == 0 {
			all = append(all, j.layer(s, l))
		}
	}
	return all
}

func (j judge) image(s *stock, img Image) verdict {
	d := verdict{Decision: Decision{Kind: KindImage, Name: img.label()}}
	unused := max(0, j.now.Sub(img.UnusedSince)) // the clock may have gone back
	if err := s.held(img); err != nil {
		d.Reason = err.Error()
		return d
	}
	if j.pinned != nil && slices.ContainsFunc(img.References, j.pinned) && !s.bad(img) {
		d.Reason = "pinned"
		return d
	}
	if s.bad(img) {
		return d.gone("a layer is in quarantine, and nothing refers to it", s.goingWith(img))
	}
	if img.UnusedSince.Equal(img.Prepared) && unused < pullTime {
		d.Reason = fmt.Sprintf("prepared %s ago, a runtime may be about to refer to it", span(unused))
		return d
	}
	return j.expired(d, "unused for "+span(unused), unused, s.goingWith(img))
}

func (j judge) record(s *stock, r imagestore.Layer) verdict {
	d := verdict{Decision: Decision{Kind: KindRecord, Name: r.ID}}
	child := slices.IndexFunc(s.records, func(c imagestore.Layer) bool { return c.Parent == r.ID })
	err := s.heldRecord(r)
	switch {
	case err != nil:
		d.Reason = err.Error()
	case child >= 0:
		d.Reason = fmt.Sprintf("record %s is built on it", s.records[child].ID)
	default:
		d = j.stray(d, r.Created, going{ids: []string{r.ID}})
	}
	return d
}

func (j judge) layer(s *stock, l stored) verdict {
	d := verdict{Decision: Decision{Kind: KindLayer, Name: l.digest.String()}}
	records := s.recordsOf[l.digest]
	switch {
	case s.unknown != nil:
		d.Reason = s.unknown.Error()
	case len(records) > 0:
		d.Reason = fmt.Sprintf("record %s leads to it", records[0])
	case s.claimed[l.digest]:
		d.Reason = errBeingPrepared.Error()
	case l.bad:
		d = d.gone("it is in quarantine, and nothing refers to it", going{layers: []stored{l}})
	default:
		d = j.stray(d, l.created, going{layers: []stored{l}})
	}
	return d
}

// stray completes a decision about what no image has and nothing refers to.
func (j judge) stray(d verdict, created time.Time, g going) verdict {
	age := max(0, j.now.Sub(created))
	return j.expired(d, fmt.Sprintf("no prepared image has it, made %s ago", span(age)), age, g)
}

// expired completes a decision about what nothing refers to.
func (j judge) expired(d verdict, reason string, age time.Duration, g going) verdict {
	if err := j.failed[d.Name]; err != nil {
		d.Reason = fmt.Sprintf("removing it: %v", err)
		return d
	}
	d.Reason = fmt.Sprintf("%s, grace period %s", reason, span(j.grace))
	if d.Remove = age >= j.grace; d.Remove {
		d.going, d.Bytes = g, g.bytes()
	}
	return d
}

// span writes a time span without the units that are zero.
func span(d time.Duration) string {
	text := d.Round(time.Second).String()
	for _, zero := range []string{"m0s", "h0m"} {
		if n := len(text) - len(zero); n >= 0 && text[n:] == zero {
			text = text[:n+1]
		}
	}
	return text
}
