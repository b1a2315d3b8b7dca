// SPDX-License-Identifier: Apache-2.0

// Package device makes a layer readable before it is there: a [Device] is the
// layer's uncompressed file data as one virtual file, put together from its
// chunk table, its cache and the sources of its blob.
//
// One read, in this package: [Device.Wait] holds the chunks of the range in the
// cache, finds those that are not there, joins or starts their fetches (plan.go,
// fetch.go), which decompress, verify and write them to the cache (stream.go) or
// copy them from where they are local already (local.go), and returns when all are
// present. [Device.ReadAt] then reads the cache.
//
// No byte reaches the present map of the cache unless its chunk's digest
// matched. A chunk that does not match is fetched from the next source; when
// there is none the reader gets an error, never wrong or zero bytes.
//
// A source that fails for a time is asked again as long as a reader waits
// (fetch.go), given up if it is too slow (paced.go), and asked last for a while
// by all devices (health.go).
package device

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/retry"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/index"
)

// ErrNoSource means that no source of the blob is known at present.
var ErrNoSource = errors.New("no source is configured for this blob")

// Device is a layer's data. All methods may be called concurrently, Close last.
type Device struct {
	desc  blob.Descriptor
	table *index.Table
	cache *cache.File
	local Local // may be nil
	sched *Scheduler
	log   *slog.Logger

	patience time.Duration
	rounds   retry.Policy // pauses between rounds: see run

	ctx    context.Context // ends with Close; parent of all fetches
	cancel context.CancelCauseFunc
	active sync.WaitGroup // running fetches

	stats   counters
	related atomic.Bool // something of the layer was local elsewhere

	mu       sync.Mutex // protects the fields below
	closed   bool
	sources  []blob.Source
	flights  map[int]*flight // by chunk
	touched  []uint64        // chunks a reader asked for, one bit each
	records  []*recording    // who notes what readers ask for
	guided   int             // how many fetch in order what readers want
	streams  [8]stream       // recent sequential readers
	oldest   int             // next of streams to replace
	misses   misses
	unshared int // chunks that were not local elsewhere, while none was: see spared
	lastErr  error
	broken   error              // every read fails with it
	troubles map[string]Trouble // by source
}

type counters struct {
	requests, fetched, copied, copiedChunks, touched, failures, corrupt atomic.Int64
}

// Stats is what a device has done since it was opened.
type Stats struct {
	Chunks   int   `json:"chunks"`
	Present  int   `json:"present"`  // chunks verified and local
	Requests int64 `json:"requests"` // range requests to sources
	Fetched  int64 `json:"fetched"`  // compressed bytes asked for
	// Copied are the compressed bytes that need not be fetched, since the chunks
	// were local under other layers, and CopiedChunks those chunks.
	Copied       int64 `json:"copied"`
	CopiedChunks int64 `json:"copiedChunks"`

	Touched  int64 `json:"touched"`  // compressed bytes of chunks that readers asked for
	Failures int64 `json:"failures"` // requests that failed
	Corrupt  int64 `json:"corrupt"`  // chunks that did not match their digest
	// LastError is the last failure that reached a reader, "" if none. It is
	// cleared when something is fetched, unless a chunk did not match its digest.
	LastError string `json:"lastError,omitempty"`
	// Troubles are the sources that have failed since they last worked.
	Troubles []Trouble `json:"troubles,omitempty"`
}

// Config is what a device is made of. The device closes neither table nor cache.
type Config struct {
	Descriptor blob.Descriptor
	Table      *index.Table
	Cache      *cache.File
	Local      Local // what need not be fetched; may be nil
	Scheduler  *Scheduler
	Logger     *slog.Logger
	// Patience is how long readers wait. All sources are asked within that time:
	// one that falls behind is left for the next. The default is DefaultPatience.
	Patience time.Duration
}

// DefaultPatience is the default of Config.Patience.
const DefaultPatience = 2 * time.Minute

