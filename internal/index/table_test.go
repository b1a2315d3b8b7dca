// SPDX-License-Identifier: Apache-2.0

package index_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/index"
)

// sample is an index with chunks of 100 bytes, a hole before the third.
func sample(chunks int) *index.Index {
	idx := &index.Index{Compression: index.Zstd, DeviceSize: 1 << 40}
	for i := range int64(chunks) {
		c := index.Chunk{Offset: 100 * i, Size: 100, BlobOffset: 7 * i, BlobSize: 8, InnerOffset: i}
		if i >= 2 {
			c.Offset += 1000
		}
		c.Digest[0], c.Digest[31] = byte(i), 0xff
		idx.Chunks = append(idx.Chunks, c)
	}
	return idx
}

func write(t testing.TB, idx *index.Index) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "table")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(index.WriteTable(f, idx), f.Close()); err != nil {
		t.Fatal(err)
	}
	return name
}

func open(t testing.TB, name string) *index.Table {
	t.Helper()
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

func TestTable(t *testing.T) {
	for _, n := range []int{0, 1, 2, 3, 1000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			want := sample(n)
			table := open(t, write(t, want))
			if table.Len() != n || table.DeviceSize() != want.DeviceSize || table.Compression() != index.Zstd {
				t.Errorf("%d chunks, device of %d, compression %d", table.Len(), table.DeviceSize(), table.Compression())
			}
			for i, c := range want.Chunks {
				if diff := cmp.Diff(c, table.At(i)); diff != "" {
					t.Errorf("chunk %d (-want +got)\n%s", i, diff)
				}
			}
		})
	}
}

func TestTableSearch(t *testing.T) {
	table := open(t, write(t, sample(4))) // [0,100) [100,200) [1200,1300) [1300,1400)
	for offset, want := range map[int64]int{
		0: 0, 1: 0, 99: 0, 100: 1, 101: 1, 199: 1, 200: 2, 201: 2, 1199: 2, 1200: 2, 1299: 2, 1300: 3, 1399: 3, 1400: 4, 1 << 40: 4,
	} {
		if got := table.Search(offset); got != want {
			t.Errorf("Search(%d) = %d, want %d", offset, got, want)
		}
	}
	if got := open(t, write(t, sample(0))).Search(0); got != 0 {
		t.Errorf("Search in nothing is %d", got)
	}
}

// Every single flipped bit and every truncation is noticed.
func TestTableDamaged(t *testing.T) {
	name := write(t, sample(3))
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(p []byte, what string) {
		t.Helper()
		if err := os.WriteFile(name, p, 0o600); err != nil {
			t.Fatal(err)
		}
		if table, err := index.OpenTable(name); !errors.Is(err, index.ErrInvalid) {
			t.Errorf("%s: %v, %v", what, table, err)
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
	refused(append(bytes.Clone(whole), make([]byte, 72)...), "a record more")
	if _, err := index.OpenTable(name + ".none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func TestTableClose(t *testing.T) {
	table, err := index.OpenTable(write(t, sample(1)))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(table.Close(), table.Close()); err != nil {
		t.Error(err)
	}
}
