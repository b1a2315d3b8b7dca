// SPDX-License-Identifier: Apache-2.0

package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
)

// Run checks that sources honour the contract of [blob.Source]. It calls open
// for each part of the suite; open returns a source that has exactly the given
// blobs, and releases what it took with t.Cleanup.
func Run(t *testing.T, open func(t *testing.T, blobs map[digest.Digest][]byte) blob.Source) {
	s := &suite{open: open}
	t.Run("ranges", s.ranges)
	t.Run("small reads", s.smallReads)
	t.Run("empty range", s.emptyRange)
	t.Run("out of range", s.outOfRange)
	t.Run("unknown digest", s.unknownDigest)
	t.Run("early close", s.earlyClose)
	t.Run("cancelled before", s.cancelledBefore)
	t.Run("cancelled while reading", s.cancelledWhileReading)
	t.Run("concurrent", s.concurrent)
	t.Run("name", s.name)
}

// Bytes returns n bytes that look random and are the same for the same n and seed.
func Bytes(n int, seed uint64) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b) // never fails
	return b
}

type suite struct {
	open func(t *testing.T, blobs map[digest.Digest][]byte) blob.Source
}

// source opens a source of blobs of the given sizes.
func (s *suite) source(t *testing.T, sizes ...int) (blob.Source, [][]byte) {
	t.Helper()
	blobs := make(map[digest.Digest][]byte, len(sizes))
	list := make([][]byte, len(sizes))
	for i, n := range sizes {
		list[i] = Bytes(n, uint64(i))
		blobs[digest.FromBytes(list[i])] = list[i]
	}
	return s.open(t, blobs), list
}

func describe(b []byte) blob.Descriptor {
	return blob.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
}

func read(ctx context.Context, src blob.Source, desc blob.Descriptor, offset, length int64) ([]byte, error) {
	rc, err := src.Open(ctx, desc, offset, length)
	if err != nil {
		return nil, err
	}
	got, err := io.ReadAll(rc)
	return got, errors.Join(err, rc.Close())
}

// check reads one range and compares it.
func check(ctx context.Context, src blob.Source, b []byte, offset, length int64) error {
	got, err := read(ctx, src, describe(b), offset, length)
	if err != nil {
		return fmt.Errorf("reading %d+%d of %d bytes: %w", offset, length, len(b), err)
	}
	if !bytes.Equal(got, b[offset:offset+length]) {
		return fmt.Errorf("reading %d+%d of %d bytes: got %d other bytes", offset, length, len(b), len(got))
	}
	return nil
}

