// SPDX-License-Identifier: Apache-2.0

package chunklist_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/chunklist"
	"github.com/holdfast/holdfast/internal/index"
)

func build(t testing.TB, p []byte) *chunklist.List {
	t.Helper()
	b := chunklist.NewBuilder()
	for rest := p; len(rest) > 0; { // in odd pieces
		n := min(len(rest), 77_777)
		if _, err := b.Write(rest[:n]); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	l, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func encode(t testing.TB, l *chunklist.List) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := l.Encode(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func content(n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(p) // never fails
	return p
}

func TestList(t *testing.T) {
	const c = chunklist.ChunkSize
	for _, n := range []int{0, 1, c - 1, c, c + 1, 3*c - 1, 3 * c} {
		p := content(n)
		l := build(t, p)
		got, err := chunklist.Decode(encode(t, l), digest.FromBytes(p), int64(n))
		if err != nil {
			t.Errorf("%d bytes: %v", n, err)
			continue
		}
		idx := got.Index()
		var covered int64
		for _, chunk := range idx.Chunks {
			if chunk.Offset != covered || chunk.BlobOffset != covered || chunk.BlobSize != chunk.Size || sha256.Sum256(p[covered:chunk.End()]) != chunk.Digest {
				t.Errorf("%d bytes: chunk %+v after %d", n, chunk, covered)
			}
			covered = chunk.End()
		}
		if covered != int64(n) || idx.DeviceSize != int64(n) || idx.Inodes[1].Size != int64(n) {
			t.Errorf("%d bytes: the chunks cover %d, the device has %d", n, covered, idx.DeviceSize)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	p := content(chunklist.ChunkSize + 1)
	good := encode(t, build(t, p))
	change := func(at int, b byte) []byte {
		c := bytes.Clone(good)
		c[at] = b
		return c
	}
	for name, doc := range map[string][]byte{
		"nothing": nil, "half a header": good[:40], "no digests": good[:56], "half a digest": good[:len(good)-1],
		"a digest too many": append(bytes.Clone(good), good[:32]...), "other magic": change(0, 'X'), "other blob": change(8, good[8]+1),
		"other size": change(40, 7), "chunks of no power of two": change(48, 1), "huge chunks": change(55, 0x70), "negative": change(47, 0x80),
	} {
		if l, err := chunklist.Decode(doc, digest.FromBytes(p), int64(len(p))); !errors.Is(err, index.ErrInvalid) {
			t.Errorf("%s: %+v, error %v", name, l, err)
		}
	}
}

// FuzzDecode: what is decoded is what was encoded, and covers the blob.
func FuzzDecode(f *testing.F) {
	p := content(chunklist.ChunkSize + 1)
	good := encode(f, build(f, p))
	f.Add(good)
	f.Add(good[:56])
	f.Add([]byte("HFBLOBC1"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		l, err := chunklist.Decode(doc, digest.FromBytes(p), int64(len(p)))
		if err != nil {
			return
		}
		if !bytes.Equal(encode(t, l), doc) {
			t.Error("it was encoded otherwise")
		}
		if chunks := l.Index().Chunks; chunks[len(chunks)-1].End() != int64(len(p)) {
			t.Errorf("%d chunks do not cover the blob", len(chunks))
		}
	})
}
