// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
)

// digestsName is what makes a layer's chunks findable for others.
const digestsName = "digests"

// maxAlike is how many chunks of a layer whose digests start like one are looked at.
const maxAlike = 8

// lending is how the layers of a set give each other what is local: a chunk is
// found by its digest.
//
// Who names the digest of a chunk in an index of his own would get the content of
// any layer this way. So a layer gives only to layers that nobody may read who could
// not have read it: those whose images all come from repositories that it came from
// as well. What came without credentials goes to all.
type lending struct {
	mu     sync.RWMutex // protects the field below, and Layer.origins; held while chunks are looked up
	layers []lender
}

// lender is a layer that has a list of its digests.
type lender struct {
	*Layer
	digests *index.Digests
}

// origins is where a layer's images come from.
type origins struct {
	public       bool // one of them was read without credentials
	repositories []string
}

// AddOrigin notes that an image of a repository has the layer, and whether it was
// read without credentials. That lasts until the layer is closed. Before the layer
// is read for an image, the image's origin is added.
func (l *Layer) AddOrigin(repository string, public bool) {
	l.lending.mu.Lock()
	defer l.lending.mu.Unlock()
	o := &l.origins
	o.public = o.public || public
	if !slices.Contains(o.repositories, repository) {
		o.repositories = append(o.repositories, repository)
	}
}

// mayGive reports whether content of one layer may go into another. The caller
// holds lending.mu.
func mayGive(from, to *Layer) bool {
	if from == to || from.origins.public {
		return true
	}
	for _, r := range to.origins.repositories {
		if !slices.Contains(from.origins.repositories, r) {
			return false
		}
	}
	return len(to.origins.repositories) > 0
}

// join lets other layers find the chunks of one, which has been opened.
func (g *lending) join(l *Layer) error {
	name := filepath.Join(l.dir, digestsName)
	digests, err := index.OpenDigests(name)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, index.ErrInvalid) { // of an earlier version, or damaged
		if err = writeDigests(l.dir, l.table); err == nil {
			digests, err = index.OpenDigests(name)
		}
	}
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.layers = append(g.layers, lender{Layer: l, digests: digests})
	return nil
}

func writeDigests(dir string, chunks index.Chunks) error {
	return atomicfile.Create(filepath.Join(dir, digestsName), 0o600, func(f *os.File) error { return index.WriteDigests(f, chunks) })
}

// leave ends what join began, if it has. Loans may go on: the layer's cache waits
// for them.
func (g *lending) leave(l *Layer) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.IndexFunc(g.layers, func(o lender) bool { return o.Layer == l })
	if i < 0 {
		return nil
	}
	digests := g.layers[i].digests
	g.layers = slices.Delete(g.layers, i, i+1)
	return digests.Close()
}

// borrower is what a layer can have of all layers, itself included.
type borrower struct{ l *Layer }

var _ device.Local = borrower{}

// Has reports whether the content of a chunk is local.
func (b borrower) Has(c index.Chunk) bool {
	return b.find(c, func(from *Layer, i int) bool { return from.cache.Stored(i) })
}

// Lend lends the content of a chunk; nil if it is not local.
func (b borrower) Lend(c index.Chunk) (loan *cache.Loan) {
	b.find(c, func(from *Layer, i int) bool {
		loan = from.cache.Lend(i)
		return loan != nil
	})
	return loan
}

// find calls use with chunks that have the content of c, until it returns true, and
// reports whether it has.
func (b borrower) find(c index.Chunk, use func(from *Layer, i int) bool) bool {
	g := b.l.lending
	g.mu.RLock()
	defer g.mu.RUnlock()
	for _, from := range g.layers {
		alike := 0
		for i := range from.digests.Find(c.Digest) {
			if alike++; alike > maxAlike {
				break
			}
			if i >= from.table.Len() {
				continue
			}
			if o := from.table.At(i); o.Digest == c.Digest && o.Size == c.Size && mayGive(from.Layer, b.l) && use(from.Layer, i) {
				return true
			}
		}
	}
	return false
}
