// SPDX-License-Identifier: Apache-2.0

package device

import (
	"testing"

	"github.com/holdfast/holdfast/internal/blob/blobtest"
)

// BenchmarkLocalRead is a read of what is in the cache.
func BenchmarkLocalRead(b *testing.B) {
	m := chunked(b, 32)
	r := newRig(b, m, rigOptions{}, blobtest.NewMemory(m.blob))
	if err := r.check(b.Context(), 0, int(r.Size())); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 128<<10)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		release, err := r.Wait(b.Context(), base, len(p))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := r.ReadAt(p, base); err != nil {
			b.Fatal(err)
		}
		release()
	}
}