func (s *suite) ranges(t *testing.T) {
	sizes := []int{0, 1, 2, 4095, 4096, 4097, 100_003}
	src, blobs := s.source(t, sizes...)
	for _, b := range blobs {
		n := int64(len(b))
		for _, offset := range []int64{0, 1, 4095, 4096, n / 2, n - 1, n} {
			for _, length := range []int64{0, 1, 2, 4096, n / 2, n - offset - 1, n - offset} {
				if describe(b).CheckRange(offset, length) != nil {
					continue
				}
				if err := check(t.Context(), src, b, offset, length); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

func (s *suite) smallReads(t *testing.T) {
	src, blobs := s.source(t, 10_000)
	rc, err := src.Open(t.Context(), describe(blobs[0]), 100, 5000)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close() //nolint:errcheck // other subtests check Close
	got, err := io.ReadAll(iotest.OneByteReader(rc))
	if err != nil || !bytes.Equal(got, blobs[0][100:5100]) {
		t.Errorf("got %d bytes and error %v", len(got), err)
	}
	for range 2 {
		if n, err := rc.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("reading past the end = %d, %v; want 0, EOF", n, err)
		}
	}
}

func (s *suite) emptyRange(t *testing.T) {
	src, blobs := s.source(t, 100)
	for _, offset := range []int64{0, 50, 100} {
		got, err := read(t.Context(), src, describe(blobs[0]), offset, 0)
		if err != nil || len(got) != 0 {
			t.Errorf("empty range at %d = %d bytes, error %v", offset, len(got), err)
		}
	}
}

func (s *suite) outOfRange(t *testing.T) {
	src, blobs := s.source(t, 100)
	const huge = int64(1<<63 - 1)
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, 101}, {100, 1}, {101, 0}, {50, 51}, {huge, 1}, {1, huge}, {huge, huge}} {
		got, err := read(t.Context(), src, describe(blobs[0]), r[0], r[1])
		if err == nil {
			t.Errorf("range %d+%d of 100 bytes gave %d bytes and no error", r[0], r[1], len(got))
		} else if blob.IsTemporary(err) {
			t.Errorf("range %d+%d of 100 bytes: error %v is temporary", r[0], r[1], err)
		}
	}
	if err := check(t.Context(), src, blobs[0], 0, 100); err != nil {
		t.Errorf("after errors: %v", err)
	}
}

func (s *suite) unknownDigest(t *testing.T) {
	src, blobs := s.source(t, 100)
	for _, offset := range []int64{0, 5} {
		_, err := read(t.Context(), src, describe([]byte("something else")), offset, 3)
		if !errors.Is(err, blob.ErrNotFound) || blob.IsTemporary(err) {
			t.Errorf("error at %d = %v; want a permanent %v", offset, err, blob.ErrNotFound)
		}
	}
	if err := check(t.Context(), src, blobs[0], 0, 100); err != nil {
		t.Errorf("after errors: %v", err)
	}
}

func (s *suite) earlyClose(t *testing.T) {
	src, blobs := s.source(t, 1<<20)
	for _, n := range []int{0, 1, 5000} {
		rc, err := src.Open(t.Context(), describe(blobs[0]), 3, 1<<19)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, n)
		if _, err := io.ReadFull(rc, got); err != nil || !bytes.Equal(got, blobs[0][3:3+n]) {
			t.Errorf("first %d bytes: error %v", n, err)
		}
		if err := rc.Close(); err != nil {
			t.Errorf("closing after %d bytes: %v", n, err)
		}
	}
	if err := check(t.Context(), src, blobs[0], 0, 1<<20); err != nil {
		t.Errorf("after closing early: %v", err)
	}
}

func (s *suite) cancelledBefore(t *testing.T) {
	src, blobs := s.source(t, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := read(ctx, src, describe(blobs[0]), 0, 1000)
	if !errors.Is(err, context.Canceled) || blob.IsTemporary(err) {
		t.Errorf("error = %v; want a permanent %v", err, context.Canceled)
	}
	if err := check(t.Context(), src, blobs[0], 0, 1000); err != nil {
		t.Errorf("after cancelling: %v", err)
	}
}

// A reader may have buffered its range, so that the stream completes although
// the context ended. What it may not do is end early.
func (s *suite) cancelledWhileReading(t *testing.T) {
	src, blobs := s.source(t, 8<<20)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	rc, err := src.Open(ctx, describe(blobs[0]), 0, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close() //nolint:errcheck // other subtests check Close
	head := make([]byte, 10)
	if _, err := io.ReadFull(rc, head); err != nil {
		t.Fatal(err)
	}
	cancel()
	rest, err := io.ReadAll(rc)
	switch {
	case err == nil && !bytes.Equal(append(head, rest...), blobs[0]):
		t.Errorf("got %d bytes and no error", len(head)+len(rest))
	case err != nil && (!errors.Is(err, context.Canceled) || blob.IsTemporary(err)):
		t.Errorf("error = %v; want a permanent %v", err, context.Canceled)
	}
	if err := check(t.Context(), src, blobs[0], 0, 100); err != nil {
		t.Errorf("after cancelling: %v", err)
	}
}

func (s *suite) concurrent(t *testing.T) {
	src, blobs := s.source(t, 200_000, 70_001)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			for range 8 {
				b := blobs[rnd.IntN(len(blobs))]
				offset := rnd.Int64N(int64(len(b)))
				if err := check(t.Context(), src, b, offset, rnd.Int64N(int64(len(b))-offset)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func (s *suite) name(t *testing.T) {
	if src, _ := s.source(t); src.String() == "" {
		t.Error("the source has no name")
	}
}
