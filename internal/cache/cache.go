// SPDX-License-Identifier: Apache-2.0

// Package cache keeps the verified part of a device on local disk, within the
// disk space that all caches of a node share.
//
// A [File] is a sparse file with the offsets of the device, and a present map
// with one bit a chunk. [Space] is the limit: when it is reached, the chunks
// that have not been read for the longest time are evicted. What cannot be
// stored is kept in memory for those who wait for it.
//
// Invariants:
//
//   - A chunk is marked present only after its bytes have been verified and
//     written; what is not marked is never read.
//   - The map on disk never names a chunk whose bytes are not on disk: bytes are
//     synced before it names them, and punched after it has ceased to. After a
//     crash, a chunk that the map does not name is fetched again, whatever the
//     file holds there.
//   - A chunk that somebody holds ([File.Hold]) stays readable.
//   - A frozen file, which is the device itself and may be mounted directly, is
//     never written, punched or truncated again.
//
// Locks are taken in this order: File.flushing, File.naming, overflow.mu,
// File.mu, Space.mu.
package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/index"
)

// Names of the files in a layer's directory.
const (
	DataName    = "data"
	PresentName = "present"
	FrozenName  = "frozen"
)

// ErrAbsent means that a range cannot be read because it is not local.
var ErrAbsent = errors.New("the range is not in the cache")

// File is the cache of one device. Its methods may be called concurrently,
// Close once and last.
type File struct {
	dir   string
	data  *os.File
	table *index.Table
	space *Space

	sync      func() error               // makes data durable; replaced by tests, as the next
	punchHole func(off, end int64) error // frees the disk space of a range
	clone     func(from *os.File, off, n, to int64) error
	loans     sync.WaitGroup

	bits     []atomic.Uint64 // present: verified and on disk; changed under mu
	present  atomic.Int64    // how many bits are set
	extents  []extent
	buffered atomic.Int64  // how many chunks are in memory
	lost     atomic.Uint64 // how often the kernel failed to write what it had been given

	flushing sync.Mutex // one Flush at a time

	naming sync.Mutex // one change of the map on disk at a time; protects the fields below
	named  []uint64   // what the map on disk names, or may name if it is stale
	next   []uint64   // what Flush is about to name, nil if it is not running
	stale  bool       // writing the map has failed: named is more than it must be

	mu       sync.Mutex // protects the fields below
	held     []*hold
	writing  map[int]bool      // chunks that have a Writer
	punching map[span]struct{} // absent chunks whose disk space is being freed
	changed  chan struct{}     // closed and replaced when writing or punching shrinks
	memory   map[int]*buffer   // chunks that could not be stored
	bytes    int64             // disk space of the chunks that are present
	frozen   bool
}

