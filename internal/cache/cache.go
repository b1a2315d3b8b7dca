// SPDX-License-Identifier: Apache-2.0

// Package cache keeps the verified part of a device on local disk.
//
// A [File] is a sparse file with the offsets of the device, and a present map
// with one bit a chunk. Its invariants:
//
//   - A chunk is marked present only after its bytes have been verified and
//     written; what is not marked is never read.
//   - The map on disk never names a chunk whose bytes are not on disk: bytes are
//     synced first. After a crash, a chunk that the map does not name is fetched
//     again, whatever the file holds there.
//   - A file whose map names every chunk is the device itself and may be mounted
//     directly; it is never written, punched or truncated again.
package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// Names of the two files in a layer's directory.
const (
	DataName    = "data"
	PresentName = "present"
)

// The present map on disk, little endian: magic, number of chunks u64, crc32c
// of the bits u32, then the bits, chunk 0 lowest in the first of their u64.
const (
	mapMagic      = "HFPRES1\n"
	mapHeaderSize = 20
)

// File is the cache of one device. Its methods may be called concurrently,
// Close once and last.
type File struct {
	dir    string
	data   *os.File
	chunks int

	bits    []atomic.Uint64 // present: verified and written
	present atomic.Int64    // how many bits are set

	flush   sync.Mutex // one Flush at a time; protects durable
	durable int64      // how many bits the map on disk has
}

// Open opens or creates the cache in dir of a device of size bytes in chunks
// chunks. A map that is missing, damaged or of another shape counts as empty.
func Open(dir string, size int64, chunks int) (*File, error) {
	data, err := os.OpenFile(filepath.Join(dir, DataName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening cache: %w", err)
	}
	f := &File{dir: dir, data: data, chunks: chunks, bits: make([]atomic.Uint64, (chunks+63)/64)}
	if err := f.load(size); err != nil {
		return nil, fmt.Errorf("opening cache %s: %w", dir, errors.Join(err, data.Close()))
	}
	return f, nil
}

func (f *File) load(size int64) error {
	info, err := f.data.Stat()
	if err != nil {
		return err
	}
	if info.Size() != size {
		// New, or not what the map speaks of, which must not come back.
		switch err := os.Remove(f.mapName()); {
		case err == nil:
			if err := atomicfile.SyncDir(f.dir); err != nil {
				return err
			}
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		return f.data.Truncate(size)
	}
	raw, err := os.ReadFile(f.mapName())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f.decode(raw)
	f.durable = f.present.Load()
	return nil
}

func (f *File) mapName() string { return filepath.Join(f.dir, PresentName) }

// decode takes over a map, or nothing of it.
func (f *File) decode(raw []byte) {
	if len(raw) != mapHeaderSize+8*len(f.bits) || string(raw[:8]) != mapMagic ||
		binary.LittleEndian.Uint64(raw[8:]) != uint64(f.chunks) ||
		binary.LittleEndian.Uint32(raw[16:]) != checksum(raw[mapHeaderSize:]) {
		return
	}
	for i := range f.chunks {
		word := binary.LittleEndian.Uint64(raw[mapHeaderSize+8*(i/64):])
		if word&(1<<(i%64)) != 0 {
			f.Add(i)
		}
	}
}

func (f *File) encode() (raw []byte, present int64) {
	raw = make([]byte, mapHeaderSize+8*len(f.bits))
	copy(raw, mapMagic)
	binary.LittleEndian.PutUint64(raw[8:], uint64(f.chunks))
	for i := range f.bits {
		word := f.bits[i].Load()
		binary.LittleEndian.PutUint64(raw[mapHeaderSize+8*i:], word)
		for ; word != 0; word &= word - 1 {
			present++
		}
	}
	binary.LittleEndian.PutUint32(raw[16:], checksum(raw[mapHeaderSize:]))
	return raw, present
}

func checksum(p []byte) uint32 { return crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)) }

// Has reports whether chunk i is present.
func (f *File) Has(i int) bool { return f.bits[i/64].Load()&(1<<(i%64)) != 0 }

// Add marks chunk i present. Its bytes have been verified and written with WriteAt.
func (f *File) Add(i int) {
	if f.bits[i/64].Or(1<<(i%64))&(1<<(i%64)) == 0 {
		f.present.Add(1)
	}
}

// Present is the number of chunks that are present.
func (f *File) Present() int { return int(f.present.Load()) }

// Complete reports whether every chunk is present and durable: the data file is
// the device.
func (f *File) Complete() bool {
	f.flush.Lock()
	defer f.flush.Unlock()
	return f.durable == int64(f.chunks)
}

// WriteAt writes bytes of a chunk that is not present.
func (f *File) WriteAt(p []byte, off int64) (int, error) { return f.data.WriteAt(p, off) }

// ReadAt reads from chunks that are present, or from between chunks.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.data.ReadAt(p, off) }

// Flush makes durable what is present. It does nothing if that is so already.
func (f *File) Flush() error {
	f.flush.Lock()
	defer f.flush.Unlock()
	if _, err := os.Stat(f.mapName()); err == nil && f.durable == f.present.Load() {
		return nil
	}
	raw, present := f.encode() // before the sync: bits set later may lack their bytes
	if err := unix.Fdatasync(int(f.data.Fd())); err != nil {
		return fmt.Errorf("syncing cache %s: %w", f.dir, err)
	}
	if err := atomicfile.Write(f.mapName(), raw, 0o600); err != nil {
		return fmt.Errorf("writing present map of %s: %w", f.dir, err)
	}
	f.durable = present
	return nil
}

// Close flushes and closes the file.
func (f *File) Close() error { return errors.Join(f.Flush(), f.data.Close()) }

// Allocated is how many bytes the data file occupies on disk.
func (f *File) Allocated() int64 {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.data.Fd()), &st); err != nil {
		return 0
	}
	return st.Blocks * 512
}
