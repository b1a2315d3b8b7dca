// SPDX-License-Identifier: Apache-2.0

package index_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/index"
)

// digests is an index whose chunks have these digests.
func digests(all ...[sha256.Size]byte) *index.Index {
	idx := &index.Index{}
	for i, d := range all {
		idx.Chunks = append(idx.Chunks, index.Chunk{Offset: int64(i), Size: 1, Digest: d})
	}
	return idx
}

// starting is a digest that starts with a number.
func starting(n uint64) (d [sha256.Size]byte) {
	binary.BigEndian.PutUint64(d[:], n)
	d[31] = 1
	return d
}

func writeDigests(t testing.TB, idx *index.Index) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "digests")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(index.WriteDigests(f, idx), f.Close()); err != nil {
		t.Fatal(err)
	}
	return name
}

func openDigests(t testing.TB, idx *index.Index) *index.Digests {
	t.Helper()
	d, err := index.OpenDigests(writeDigests(t, idx))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(d.Close(), d.Close()); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestDigestsFind(t *testing.T) {
	a, b := starting(7), starting(7)
	b[31] = 2 // starts like a
	for _, tt := range []struct {
		name   string
		chunks []([sha256.Size]byte)
		find   [sha256.Size]byte
		want   []int
	}{
		{"in nothing", nil, a, nil},
		{"the only one", [][32]byte{a}, a, []int{0}},
		{"another one", [][32]byte{a}, starting(8), nil},
		{"several, and those that start alike", [][32]byte{a, starting(1), b, a}, a, []int{0, 2, 3}},
		{"the smallest", [][32]byte{starting(1 << 63), starting(0), a}, starting(0), []int{1}},
		{"the largest", [][32]byte{starting(1<<64 - 1), starting(0), a}, starting(1<<64 - 1), []int{0}},
		{"chunks without a digest are in no list", [][32]byte{{}, a, {}}, [32]byte{}, nil},
		{"but are counted", [][32]byte{{}, a, {}}, a, []int{1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := slices.Collect(openDigests(t, digests(tt.chunks...)).Find(tt.find))
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Lists of digests that are spread evenly, as they are, and of some that are not.
func TestDigestsFindAll(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // no secret
	for name, key := range map[string]func(i uint64) uint64{
		"even":           func(uint64) uint64 { return random.Uint64() },
		"low":            func(i uint64) uint64 { return i },
		"high":           func(i uint64) uint64 { return 1<<64 - 1 - i },
		"all the same":   func(uint64) uint64 { return 1 << 40 },
		"two heaps":      func(i uint64) uint64 { return i%2<<63 + i },
		"every other":    func(i uint64) uint64 { return i << 52 },
		"mostly the top": func(i uint64) uint64 { return 1<<64 - 1 - i*i },
	} {
		for _, n := range []int{1, 2, 15, 16, 17, 1000, 4096} {
			t.Run(fmt.Sprint(name, n), func(t *testing.T) {
				byKey := map[uint64][]int{}
				var all [][sha256.Size]byte
				for i := range n {
					k := key(uint64(i))
					byKey[k] = append(byKey[k], i)
					all = append(all, starting(k))
				}
				d := openDigests(t, digests(all...))
				if d.Len() != n {
					t.Errorf("%d records", d.Len())
				}
				for k, want := range byKey {
					for _, k := range []uint64{k - 1, k, k + 1} {
						want := want
						if k != want64(all, want) {
							want = byKey[k]
						}
						if diff := cmp.Diff(want, slices.Collect(d.Find(starting(k)))); diff != "" {
							t.Fatalf("%x: %s", k, diff)
						}
					}
				}
			})
		}
	}
}

func want64(all [][sha256.Size]byte, chunks []int) uint64 {
	return binary.BigEndian.Uint64(all[chunks[0]][:])
}

// A list made from a table is the one that was made from its index.
func TestDigestsOfTable(t *testing.T) {
	idx := sample(100)
	table := open(t, write(t, idx))
	name := filepath.Join(t.TempDir(), "digests")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(index.WriteDigests(f, table), f.Close()); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(writeDigests(t, idx))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("they differ")
	}
}

// Every single flipped bit and every truncation is noticed.
func TestDigestsDamaged(t *testing.T) {
	name := writeDigests(t, digests(starting(1), starting(2), starting(3)))
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(p []byte, what string) {
		t.Helper()
		if err := os.WriteFile(name, p, 0o600); err != nil {
			t.Fatal(err)
		}
		if d, err := index.OpenDigests(name); !errors.Is(err, index.ErrInvalid) {
			t.Errorf("%s: %v, %v", what, d, err)
		}
	}
	for i := range whole {
		p := bytes.Clone(whole)
		p[i] ^= 1 << (i % 8)
		refused(p, fmt.Sprintf("byte %d", i))
	}
	for n := range whole {
		refused(whole[:n], fmt.Sprintf("%d bytes", n))
	}
	refused(append(bytes.Clone(whole), make([]byte, 12)...), "a record more")
	if _, err := index.OpenDigests(name + ".none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// FuzzDigestsFind finds every record of any list, and nothing else.
func FuzzDigestsFind(f *testing.F) {
	f.Add([]byte("0123456789abcdef01234567"), uint64(7))
	f.Add([]byte{}, uint64(0))
	f.Add(bytes.Repeat([]byte{0xff}, 80), uint64(1<<64-1))
	f.Fuzz(func(t *testing.T, keys []byte, find uint64) {
		if len(keys) > 1<<12 {
			return
		}
		var all [][sha256.Size]byte
		var want []int
		for i := 0; i+8 <= len(keys); i += 8 {
			k := binary.BigEndian.Uint64(keys[i:])
			if k == find {
				want = append(want, len(all))
			}
			all = append(all, starting(k))
		}
		if diff := cmp.Diff(want, slices.Collect(openDigests(t, digests(all...)).Find(starting(find)))); diff != "" {
			t.Error(diff)
		}
	})
}

// BenchmarkDigestsFind looks up what none of a node's layers has.
func BenchmarkDigestsFind(b *testing.B) {
	for _, node := range []struct{ layers, chunks int }{{100, 3000}, {250, 3000}, {100, 100_000}} {
		b.Run(fmt.Sprintf("%d layers of %d chunks", node.layers, node.chunks), func(b *testing.B) {
			random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // no secret
			var lists []*index.Digests
			for range node.layers {
				all := make([][sha256.Size]byte, node.chunks)
				for i := range all {
					all[i] = starting(random.Uint64())
				}
				lists = append(lists, openDigests(b, digests(all...)))
			}
			for b.Loop() {
				d := starting(random.Uint64())
				for _, l := range lists {
					for range l.Find(d) {
						b.Fatal("found")
					}
				}
			}
		})
	}
}
