// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
)

const (
	deviceSize = 4 << 30
	chunkSize  = 1 << 20
	cacheLimit = 1 << 30
	readSize   = 128 << 10
	readers    = 4
)

// TestDiskLimit reads a device of four times the limit twice, and looks at the
// disk all the time.
func TestDiskLimit(t *testing.T) {
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	table := patternTable(t)
	space := cache.NewSpace(cacheLimit, log)
	file, err := cache.Open(dir, table, space)
	if err != nil {
		t.Fatal(err)
	}
	dev := device.New(device.Config{
		Descriptor: blob.Descriptor{Digest: "sha256:pattern", Size: deviceSize},
		Table:      table, Cache: file, Scheduler: device.NewScheduler(8), Logger: log,
	})
	dev.AddSources([]blob.Source{pattern{}})
	defer func() {
		dev.Close()
		if err := file.Close(); err != nil {
			t.Error(err)
		}
	}()

	ctx, stop := context.WithCancel(t.Context())
	var background, workload errgroup.Group
	background.Go(func() error { return space.Run(ctx) })
	background.Go(func() error { return flush(ctx, file) })
	var most int64
	background.Go(func() error {
		most = watchDisk(ctx, filepath.Join(dir, cache.DataName))
		return nil
	})
	for r := range int64(readers) {
		workload.Go(func() error {
			for pass := range int64(2) {
				part := (r + pass) % readers // not the one it has just read
				if err := readPart(ctx, dev, part*deviceSize/readers, deviceSize/readers); err != nil {
					return err
				}
			}
			return nil
		})
	}
	start := time.Now()
	if err := workload.Wait(); err != nil {
		t.Error(err)
	}
	stop()
	if err := background.Wait(); err != nil {
		t.Error(err)
	}
	s := space.Stats()
	t.Logf("read %d bytes in %s, at most %.1f%% of the limit on disk, %+v",
		2*deviceSize, time.Since(start).Round(time.Millisecond), 100*float64(most)/cacheLimit, s)
	if most > cacheLimit*105/100 || most < cacheLimit/2 {
		t.Errorf("%d bytes on disk, with a limit of %d", most, cacheLimit)
	}
	if s.Full || s.Used > cacheLimit || s.InMemory != 0 {
		t.Errorf("stats %+v", s)
	}
}

// readPart reads as the FUSE server does, and compares.
func readPart(ctx context.Context, dev *device.Device, start, size int64) error {
	got, want := make([]byte, readSize), make([]byte, readSize)
	for off := start; off < start+size; off += readSize {
		release, err := dev.Wait(ctx, off, readSize)
		if err != nil {
			return err
		}
		_, err = dev.ReadAt(got, off)
		release()
		if err != nil {
			return err
		}
		if fillPattern(want, off); !bytes.Equal(got, want) {
			return fmt.Errorf("wrong bytes at %d", off)
		}
	}
	return nil
}

// flush makes durable what there is, as often as package layer does and more.
func flush(ctx context.Context, file *cache.File) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := file.Flush(); err != nil {
				return err
			}
		}
	}
}

// watchDisk returns the most disk space that a file took.
func watchDisk(ctx context.Context, name string) (most int64) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return most
		case <-tick.C:
			var st unix.Stat_t
			if err := unix.Stat(name, &st); err == nil {
				most = max(most, st.Blocks*512)
			}
		}
	}
}

// fillPattern makes content that is cheap and different everywhere: each 8 bytes
// are a function of their offset. off and the length are multiples of 8.
func fillPattern(p []byte, off int64) {
	for i := 0; i < len(p); i += 8 {
		x := uint64(off+int64(i)) * 0x9e3779b97f4a7c15 //nolint:gosec // not negative
		binary.LittleEndian.PutUint64(p[i:], x^x>>29)
	}
}

// patternTable is the chunk table of the pattern as an uncompressed blob.
func patternTable(t *testing.T) *index.Table {
	t.Helper()
	idx := &index.Index{DeviceSize: deviceSize, Compression: index.None}
	buf := make([]byte, chunkSize)
	for off := int64(0); off < deviceSize; off += chunkSize {
		fillPattern(buf, off)
		idx.Chunks = append(idx.Chunks, index.Chunk{
			Offset: off, Size: chunkSize, BlobOffset: off, BlobSize: chunkSize, Digest: sha256.Sum256(buf),
		})
	}
	name := filepath.Join(t.TempDir(), "chunks")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(index.WriteTable(f, idx), f.Close()); err != nil {
		t.Fatal(err)
	}
	table, err := index.OpenTable(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	return table
}

// pattern is a source that has the pattern as its blob.
type pattern struct{}

func (pattern) String() string { return "pattern" }

func (pattern) Open(_ context.Context, _ blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	return io.NopCloser(&patternReader{off: offset, end: offset + length}), nil
}

type patternReader struct{ off, end int64 }

func (r *patternReader) Read(p []byte) (int, error) {
	if r.off == r.end {
		return 0, io.EOF
	}
	n := min(int64(len(p))&^7, r.end-r.off)
	fillPattern(p[:n], r.off)
	r.off += n
	return int(n), nil
}
