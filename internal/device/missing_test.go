// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/testimage"
)

func free(context.Context, int64) error { return nil }

func TestFillMissing(t *testing.T) {
	// More than two batches.
	m := makeLayer(t, testimage.Uncompressed, testimage.Options{}, file("a", 5<<20, 1), file("b", 5<<20, 2), file("c", 5<<20, 3))
	src := watch(blobtest.NewMemory(m.blob))
	r := newRig(t, m, rigOptions{}, src)
	if err := r.check(t.Context(), 6<<20, 100); err != nil {
		t.Fatal(err)
	}
	r.quiet(t)
	before := len(src.seen())
	var want, paid, fetched int64 // compressed bytes
	for i, c := range m.index.Chunks {
		if !r.cache.Has(i) {
			want += c.BlobSize
		}
	}
	if err := r.FillMissing(t.Context(), func(_ context.Context, n int64) error { paid += n; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, c := range src.seen()[before:] {
		fetched += c.Length
	}
	if paid != want || fetched != want || want < 2*fillBatch {
		t.Errorf("%d bytes are missing, %d were paid for, %d fetched", want, paid, fetched)
	}
	if s := r.Stats(); s.Present != s.Chunks || s.Failures != 0 {
		t.Errorf("%+v", s)
	}
	if err := r.check(t.Context(), 0, int(r.Size())); err != nil {
		t.Error(err)
	}
	before = len(src.seen())
	if err := r.FillMissing(t.Context(), func(context.Context, int64) error { return errors.New("paid for nothing") }); err != nil || len(src.seen()) != before {
		t.Errorf("again: error %v, calls %v", err, src.seen()[before:])
	}
}

func TestFillMissingEnds(t *testing.T) {
	m := chunked(t, 300)
	broke := errors.New("broke")
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name string
		ctx  context.Context //nolint:containedctx // of one case
		o    rigOptions
		src  blob.Source
		pay  func(context.Context, int64) error
		want error
	}{
		{"without room", t.Context(), rigOptions{space: cache.NewSpace(4<<20, slog.New(slog.DiscardHandler))}, blobtest.NewMemory(m.blob), free, ErrNoRoom},
		{"unpaid", t.Context(), rigOptions{}, blobtest.NewMemory(m.blob), func(context.Context, int64) error { return broke }, broke},
		{"refused", t.Context(), rigOptions{}, faults(blobtest.NewMemory(m.blob), blobtest.Fault{OpenErr: blob.ErrUnauthorized}), free, blob.ErrUnauthorized},
		{"with its context", canceled, rigOptions{}, blobtest.NewMemory(m.blob), free, context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, m, tt.o, tt.src)
			if err := r.FillMissing(tt.ctx, tt.pay); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if s := r.Stats(); s.Present == s.Chunks {
				t.Errorf("%+v", s)
			}
		})
	}
}