// Open opens or creates the cache in dir of the device that the table describes,
// which is not closed before the cache. Nobody replaces a file in dir meanwhile:
// what one who was killed at it left there goes. A map that is missing, damaged or of
// another shape counts as empty.
func Open(dir string, table *index.Table, space *Space) (*File, error) {
	if err := atomicfile.Clean(dir); err != nil {
		return nil, fmt.Errorf("opening cache: %w", err)
	}
	data, err := os.OpenFile(filepath.Join(dir, DataName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening cache: %w", err)
	}
	words := (table.Len() + 63) / 64
	f := &File{
		dir: dir, data: data, table: table, space: space,
		bits: make([]atomic.Uint64, words), named: make([]uint64, words),
		extents: make([]extent, (table.DeviceSize()+extentSize-1)/extentSize),
		writing: map[int]bool{}, punching: map[span]struct{}{}, memory: map[int]*buffer{},
		changed: make(chan struct{}),
	}
	f.sync = func() error { return f.control(unix.Fdatasync) }
	f.punchHole, f.clone = f.fallocate, f.cloneRange
	if err := f.load(); err != nil {
		return nil, fmt.Errorf("opening cache %s: %w", dir, errors.Join(err, data.Close()))
	}
	space.add(f)
	return f, nil
}

func (f *File) load() error {
	info, err := f.data.Stat()
	if err != nil {
		return err
	}
	if f.frozen, err = wasFrozen(f.dir); err != nil {
		return err
	}
	if info.Size() != f.table.DeviceSize() {
		if f.frozen {
			return fmt.Errorf("a data file of %d bytes that may be mounted has %d", f.table.DeviceSize(), info.Size())
		}
		// New, or not what the map speaks of, which must not come back.
		switch err := os.Remove(f.mapName()); {
		case err == nil:
			if err := atomicfile.SyncDir(f.dir); err != nil {
				return err
			}
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		return f.data.Truncate(f.table.DeviceSize())
	}
	raw, err := os.ReadFile(f.mapName())
	if errors.Is(err, fs.ErrNotExist) {
		return f.sweep()
	}
	if err != nil {
		return err
	}
	bits := decode(raw, f.table.Len())
	if bits == nil {
		return nil
	}
	f.named = bits
	for i := range f.table.Len() {
		if bits[i/64]&(1<<(i%64)) != 0 {
			f.mark(i)
		}
	}
	return f.sweep()
}

// sweep frees what a crash has left on disk of chunks that are not present: it
// would not be counted. Nothing uses the file yet.
func (f *File) sweep() error {
	// File systems count some of their own blocks as the file's.
	const slack = 64 << 10
	if f.frozen || f.Allocated() <= f.bytes+slack {
		return nil
	}
	var absent []span
	for i := range f.table.Len() {
		if !f.stored(i) {
			absent = appendChunk(absent, i, 0)
		}
	}
	_, err := f.free(absent)
	return err
}

// control runs a function on the descriptor, which stays open meanwhile.
func (f *File) control(do func(fd int) error) error {
	conn, err := f.data.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := conn.Control(func(fd uintptr) { err = do(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// Has reports whether chunk i can be read.
func (f *File) Has(i int) bool {
	if f.stored(i) {
		return true
	}
	if f.buffered.Load() == 0 {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.memory[i] != nil
}

// stored reports whether chunk i is present: on disk, not only in memory.
func (f *File) stored(i int) bool { return f.bits[i/64].Load()&(1<<(i%64)) != 0 }

// mark makes chunk i present. The caller holds f.mu.
func (f *File) mark(i int) {
	c := f.table.At(i)
	f.bits[i/64].Or(1 << (i % 64))
	f.present.Add(1)
	f.extents[c.Offset/extentSize].bytes.Add(cost(c))
	f.bytes += cost(c)
}

// unmark makes chunk i, which is present, absent. The caller holds f.mu.
func (f *File) unmark(i int) {
	c := f.table.At(i)
	f.bits[i/64].And(^uint64(1 << (i % 64)))
	f.present.Add(-1)
	f.extents[c.Offset/extentSize].bytes.Add(-cost(c))
	f.bytes -= cost(c)
}

// Present is the number of chunks that are on disk.
func (f *File) Present() int { return int(f.present.Load()) }

// Complete reports whether every chunk is present and durable: the data file is
// the device. That lasts only if [File.Freeze] says so too.
func (f *File) Complete() bool {
	f.naming.Lock()
	defer f.naming.Unlock()
	return f.complete()
}

func (f *File) complete() bool {
	return !f.stale && f.Present() == f.table.Len() && count(f.named) == f.table.Len()
}

// ReadAt reads a range that is in the cache, which one that is held always is,
// or fails with [ErrAbsent].
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	first, end := f.table.Range(off, int64(len(p)))
	h := f.pin(first, end)
	defer f.unpin(h)
	lost := f.lost.Load()
	buffers, ok := f.locate(first, end)
	if !ok {
		return 0, ErrAbsent
	}
	n, err := f.data.ReadAt(p, off)
	if err != nil {
		return n, err
	}
	for _, b := range buffers {
		if at := f.table.At(b.chunk).Offset; at > off {
			copy(p[at-off:], b.data)
		} else {
			copy(p, b.data[off-at:])
		}
	}
	if f.lost.Load() != lost {
		return 0, ErrAbsent // it may have been in what the kernel lost
	}
	return n, nil
}

// locate finds those of the chunks [first, end) that are in memory, and reports
// whether the others are on disk.
func (f *File) locate(first, end int) (buffers []*buffer, ok bool) {
	for i := first; i < end; i++ {
		if f.stored(i) {
			continue
		}
		f.mu.Lock()
		b := f.memory[i]
		f.mu.Unlock()
		if b == nil {
			return nil, false
		}
		buffers = append(buffers, b)
	}
	return buffers, true
}

// Full reports whether chunks cannot be stored at present: see [Space].
func (f *File) Full() bool { return f.space.full.Load() }

// Close waits for loans, flushes and closes the file. Nothing is held or being written.
func (f *File) Close() error {
	f.loans.Wait()
	f.space.remove(f)
	return errors.Join(f.Flush(), f.data.Close())
}

// Allocated is how many bytes the data file occupies on disk.
func (f *File) Allocated() int64 {
	var st unix.Stat_t
	if err := f.control(func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0
	}
	return st.Blocks * 512
}
