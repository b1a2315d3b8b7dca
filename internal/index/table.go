// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sort"

	"golang.org/x/sys/unix"
)

// The chunk table on disk: a header, then one record a chunk, sorted by offset
// in the device, then one a span, sorted by offset in the blob, then the windows
// of the spans that have one, in their order. All integers are little endian.
//
//	header: magic [8]byte, chunks u64, device size u64, compression u8,
//	        spans [3]byte, crc32c of the records and of the header before it u32
//	chunk:  offset, size, blob offset, blob size, inner offset u64, digest [32]byte
//	span:   blob offset, blob size, start u64, digest [32]byte, bits u8,
//	        reserved [3]byte, window: its number plus one u32, its crc32c u32,
//	        reserved [4]byte
const (
	tableMagic  = "HFCHUNK1"
	headerSize  = 32
	recordSize  = 5*8 + sha256.Size
	spanSize    = 3*8 + sha256.Size + 16
	maxSpans    = 1<<24 - 1
	maxTableLen = int64(1) << 36
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// WriteTable writes the chunks of an index. The caller makes the file durable.
func WriteTable(w io.WriteSeeker, idx *Index) error {
	if err := writeTable(w, idx); err != nil {
		return fmt.Errorf("writing chunk table: %w", err)
	}
	return nil
}

func writeTable(w io.WriteSeeker, idx *Index) error {
	if len(idx.Spans) > maxSpans {
		return fmt.Errorf("%d spans: %w", len(idx.Spans), ErrTooLarge)
	}
	if _, err := w.Seek(headerSize, io.SeekStart); err != nil {
		return err
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
			return err
		}
	}
	if err := writeSpans(buf, idx); err != nil {
		return err
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	if err := writeWindows(w, idx); err != nil {
		return err
	}
	var head [headerSize]byte
	copy(head[:], tableMagic)
	binary.LittleEndian.PutUint64(head[8:], uint64(len(idx.Chunks)))
	binary.LittleEndian.PutUint64(head[16:], uint64(idx.DeviceSize))
	binary.LittleEndian.PutUint32(head[24:], uint32(len(idx.Spans))<<8|uint32(idx.Compression)) //nolint:gosec // maxSpans
	binary.LittleEndian.PutUint32(head[28:], crc32.Update(crc.Sum32(), castagnoli, head[:28]))
	if _, err := w.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err := w.Write(head[:])
	return err
}

// Table is the chunks of a layer, on disk: its pages are the kernel's to drop.
// It is immutable and safe for concurrent use until it is closed.
type Table struct {
	compression Compression
	deviceSize  int64
	n           int
	spans       int
	mapped      []byte   // up to the windows
	file        *os.File // has the windows; nil if there are none
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
	t := &Table{file: f}
	if err := t.load(); err != nil {
		return nil, closeAfter(t, err)
	}
	return t, nil
}

// load maps the records. Windows are read when they are needed: mapped, they would
// count as memory of the process.
func (t *Table) load() error {
	info, err := t.file.Stat()
	if err != nil {
		return err
	}
	var head [headerSize]byte
	if _, err := io.ReadFull(io.NewSectionReader(t.file, 0, headerSize), head[:]); err != nil || info.Size() > maxTableLen {
		return fmt.Errorf("%d bytes: %w", info.Size(), ErrInvalid)
	}
	chunks := binary.LittleEndian.Uint64(head[8:])
	spans := binary.LittleEndian.Uint32(head[24:]) >> 8
	if string(head[:8]) != tableMagic || chunks > uint64(info.Size())/recordSize || uint64(spans) > uint64(info.Size())/spanSize { //nolint:gosec // not negative
		return fmt.Errorf("damaged: %w", ErrInvalid)
	}
	t.n, t.spans = int(chunks), int(spans) //nolint:gosec // bounded by the file's length
	t.deviceSize, t.compression = int64(binary.LittleEndian.Uint64(head[16:])), Compression(head[24])
	end := t.windowsAt()
	if end > info.Size() || (info.Size()-end)%WindowSize != 0 {
		return fmt.Errorf("damaged: %w", ErrInvalid)
	}
	if t.mapped, err = unix.Mmap(int(t.file.Fd()), 0, int(end), unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("mapping: %w", err)
	}
	m := t.mapped
	if crc32.Update(crc32.Checksum(m[headerSize:], castagnoli), castagnoli, m[:28]) != binary.LittleEndian.Uint32(m[28:]) {
		return fmt.Errorf("damaged: %w", ErrInvalid)
	}
	if info.Size() > end {
		return nil
	}
	err = t.file.Close() // the mapping outlives it
	t.file = nil
	return err
}

func closeAfter(t *Table, err error) error {
	_ = t.Close()
	return err
}

// Close releases the table. No method may be called afterwards.
func (t *Table) Close() error {
	var err error
	if t.file != nil {
		err = t.file.Close()
		t.file = nil
	}
	m := t.mapped
	t.mapped = nil
	if m == nil {
		return err
	}
	return errors.Join(err, unix.Munmap(m))
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
