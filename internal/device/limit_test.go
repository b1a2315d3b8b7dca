// SPDX-License-Identifier: Apache-2.0

package device

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/testimage"
)

// Readers of much more than the limit get the right bytes, in every format.
func TestReadersWithinALimit(t *testing.T) {
	for _, format := range formats() {
		for _, limit := range []int64{1, 3 * chunkSize, 10 * chunkSize} {
			t.Run(fmt.Sprintf("%s, %d bytes", format, limit), func(t *testing.T) {
				t.Parallel()
				m := makeLayer(t, format, testimage.Options{MinChunkSize: 20_000},
					file("a", 12*chunkSize+5, 1), file("b", 5000, 2), file("c", 9000, 3), file("d", 12*chunkSize, 4))
				space := cache.NewSpace(limit, slog.New(slog.DiscardHandler))
				r := newRig(t, m, rigOptions{space: space}, blobtest.NewMemory(m.blob))
				var g errgroup.Group
				for reader := range uint64(4) {
					g.Go(func() error {
						random := rand.New(rand.NewPCG(reader, 2)) //nolint:gosec // no secret
						for range 25 {
							off := random.Int64N(r.Size())
							n := int(min(r.Size()-off, random.Int64N(3*chunkSize)+1))
							if err := r.check(t.Context(), off, n); err != nil {
								return err
							}
							if s := space.Stats(); s.Used > limit {
								return fmt.Errorf("stats %+v", s)
							}
						}
						return nil
					})
				}
				if err := g.Wait(); err != nil {
					t.Error(err)
				}
				r.quiet(t)
				if got := r.cache.Allocated(); got > limit+16<<10 { // ext4 keeps where data is in blocks of its own
					t.Errorf("%d bytes on disk", got)
				}
			})
		}
	}
}

// A sequential reader in small steps fetches a chunk once although there is no
// room on disk.
func TestSequentialReaderOnAFullDisk(t *testing.T) {
	m := chunked(t, 20)
	src := watch(blobtest.NewMemory(m.blob))
	space := cache.NewSpace(1, slog.New(slog.DiscardHandler))
	r := newRig(t, m, rigOptions{space: space}, src)
	for off := int64(0); off+8192 <= r.Size(); off += 8192 {
		if err := r.check(t.Context(), off, 8192); err != nil {
			t.Fatal(err)
		}
	}
	var total int64
	for _, c := range src.seen() {
		total += c.Length
	}
	if total > int64(len(m.blob))*11/10 {
		t.Errorf("fetched %d bytes of a blob of %d", total, len(m.blob))
	}
	if s := space.Stats(); !s.Full || s.Used != 0 || r.Stats().Present != 0 {
		t.Errorf("stats %+v, present %d", s, r.Stats().Present)
	}
}

// What is not local is an error, not zeros.
func TestReadAtWithoutWaiting(t *testing.T) {
	m := chunked(t, 1)
	r := newRig(t, m, rigOptions{}, blobtest.NewMemory(m.blob))
	if _, err := r.ReadAt(make([]byte, 10), base); !errors.Is(err, cache.ErrAbsent) {
		t.Errorf("error %v", err)
	}
}
