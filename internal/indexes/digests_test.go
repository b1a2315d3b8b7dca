// SPDX-License-Identifier: Apache-2.0

package indexes_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexes"
)

func digestsOf(files int) indexes.Digests {
	d := indexes.Digests{Blob: digest.FromString("blob"), DiffID: digest.FromString("diff"), ZTOC: digest.FromString("ztoc")}
	for i := range files {
		d.Files = append(d.Files, sha256.Sum256([]byte{byte(i)}))
	}
	return d
}

func encode(t testing.TB, d indexes.Digests) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := d.Encode(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestDigests(t *testing.T) {
	for _, files := range []int{0, 1, 2, 1000} {
		want := digestsOf(files)
		p := encode(t, want)
		if len(p) != 8+32*(3+files) {
			t.Errorf("%d files: %d bytes", files, len(p))
		}
		got, err := indexes.DecodeDigests(p, want.Blob)
		if err != nil || got.Blob != want.Blob || got.DiffID != want.DiffID || got.ZTOC != want.ZTOC || !slices.Equal(got.Files, want.Files) {
			t.Errorf("%d files: %+v, error %v", files, got, err)
		}
	}
	for _, bad := range []digest.Digest{"", "sha256:zz", digest.SHA512.FromString("x")} {
		d := digestsOf(1)
		d.DiffID = bad
		if err := d.Encode(&bytes.Buffer{}); err == nil {
			t.Errorf("%q has been encoded", bad)
		}
	}
}

func TestDecodeDigestsRefuses(t *testing.T) {
	good := encode(t, digestsOf(1))
	for name, p := range map[string][]byte{
		"nothing":       nil,
		"no digests":    good[:8],
		"one digest":    good[:8+32],
		"two digests":   good[:8+64],
		"half a digest": good[:len(good)-1],
		"other magic":   append([]byte("X"), good[1:]...),
		"other layer":   encode(t, indexes.Digests{Blob: digest.FromString("x"), DiffID: digest.FromString("y"), ZTOC: digest.FromString("z")}),
	} {
		if got, err := indexes.DecodeDigests(p, digest.FromString("blob")); !errors.Is(err, index.ErrInvalid) {
			t.Errorf("%s: %+v, error %v", name, got, err)
		}
	}
}

// FuzzDecodeDigests: what is decoded is what was encoded.
func FuzzDecodeDigests(f *testing.F) {
	f.Add(encode(f, digestsOf(0)))
	f.Add(encode(f, digestsOf(3)))
	f.Add([]byte("HFDIGST1"))
	f.Fuzz(func(t *testing.T, p []byte) {
		d, err := indexes.DecodeDigests(p, digest.FromString("blob"))
		if err == nil && !bytes.Equal(encode(t, d), p) {
			t.Errorf("%+v was encoded otherwise", d)
		}
	})
}
