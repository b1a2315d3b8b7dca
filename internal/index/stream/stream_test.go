// SPDX-License-Identifier: Apache-2.0

package stream_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/testimage"
)

// memory is a device in memory that refuses to be written twice or backwards.
type memory struct {
	t    testing.TB
	p    []byte
	next int64
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if off < m.next {
		m.t.Errorf("write at %d after one that ended at %d", off, m.next)
	}
	m.next = off + int64(len(p))
	if grow := m.next - int64(len(m.p)); grow > 0 {
		m.p = append(m.p, make([]byte, grow)...)
	}
	return copy(m.p[off:], p), nil
}

// The index of a stream is the tree of a normal pull, in every format, and what
// was written is the device that the index describes.
func TestRead(t *testing.T) {
	for _, c := range testimage.Corpus() {
		for _, f := range c.Formats {
			t.Run(c.Name+"/"+string(f), func(t *testing.T) {
				l, err := testimage.ConvertBytes(t.Context(), c.Tar, f, testimage.Options{})
				if err != nil {
					t.Fatal(err)
				}
				device := &memory{t: t}
				got, err := stream.Read(t.Context(), bytes.NewReader(l.Bytes), l.Descriptor.Size, device)
				if err != nil {
					t.Fatal(err)
				}
				if got.Blob != l.Descriptor.Digest || got.DiffID != l.DiffID {
					t.Errorf("digests %s and %s, want %s and %s", got.Blob, got.DiffID, l.Descriptor.Digest, l.DiffID)
				}
				indextest.Check(t, got.Index, l.Bytes, indextest.Exact)
				want := indextest.Device(t, got.Index, l.Bytes)
				device.p = append(device.p, make([]byte, int(got.Index.DeviceSize)-len(device.p))...)
				if !bytes.Equal(device.p, want) {
					t.Error("the device written differs from that of the index")
				}
				for i, n := range got.Index.Chunks {
					if n.Size > 4<<20 {
						t.Errorf("chunk %d has %d bytes", i, n.Size)
					}
				}
			})
		}
	}
}

var errBroken = errors.New("broken")

type brokenDevice struct{}

func (brokenDevice) WriteAt([]byte, int64) (int, error) { return 0, errBroken }

func read(t testing.TB, p []byte, size int64) (*stream.Result, error) {
	t.Helper()
	return stream.Read(context.Background(), bytes.NewReader(p), size, &memory{t: t})
}

func gzipped(t testing.TB, p []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	if _, err := z.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func sample() []byte {
	f := testimage.File{Content: testimage.Bytes(10_000, 1)}
	f.Name = "file"
	return testimage.Tar(f)
}

func TestReadErrors(t *testing.T) {
	plain := sample()
	packed := gzipped(t, plain)
	twice := testimage.File{}
	twice.Name = "a"
	up := testimage.File{}
	up.Name = "../a"
	for name, c := range map[string]struct {
		blob []byte
		size int64
		want error
	}{
		"shorter than said":      {plain, int64(len(plain)) + 1, blob.ErrCorrupt},
		"longer than said":       {plain, int64(len(plain)) - 1, blob.ErrCorrupt},
		"negative":               {plain, -1, index.ErrInvalid},
		"cut off in a file":      {plain[:5000], 5000, index.ErrInvalid},
		"cut off in a header":    {plain[:100], 100, index.ErrInvalid},
		"gzip cut off":           {packed[:100], 100, index.ErrInvalid},
		"gzip header cut off":    {packed[:4], 4, index.ErrInvalid},
		"garbage after gzip":     {append(bytes.Clone(packed), "garbage"...), int64(len(packed)) + 7, index.ErrInvalid},
		"damaged gzip":           {append(bytes.Clone(packed[:200]), make([]byte, len(packed)-200)...), int64(len(packed)), index.ErrInvalid},
		"xz":                     {[]byte("\xfd7zXZ\x00 and so on"), 16, index.ErrInvalid},
		"bzip2":                  {[]byte("BZh9 and so on"), 14, index.ErrInvalid},
		"no tar":                 {bytes.Repeat([]byte("no tar "), 1000), 7000, index.ErrInvalid},
		"same name twice":        {testimage.Tar(twice, twice), 2048, index.ErrInvalid},
		"name leaves the layer":  {testimage.Tar(up), 1536, index.ErrInvalid},
		"sparse, not aligned":    {asPAX(sparse(t, "100", "0", "5", "7", "5")), 0, index.ErrInvalid},
		"sparse, and it is none": {asPAX(sparse(t, "100", "x")), 0, index.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			if c.size == 0 {
				c.size = int64(len(c.blob))
			}
			if _, err := read(t, c.blob, c.size); !errors.Is(err, c.want) {
				t.Errorf("error is %v, want %v", err, c.want)
			}
		})
	}
}