// New returns a device without sources: see [Device.AddSources].
func New(c Config) *Device {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &Device{
		desc: c.Descriptor, table: c.Table, cache: c.Cache, local: c.Local, sched: c.Scheduler,
		log: c.Logger.With("blob", c.Descriptor.Digest.String()),
		ctx: ctx, cancel: cancel,
		flights:  map[int]*flight{},
		touched:  make([]uint64, (c.Table.Len()+63)/64),
		patience: cmp.Or(c.Patience, DefaultPatience), rounds: rounds(),
		troubles: map[string]Trouble{},
	}
}

// maxSources bounds what images can add.
const maxSources = 16

// AddSources adds places the blob is read from, behind those it has; one of the
// same name is replaced, since it may have newer credentials.
func (d *Device) AddSources(added []blob.Source) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := slices.Clone(d.sources) // fetches under way keep theirs
	for _, src := range added {
		same := func(s blob.Source) bool { return s.String() == src.String() }
		if i := slices.IndexFunc(all, same); i >= 0 {
			all[i] = src
		} else if len(all) < maxSources {
			all = append(all, src)
		}
	}
	d.sources = all
}

// Sources returns the places the blob is read from.
func (d *Device) Sources() []blob.Source {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sources
}

// Size is the length of the device in bytes.
func (d *Device) Size() int64 { return d.table.DeviceSize() }

// Wait returns when [off, off+n) is in the cache, where it stays until it is
// released, once, or with the error that kept it from getting there. Only the
// last reader of a chunk that leaves, because its ctx ended, ends the chunk's
// fetch.
func (d *Device) Wait(ctx context.Context, off int64, n int) (release func(), err error) {
	if err := d.checkRange(off, int64(n)); err != nil {
		return nil, err
	}
	first, end := d.table.Range(off, int64(n))
	for {
		// Held before it is there: what arrives stays.
		release, err := d.cache.Hold(ctx, first, end)
		if err != nil {
			return nil, d.failed(off, n, err)
		}
		flights, err := d.demand(off, int64(n))
		if err != nil {
			release()
			return nil, err
		}
		if len(flights) == 0 {
			return release, nil
		}
		err = d.await(ctx, flights)
		if err == nil {
			return release, nil
		}
		release()
		switch {
		case ctx.Err() != nil:
			return nil, d.failed(off, n, err)
		case errors.Is(err, errAbandoned): // its last reader left just before this one joined
		case errors.Is(err, cache.ErrFull): // it was not held when the disk got full
		default:
			return nil, d.failed(off, n, err)
		}
	}
}

// ReadAt reads a range that is in the cache, which one that [Device.Wait] has
// waited for is until it is released, or fails with [cache.ErrAbsent].
func (d *Device) ReadAt(p []byte, off int64) (int, error) { return d.cache.ReadAt(p, off) }

// await waits for all flights, and leaves all of them.
func (d *Device) await(ctx context.Context, flights []*flight) error {
	defer d.leave(flights)
	defer d.sched.block()()
	return arrive(ctx, flights)
}

func (d *Device) failed(off int64, n int, err error) error {
	err = fmt.Errorf("reading %d bytes at %d of layer %s: %w", n, off, d.desc.Digest, err)
	if !errors.Is(err, context.Canceled) {
		d.mu.Lock()
		d.lastErr = err
		d.mu.Unlock()
	}
	return err
}

// Fail makes all reads fail from now on, also of what is in the cache.
func (d *Device) Fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.broken, d.lastErr = err, err
}

// Stats returns the device's counters.
func (d *Device) Stats() Stats {
	s := Stats{
		Chunks: d.table.Len(), Present: d.cache.Present(),
		Requests: d.stats.requests.Load(), Fetched: d.stats.fetched.Load(), Touched: d.stats.touched.Load(),
		Failures: d.stats.failures.Load(), Corrupt: d.stats.corrupt.Load(),
		Copied: d.stats.copied.Load(), CopiedChunks: d.stats.copiedChunks.Load(),
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lastErr != nil {
		s.LastError = d.lastErr.Error()
	}
	s.Troubles = d.troubled()
	return s
}

// Close ends all fetches and waits for them. Readers that wait get an error.
func (d *Device) Close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.cancel(errClosed)
	d.active.Wait()
}

var _ io.ReaderAt = (*Device)(nil)
