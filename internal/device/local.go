// SPDX-License-Identifier: Apache-2.0

package device

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
)

// Local is what of other layers, or elsewhere in the same one, is on this node and
// may be copied. Its methods may be called concurrently; they are quick, and never
// wait for a device.
type Local interface {
	// Has reports whether content of that digest and size is there at present.
	Has(c index.Chunk) bool
	// Lend lends it; nil if it is not there, or not any more.
	Lend(c index.Chunk) *cache.Loan
}

// begin starts to get chunks, ascending, which are missing: those that are local
// elsewhere are copied, the others fetched, a request a run. The caller holds d.mu.
func (d *Device) begin(missing []int, idle Priority) []*fetch {
	copied, missing := d.split(missing)
	var all []*fetch
	if len(copied) > 0 {
		all = append(all, d.startCopy(copied, idle))
	}
	for _, run := range d.runs(missing) {
		all = append(all, d.start(run, idle))
	}
	return all
}

// split tells chunks that are local elsewhere from those that are to be fetched.
// The caller holds d.mu.
func (d *Device) split(chunks []int) (local, away []int) {
	if d.local == nil {
		return nil, chunks
	}
	for _, i := range chunks {
		if c := d.table.At(i); c.HasDigest() && d.local.Has(c) {
			local = append(local, i)
		} else {
			away = append(away, i)
		}
	}
	if len(local) > 0 {
		d.related.Store(true)
	}
	return local, away
}

// maxCopiedGap is how close in the blob chunks must be to share a request, if others
// are between them that are copied: about what a request costs in bytes. New versions
// of small files would otherwise come with most of the old ones.
const maxCopiedGap = 4 << 10

// gap is how far chunk k may be from chunk i, before it, to share a request.
func (d *Device) gap(i, k int) int64 {
	if d.related.Load() && k > i+1 {
		return maxCopiedGap
	}
	return maxGap
}

// maxStrangers is after how many neighbours of misses that are not local elsewhere,
// and none that is, a layer is taken to have nothing in common with others: most
// have not, and neighbours are many.
const maxStrangers = 512

// spared reports whether a neighbour of a miss need not be fetched along with it.
// The caller holds d.mu.
func (d *Device) spared(c index.Chunk) bool {
	if d.local == nil || !c.HasDigest() || !d.related.Load() && d.unshared >= maxStrangers {
		return false
	}
	if d.local.Has(c) {
		d.related.Store(true)
		return true
	}
	d.unshared++
	return false
}

// startCopy begins to copy chunks; what cannot be copied after all is fetched. The
// caller holds d.mu.
func (d *Device) startCopy(chunks []int, idle Priority) *fetch {
	f := d.newFetch(chunks, idle)
	d.active.Go(func() {
		d.copyAll(f)
		left := f.left("")
		if len(left) == 0 || f.ctx.Err() != nil {
			d.settle(f, false, nil)
			f.cancel(nil)
			return
		}
		d.stats.fetched.Add(d.compressed(chunksOf(left)))
		d.run(f)
	})
	return f
}

// compressed is how many bytes chunks, ascending, take in the blob. A frame with
// several of them counts once.
func (d *Device) compressed(chunks []int) (n int64) {
	last := int64(-1)
	for _, i := range chunks {
		if c := d.table.At(i); c.BlobOffset != last {
			n, last = n+c.BlobSize, c.BlobOffset
		}
	}
	return n
}

// copyAll lands those flights that can be copied.
func (d *Device) copyAll(f *fetch) {
	w := workers.Get().(*worker)
	defer workers.Put(w)
	priority := func() Priority { return d.priority(f) }
	last := int64(-1)
	for _, fl := range f.flights {
		if d.sched.Yield(f.ctx, priority) != nil || f.ctx.Err() != nil {
			return
		}
		c := d.table.At(fl.chunk)
		err := d.copyChunk(f, w, fl.chunk, c)
		switch {
		case err == nil:
			d.stats.copiedChunks.Add(1)
			if c.BlobOffset != last {
				d.stats.copied.Add(c.BlobSize)
				last = c.BlobOffset
			}
		case errors.Is(err, cache.ErrFull): // fetching would not help
		case errors.Is(err, blob.ErrCorrupt):
			d.log.Warn("a chunk of another layer is damaged on disk", "chunk", fl.chunk, "err", err)
			continue
		default:
			continue
		}
		d.land(fl, err)
	}
}

// copyChunk puts one chunk in the cache, out of what is local. Like what comes from
// a source it is compared with its digest before anybody sees it.
func (d *Device) copyChunk(f *fetch, w *worker, i int, c index.Chunk) error {
	out, err := d.cache.Begin(f.ctx, i)
	if err != nil {
		return err
	}
	defer out.Abort()
	loan := d.local.Lend(c)
	if loan == nil {
		return cache.ErrAbsent
	}
	defer loan.Close() //nolint:errcheck // it has no error
	w.hash.Reset()
	cloned := out.Clone(loan)
	if _, err := io.CopyBuffer(w.hash, io.LimitReader(loan, cloned), w.buf); err != nil {
		return err
	}
	if _, err := io.CopyBuffer(io.MultiWriter(w.hash, out), loan, w.buf); err != nil {
		return err
	}
	if got := [sha256.Size]byte(w.hash.Sum(nil)); got != c.Digest {
		return fmt.Errorf("got sha256:%x, want sha256:%x: %w", got, c.Digest, blob.ErrCorrupt)
	}
	return out.Commit()
}
