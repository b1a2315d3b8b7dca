// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/imagestore"
)

// maxNamed bounds the referrers that a message names.
const maxNamed = 3

// stock is what there is to keep or to collect, and who refers to it. It is true
// while the turn is held in which it was taken.
type stock struct {
	images  []Image // oldest first
	records []imagestore.Layer
	layers  []stored
	claimed map[digest.Digest]bool
	used    map[string][]imagestore.Referrer
	unknown error // why used is not known: nothing may be removed

	imagesWith map[string]int             // how many have a record, by its id, or a layer, by its digest
	recordsOf  map[digest.Digest][]string // ids of the records that lead to a layer
}

// stored is a layer on disk.
type stored struct {
	digest  digest.Digest
	created time.Time
	bytes   int64 // of its data that is local
	bad     bool  // in quarantine
}

// takeStock finds out what there is. The caller has the turn.
func (p *Preparer) takeStock() (*stock, error) {
	s := &stock{claimed: map[digest.Digest]bool{}}
	var err error
	if s.images, err = p.images.all(); err != nil {
		return nil, err
	}
	if s.records, err = p.store.Layers(); err != nil {
		return nil, err
	}
	for _, l := range p.layers.All() {
		s.layers = append(s.layers, stored{l.Digest, l.Created, l.LocalBytes(), l.Verdict().Err() != nil})
		s.claimed[l.Digest] = p.claims.has(l.Digest)
	}
	s.count()
	s.used, s.unknown = imagestore.References(p.policy.RuntimeRoots, s.records)
	return s, nil
}

// Used returns who refers to which records, by their ids. An error means that it
// is not known, and nothing may be removed.
func (p *Preparer) Used() (map[string][]imagestore.Referrer, error) {
	records, err := p.store.Layers()
	if err != nil {
		return nil, err
	}
	return imagestore.References(p.policy.RuntimeRoots, records)
}

// count brings up to date what depends on images and records.
func (s *stock) count() {
	s.imagesWith, s.recordsOf = map[string]int{}, map[digest.Digest][]string{}
	for _, img := range s.images {
		has := map[string]bool{}
		for _, l := range img.Layers {
			if l.Action != Left {
				has[l.ChainID], has[l.Digest.String()] = true, true
			}
		}
		for key := range has {
			s.imagesWith[key]++
		}
	}
	for _, r := range s.records {
		s.recordsOf[r.BlobDigest] = append(s.recordsOf[r.BlobDigest], r.ID)
	}
}

// goingWith is what goes with an image: its records, and its layers on disk, as
// far as no other image has them, and no other record leads to them.
func (s *stock) goingWith(img Image) going {
	g := going{image: &img}
	shared := func(key string) bool { return s.imagesWith[key] > 1 }
	g.ids = slices.DeleteFunc(img.chain(), shared)
	for _, l := range s.layers {
		other := func(id string) bool { return !slices.Contains(g.ids, id) }
		if img.has(l.digest) && !shared(l.digest.String()) && !slices.ContainsFunc(s.recordsOf[l.digest], other) {
			g.layers = append(g.layers, l)
		}
	}
	return g
}

// drop takes out of the stock what is gone.
func (s *stock) drop(g going) {
	if g.image != nil {
		s.images = slices.DeleteFunc(s.images, func(i Image) bool { return i.Digest == g.image.Digest })
	}
	s.records = slices.DeleteFunc(s.records, func(r imagestore.Layer) bool { return slices.Contains(g.ids, r.ID) })
	s.layers = slices.DeleteFunc(s.layers, func(l stored) bool { return slices.Contains(g.layers, l) })
	s.count()
}

// refusal names who refers to what would go with an image, or to the image
// itself, by its topmost record; nil if nobody does.
func (s *stock) refusal(img Image) error {
	ids := s.goingWith(img).ids
	if chain := img.chain(); len(chain) > 0 {
		ids = append(ids, chain[len(chain)-1])
	}
	return Refusal(s.used, ids)
}

// Refusal is the error that names who refers to one of the records, once each;
// nil if nobody does.
func Refusal(used map[string][]imagestore.Referrer, ids []string) error {
	var names []string
	for _, id := range ids {
		for _, by := range used[id] {
			if name := by.String(); !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	if len(names) == 0 {
		return nil
	}
	text := strings.Join(names[:min(len(names), maxNamed)], ", ")
	if more := len(names) - maxNamed; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return fmt.Errorf("%w: %s", ErrInUse, text)
}

// held is why an image must stay, whatever anybody wants; nil if it need not.
func (s *stock) held(img Image) error {
	if s.unknown != nil {
		return s.unknown
	}
	if err := s.refusal(img); err != nil {
		return err
	}
	for _, l := range img.Layers {
		if s.claimed[l.Digest] {
			return errBeingPrepared
		}
	}
	return nil
}

// bad reports whether a layer of an image is in quarantine.
func (s *stock) bad(img Image) bool {
	return slices.ContainsFunc(s.layers, func(l stored) bool { return l.bad && img.has(l.digest) })
}

// heldRecord is why a record must stay; nil if it need not.
func (s *stock) heldRecord(r imagestore.Layer) error {
	switch {
	case s.unknown != nil:
		return s.unknown
	case s.claimed[r.BlobDigest]:
		return errBeingPrepared
	}
	return Refusal(s.used, []string{r.ID})
}

// inUse are the images that a runtime refers to, private ones first, then the
// oldest first.
func (s *stock) inUse() []Image {
	var private, others []Image
	for _, img := range s.images {
		switch {
		case s.refusal(img) == nil:
		case img.Private:
			private = append(private, img)
		default:
			others = append(others, img)
		}
	}
	return append(private, others...)
}

// note keeps count of since when images have been unused, and returns those for
// which that has changed.
func (s *stock) note(now time.Time) []Image {
	if s.unknown != nil {
		return nil
	}
	var changed []Image
	for i := range s.images {
		img := &s.images[i]
		used := s.refusal(*img) != nil
		switch {
		case used && !img.UnusedSince.IsZero():
			img.UnusedSince = time.Time{}
		case !used && img.UnusedSince.IsZero():
			img.UnusedSince = now
		default:
			continue
		}
		changed = append(changed, *img)
	}
	return changed
}

// survey takes stock, and writes down which images have come in use or out of it.
func (p *Preparer) survey(now time.Time, write bool) (*stock, error) {
	s, err := p.takeStock()
	if err != nil {
		return nil, err
	}
	for _, img := range s.note(now) {
		if !write {
			continue
		}
		if err := p.images.write(img); err != nil { // on a full disk collecting is wanted most
			p.log.Warn("noting that an image is in use, or is not", "image", img.label(), "err", err)
		}
	}
	return s, nil
}
