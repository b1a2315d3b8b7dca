// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const size = 1000 // of a part, in these tests

// asked is a source that counts who reads from it at once.
type asked struct {
	blob.Source
	mu    sync.Mutex
	calls []blobtest.Call
	open  int
	most  int
}

func (a *asked) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, blobtest.Call{Offset: offset, Length: length})
	body, err := a.Source.Open(ctx, desc, offset, length)
	if err != nil {
		return nil, err
	}
	a.open++
	a.most = max(a.most, a.open)
	return &counted{body, a}, nil
}

type counted struct {
	io.ReadCloser
	a *asked
}

func (b *counted) Close() error {
	b.a.mu.Lock()
	defer b.a.mu.Unlock()
	b.a.open--
	return b.ReadCloser.Close()
}

// TestReadsTheBlob reads blobs of all lengths around those of parts, in small and in
// large steps.
func TestReadsTheBlob(t *testing.T) {
	for _, n := range []int{0, 1, size - 1, size, size + 1, 2*size - 1, 2 * size, 2*size + 1, 7*size + 3} {
		for _, small := range []bool{false, true} {
			p := blobtest.Bytes(n, uint64(n))
			src := &asked{Source: blobtest.NewMemory(p)}
			r, err := open(t.Context(), src, blobtest.Memory{}.Add(p), 0, size)
			if err != nil {
				t.Fatal(err)
			}
			var in io.Reader = r
			if small {
				in = iotest.OneByteReader(r)
			}
			got, err := io.ReadAll(in)
			if err != nil || !bytes.Equal(got, p) {
				t.Errorf("%d bytes: got %d, %v", n, len(got), err)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if src.open != 0 {
				t.Errorf("%d bytes: %d bodies are left open", n, src.open)
			}
			if want := max(1, (n+size-1)/size); len(src.calls) != want || src.most > 1+ahead {
				t.Errorf("%d bytes: %d requests, %d at once", n, len(src.calls), src.most)
			}
			if n > 4*size && src.most < 1+ahead {
				t.Errorf("%d bytes: only %d at once", n, src.most)
			}
		}
	}
}

// TestSourceWithoutRanges falls back to one request for the whole.
func TestSourceWithoutRanges(t *testing.T) {
	p := blobtest.Bytes(5*size, 1)
	src := blobtest.Inject(blobtest.NewMemory(p), func(c blobtest.Call) blobtest.Fault {
		if c.Offset > 0 {
			return blobtest.Fault{OpenErr: blob.ErrNoRange}
		}
		return blobtest.Fault{}
	})
	r, err := open(t.Context(), src, blobtest.Memory{}.Add(p), 0, size)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, p) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
}

// TestErrors: what a source answers reaches the reader, behind what came before it.
func TestErrors(t *testing.T) {
	p := blobtest.Bytes(5*size, 1)
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		fault func(c blobtest.Call) blobtest.Fault
		at    int
	}{
		"first request":  {func(blobtest.Call) blobtest.Fault { return blobtest.Fault{OpenErr: broken} }, -1},
		"later request":  {func(c blobtest.Call) blobtest.Fault { return only(c, 2*size, blobtest.Fault{OpenErr: broken}) }, 2 * size},
		"middle of part": {func(c blobtest.Call) blobtest.Fault { return only(c, 2*size, blobtest.Fault{At: 10, ReadErr: broken}) }, 2*size + 10},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := open(t.Context(), blobtest.Inject(blobtest.NewMemory(p), c.fault), blobtest.Memory{}.Add(p), 0, size)
			if c.at < 0 {
				if !errors.Is(err, broken) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if !errors.Is(err, broken) || !bytes.Equal(got, p[:c.at]) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func only(c blobtest.Call, offset int64, f blobtest.Fault) blobtest.Fault {
	if c.Offset == offset {
		return f
	}
	return blobtest.Fault{}
}

// TestClosedEarly leaves nothing open.
func TestClosedEarly(t *testing.T) {
	p := blobtest.Bytes(9*size, 1)
	src := &asked{Source: blobtest.NewMemory(p)}
	r, err := open(t.Context(), src, blobtest.Memory{}.Add(p), 0, size)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, r, size+size/2); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil || src.open != 0 {
		t.Errorf("%d bodies are open, %v", src.open, err)
	}
}
