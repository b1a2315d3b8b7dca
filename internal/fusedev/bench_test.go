// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// fileDevice is a local file, as the cache of a complete layer is.
type fileDevice struct {
	*os.File
	size int64
}

func (d fileDevice) Size() int64                                    { return d.size }
func (fileDevice) Wait(context.Context, int64, int) (func(), error) { return func() {}, nil }

// BenchmarkRead reads a file in the page cache, sequentially and in one go.
func BenchmarkRead(b *testing.B) {
	const size = 256 << 20
	file, err := os.Create(b.TempDir() + "/data")
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close() //nolint:errcheck // scratch
	for i := range size >> 20 {
		if _, err := file.Write(randomBytes(1<<20, uint64(i))); err != nil {
			b.Fatal(err)
		}
	}
	s, _ := serve(b)
	d := digest.FromString("benchmark")
	if err := s.Add(d, fileDevice{file, size}); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{4 << 10, 128 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", n>>10), func(b *testing.B) {
			fd, err := unix.Open(s.Path(d), unix.O_RDONLY, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Close(fd) //nolint:errcheck // read only
			buf := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if got, err := unix.Pread(fd, buf, off); err != nil || got != n {
					b.Fatalf("%d bytes, %v", got, err)
				}
				off = (off + int64(n)) % size
			}
		})
	}
}
