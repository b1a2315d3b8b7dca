// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// The present map on disk, little endian: magic, number of chunks u64, crc32c
// of the bits u32, then the bits, chunk 0 lowest in the first of their u64.
const (
	mapMagic      = "HFPRES1\n"
	mapHeaderSize = 20
)

// decode returns the bits of a map of so many chunks, or nil if it is none.
func decode(raw []byte, chunks int) []uint64 {
	words := make([]uint64, (chunks+63)/64)
	if len(raw) != mapHeaderSize+8*len(words) || string(raw[:8]) != mapMagic ||
		binary.LittleEndian.Uint64(raw[8:]) != uint64(chunks) ||
		binary.LittleEndian.Uint32(raw[16:]) != checksum(raw[mapHeaderSize:]) {
		return nil
	}
	for i := range words {
		words[i] = binary.LittleEndian.Uint64(raw[mapHeaderSize+8*i:])
	}
	if tail := chunks % 64; tail != 0 {
		words[len(words)-1] &= 1<<tail - 1
	}
	return words
}

func encode(words []uint64, chunks int) []byte {
	raw := make([]byte, mapHeaderSize+8*len(words))
	copy(raw, mapMagic)
	binary.LittleEndian.PutUint64(raw[8:], uint64(chunks))
	for i, w := range words {
		binary.LittleEndian.PutUint64(raw[mapHeaderSize+8*i:], w)
	}
	binary.LittleEndian.PutUint32(raw[16:], checksum(raw[mapHeaderSize:]))
	return raw
}

func checksum(p []byte) uint32 { return crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)) }

func count(words []uint64) int {
	n := 0
	for _, w := range words {
		n += bits.OnesCount64(w)
	}
	return n
}

// MarkComplete turns a data file in dir that holds all of a device, verified,
// into a complete cache. Nobody has it open.
func MarkComplete(dir string, size int64, chunks int) error {
	data, err := os.OpenFile(filepath.Join(dir, DataName), os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("completing cache: %w", err)
	}
	if err = data.Truncate(size); err == nil {
		err = data.Sync()
	}
	if err := errors.Join(err, data.Close()); err != nil {
		return fmt.Errorf("completing cache %s: %w", dir, err)
	}
	words := make([]uint64, (chunks+63)/64)
	for i := range chunks {
		words[i/64] |= 1 << (i % 64)
	}
	return atomicfile.Write(filepath.Join(dir, PresentName), encode(words, chunks), 0o600)
}

func (f *File) mapName() string { return filepath.Join(f.dir, PresentName) }

func (f *File) snapshot() []uint64 {
	words := make([]uint64, len(f.bits))
	for i := range words {
		words[i] = f.bits[i].Load()
	}
	return words
}

// Flush makes durable what is present: the data, then the map. It does nothing
// if that is so already. If the data cannot be made durable, what has become
// present since the last time is absent again, since nobody knows what the
// kernel still has of it.
func (f *File) Flush() error {
	f.flushing.Lock()
	defer f.flushing.Unlock()
	if !f.beginFlush() {
		return nil
	}
	// Without the lock: evictions go on, and take out of next what they take.
	err := f.sync()
	f.naming.Lock()
	defer f.naming.Unlock()
	next := f.next
	f.next = nil
	if err != nil {
		return errors.Join(fmt.Errorf("syncing cache %s: %w", f.dir, err), f.lose())
	}
	if err := f.name(next); err != nil {
		for i, w := range next { // perhaps it does name them
			f.named[i] |= w
		}
		return err
	}
	return nil
}

// beginFlush notes what is present before the data is synced: bits set later may
// lack their bytes. It reports whether there is anything to do.
func (f *File) beginFlush() bool {
	f.naming.Lock()
	defer f.naming.Unlock()
	now := f.snapshot()
	if _, err := os.Stat(f.mapName()); err == nil && !f.stale && slices.Equal(now, f.named) {
		return false
	}
	f.next = now
	return true
}

// name replaces the map on disk. The caller holds f.naming.
func (f *File) name(words []uint64) error {
	f.stale = true
	if err := atomicfile.Write(f.mapName(), encode(words, f.table.Len()), 0o600); err != nil {
		return fmt.Errorf("writing present map of %s: %w", f.dir, err)
	}
	f.named, f.stale = words, false
	return nil
}

// unname takes chunks out of the map on disk, durably. If that fails the map may
// name them still or not. The caller holds f.naming.
func (f *File) unname(spans []span) error {
	rest, changed := slices.Clone(f.named), false
	for _, s := range spans {
		for i := s.first; i < s.end; i++ {
			bit := uint64(1) << (i % 64)
			changed = changed || rest[i/64]&bit != 0
			rest[i/64] &^= bit
			if f.next != nil {
				f.next[i/64] &^= bit
			}
		}
	}
	if !changed && !f.stale {
		return nil
	}
	return f.name(rest)
}

// lose makes absent what is present and was never made durable. Readers that are
// inside get an error. The caller holds f.naming.
func (f *File) lose() error {
	f.mu.Lock()
	f.lost.Add(1)
	var spans []span
	for i := range f.table.Len() {
		if f.stored(i) && f.named[i/64]&(1<<(i%64)) == 0 {
			f.unmark(i)
			spans = appendChunk(spans, i, cost(f.table.At(i)))
		}
	}
	f.punch(spans)
	f.mu.Unlock()
	_, err := f.free(spans)
	return err
}

// fallocate frees the disk space of a range.
func (f *File) fallocate(off, end int64) error {
	return f.control(func(fd int) error {
		for {
			err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, end-off)
			if !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	})
}
