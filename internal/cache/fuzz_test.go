// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"testing"
)

// FuzzDecode: a map on disk is taken as it is, or not at all.
func FuzzDecode(f *testing.F) {
	f.Add(encode([]uint64{5, 1}, 65), 65)
	f.Add(encode(nil, 0), 0)
	f.Add([]byte(mapMagic), 1)
	f.Fuzz(func(t *testing.T, raw []byte, chunks int) {
		if chunks < 0 || chunks > 1<<20 {
			return
		}
		words := decode(raw, chunks)
		if words == nil {
			return
		}
		if n := count(words); n > chunks {
			t.Errorf("%d of %d chunks are present", n, chunks)
		}
		if again := decode(encode(words, chunks), chunks); len(again) != len(words) || !bytes.Equal(encode(again, chunks), encode(words, chunks)) {
			t.Error("it does not survive")
		}
	})
}