func TestReadBroken(t *testing.T) {
	for _, p := range [][]byte{sample(), gzipped(t, sample())} {
		for _, n := range []int{0, 1, 3, 100, len(p) / 2, len(p) - 1, len(p)} {
			r := io.MultiReader(bytes.NewReader(p[:n]), iotest.ErrReader(errBroken))
			_, err := stream.Read(t.Context(), r, int64(len(p)), &memory{t: t})
			if !errors.Is(err, errBroken) || errors.Is(err, index.ErrInvalid) {
				t.Errorf("source that breaks after %d bytes: %v", n, err)
			}
		}
		_, err := stream.Read(t.Context(), bytes.NewReader(p), int64(len(p)), brokenDevice{})
		if !errors.Is(err, errBroken) || errors.Is(err, index.ErrInvalid) {
			t.Errorf("device that breaks: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := stream.Read(ctx, bytes.NewReader(p), int64(len(p)), &memory{t: t}); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	}
}

// What follows the end of the tar belongs to both digests.
func TestReadTrailing(t *testing.T) {
	plain := append(sample(), testimage.Bytes(100_000, 2)...)
	for _, p := range [][]byte{plain, gzipped(t, plain), append(gzipped(t, plain[:5000]), gzipped(t, plain[5000:])...)} {
		got, err := read(t, p, int64(len(p)))
		if err != nil {
			t.Fatal(err)
		}
		if got.Blob != digest.FromBytes(p) || got.DiffID != digest.FromBytes(plain) {
			t.Errorf("digests %s and %s", got.Blob, got.DiffID)
		}
	}
	if got, err := read(t, nil, 0); err != nil || got.DiffID != digest.FromBytes(nil) || len(got.Index.Inodes) != 1 {
		t.Errorf("nothing at all: %+v, %v", got, err)
	}
}

// sparse returns a tar with a sparse file of the size given
// in GNU's PAX format 1.0: fields are the map's, after its length. See asPAX.
func sparse(t testing.TB, size string, fields ...string) []byte {
	t.Helper()
	var data []byte
	text := fmt.Sprintf("%d\n", len(fields)/2)
	for i := 0; i+1 < len(fields); i += 2 {
		text += fields[i] + "\n" + fields[i+1] + "\n"
		n, err := strconv.Atoi(fields[i+1])
		if err != nil {
			t.Fatal(err)
		}
		data = append(data, testimage.Bytes(n, uint64(i))...)
	}
	if len(fields)%2 != 0 {
		text = "x\n"
	}
	text += strings.Repeat("\x00", (512-len(text)%512)%512)
	records := ""
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=sparse", "GNU.sparse.realsize=" + size} {
		records += fmt.Sprintf("%d %s\n", len(r)+4, r) // all are two digits long
	}
	return testimage.Tar(
		testimage.File{Header: tar.Header{Name: "PaxHeaders/sparse", Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}, Content: []byte(records)},
		testimage.File{Header: tar.Header{Name: "GNUSparseFile.0/sparse", Format: tar.FormatUSTAR}, Content: append([]byte(text), data...)},
	)
}

// asPAX makes the first entry of a tar the PAX header of the second.
func asPAX(p []byte) []byte {
	p[156] = 'x'
	copy(p[148:156], "        ")
	total := 0
	for _, c := range p[:512] {
		total += int(c)
	}
	copy(p[148:156], fmt.Sprintf("%06o\x00 ", total))
	return p
}

func TestReadSparse(t *testing.T) {
	p := asPAX(sparse(t, "500324", "0", "512", "4096", "5120", "500224", "100"))
	device := &memory{t: t}
	got, err := stream.Read(t.Context(), bytes.NewReader(p), int64(len(p)), device)
	if err != nil {
		t.Fatal(err)
	}
	indextest.Check(t, got.Index, p, indextest.Exact)
	if len(got.Index.Chunks) != 3 {
		t.Errorf("chunks %+v", got.Index.Chunks)
	}
	device.p = append(device.p, make([]byte, int(got.Index.DeviceSize)-len(device.p))...)
	if !bytes.Equal(device.p, indextest.Device(t, got.Index, p)) {
		t.Error("the device written differs from that of the index")
	}
}

// A file of zeros that inflates a thousandfold costs no memory.
func TestReadMemory(t *testing.T) {
	const size = 256 << 20
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		err := tw.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Size: size})
		for n := 0; err == nil && n < size; n += 1 << 20 {
			_, err = tw.Write(make([]byte, 1<<20))
		}
		w.CloseWithError(errors.Join(err, tw.Close()))
	}()
	before := allocated()
	got, err := stream.Read(t.Context(), r, size+1536, discard{})
	if err != nil {
		t.Fatal(err)
	}
	if used := int64(allocated()) - int64(before); used > 32<<20 { //nolint:gosec // small
		t.Errorf("%d bytes of heap in use", used)
	}
	if len(got.Index.Chunks) != size>>22 {
		t.Errorf("%d chunks", len(got.Index.Chunks))
	}
}

type discard struct{}

func (discard) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Sys
}

func FuzzStream(f *testing.F) {
	for _, c := range testimage.Corpus() {
		if len(c.Tar) < 64<<10 {
			f.Add(c.Tar)
			f.Add(gzipped(f, c.Tar))
		}
	}
	f.Add(asPAX(sparse(f, "100000", "512", "512")))
	f.Fuzz(func(t *testing.T, p []byte) {
		got, err := stream.Read(t.Context(), bytes.NewReader(p), int64(len(p)), discard{})
		if err != nil {
			return
		}
		if got.Blob != digest.FromBytes(p) {
			t.Errorf("digest %s", got.Blob)
		}
		for _, c := range got.Index.Chunks {
			if c.BlobOffset < 0 || c.BlobSize <= 0 || c.BlobOffset+c.BlobSize > int64(len(p)) || c.End() > got.Index.DeviceSize {
				t.Errorf("chunk %+v", c)
			}
		}
	})
}
