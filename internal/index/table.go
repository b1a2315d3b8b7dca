// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sort"

	"golang.org/x/sys/unix"
)

// The chunk table on disk: a header, then one record a chunk, sorted by offset
// in the device. All integers are little endian.
//
//	header: magic [8]byte, records u64, device size u64, compression u8,
//	        reserved [3]byte, crc32c of the records and of the header before it u32
//	record: offset, size, blob offset, blob size, inner offset u64, digest [32]byte
const (
	tableMagic  = "HFCHUNK1"
	headerSize  = 32
	recordSize  = 5*8 + sha256.Size
	maxTableLen = int64(1) << 36
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// WriteTable writes the chunks of an index. The caller makes the file durable.
func WriteTable(w io.WriteSeeker, idx *Index) error {
	if _, err := w.Seek(headerSize, io.SeekStart); err != nil {
		return fmt.Errorf("writing chunk table: %w", err)
	}
	crc := crc32.New(castagnoli)
	buf := bufio.NewWriterSize(io.MultiWriter(w, crc), 1<<16)
	var rec [recordSize]byte
	for _, c := range idx.Chunks {
		for i, v := range []int64{c.Offset, c.Size, c.BlobOffset, c.BlobSize, c.InnerOffset} {
			binary.LittleEndian.PutUint64(rec[8*i:], uint64(v))
		}
		copy(rec[40:], c.Digest[:])
		if _, err := buf.Write(rec[:]); err != nil {
			return fmt.Errorf("writing chunk table: %w", err)
		}
	}
	if err := buf.Flush(); err != nil {
		return fmt.Errorf("writing chunk table: %w", err)
	}
	var head [headerSize]byte
	copy(head[:], tableMagic)
	binary.LittleEndian.PutUint64(head[8:], uint64(len(idx.Chunks)))
	binary.LittleEndian.PutUint64(head[16:], uint64(idx.DeviceSize))
	head[24] = byte(idx.Compression)
	binary.LittleEndian.PutUint32(head[28:], crc32.Update(crc.Sum32(), castagnoli, head[:28]))
	if _, err := w.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("writing chunk table: %w", err)
	}
	if _, err := w.Write(head[:]); err != nil {
		return fmt.Errorf("writing chunk table: %w", err)
	}
	return nil
}

// Table is the chunks of a layer, on disk: its pages are the kernel's to drop.
// It is immutable and safe for concurrent use until it is closed.
type Table struct {
	compression Compression
	deviceSize  int64
	n           int
	mapped      []byte
}

// OpenTable opens a table that [WriteTable] wrote, checking that it is whole.
func OpenTable(name string) (*Table, error) {
	t, err := openTable(name)
	if err != nil {
		return nil, fmt.Errorf("opening chunk table %s: %w", name, err)
	}
	return t, nil
}

func openTable(name string) (*Table, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only; the mapping outlives the descriptor
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() < headerSize || info.Size() > maxTableLen || (info.Size()-headerSize)%recordSize != 0 {
		return nil, fmt.Errorf("%d bytes: %w", info.Size(), ErrInvalid)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping: %w", err)
	}
	t := &Table{
		mapped:      m,
		n:           int((info.Size() - headerSize) / recordSize),
		deviceSize:  int64(binary.LittleEndian.Uint64(m[16:])),
		compression: Compression(m[24]),
	}
	if string(m[:8]) != tableMagic || binary.LittleEndian.Uint64(m[8:]) != uint64(t.n) ||
		crc32.Update(crc32.Checksum(m[headerSize:], castagnoli), castagnoli, m[:28]) != binary.LittleEndian.Uint32(m[28:]) {
		return nil, fmt.Errorf("damaged: %w", closeAfter(t, ErrInvalid))
	}
	return t, nil
}

func closeAfter(t *Table, err error) error {
	_ = t.Close()
	return err
}

// Close releases the table. No method may be called afterwards.
func (t *Table) Close() error {
	m := t.mapped
	t.mapped = nil
	if m == nil {
		return nil
	}
	return unix.Munmap(m)
}

// Len is the number of chunks.
func (t *Table) Len() int { return t.n }

// DeviceSize is the length of the device in bytes.
func (t *Table) DeviceSize() int64 { return t.deviceSize }

// Compression is how all chunks are compressed.
func (t *Table) Compression() Compression { return t.compression }

// At returns chunk i, 0 <= i < Len().
func (t *Table) At(i int) Chunk {
	rec := t.mapped[headerSize+i*recordSize:][:recordSize]
	field := func(k int) int64 { return int64(binary.LittleEndian.Uint64(rec[8*k:])) }
	return Chunk{
		Offset: field(0), Size: field(1), BlobOffset: field(2), BlobSize: field(3), InnerOffset: field(4),
		Digest: [sha256.Size]byte(rec[40:]),
	}
}

// Search returns the first chunk that ends after offset: the one that holds it,
// or, where offset lies in no chunk, the next. It is Len() if there is none.
func (t *Table) Search(offset int64) int {
	return sort.Search(t.n, func(i int) bool {
		rec := t.mapped[headerSize+i*recordSize:]
		return int64(binary.LittleEndian.Uint64(rec))+int64(binary.LittleEndian.Uint64(rec[8:])) > offset
	})
}

// Range returns the chunks [first, end) that have bytes in [offset, offset+n).
func (t *Table) Range(offset, n int64) (first, end int) {
	first, end = t.Search(offset), t.Search(offset+n)
	if n <= 0 {
		return first, first
	}
	if end < t.n && t.At(end).Offset < offset+n {
		end++
	}
	return first, end
}
