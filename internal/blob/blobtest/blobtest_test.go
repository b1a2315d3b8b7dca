// SPDX-License-Identifier: Apache-2.0

package blobtest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
)

func TestMemory(t *testing.T) {
	blobtest.Run(t, func(_ *testing.T, blobs map[digest.Digest][]byte) blob.Source {
		return blobtest.Memory(blobs)
	})
}

func TestInjectPassesByDefault(t *testing.T) {
	blobtest.Run(t, func(_ *testing.T, blobs map[digest.Digest][]byte) blob.Source {
		return blobtest.Inject(blobtest.Memory(blobs), func(blobtest.Call) blobtest.Fault { return blobtest.Fault{} })
	})
}

func TestInject(t *testing.T) {
	want := blobtest.Bytes(1000, 1)
	flipped := bytes.Clone(want[100:900])
	flipped[7] ^= 0x80
	broken := errors.New("broken")

	tests := []struct {
		name  string
		fault blobtest.Fault
		want  []byte
		err   error
	}{
		{"open", blobtest.Fault{OpenErr: broken}, nil, broken},
		{"read at once", blobtest.Fault{ReadErr: broken}, nil, broken},
		{"read later", blobtest.Fault{ReadErr: broken, At: 10}, want[100:110], broken},
		{"truncate", blobtest.Fault{Truncate: true, At: 799}, want[100:899], nil},
		{"flip", blobtest.Fault{Flip: 0x80, At: 7}, flipped, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := blobtest.NewMemory()
			desc := m.Add(want)
			src := blobtest.Inject(m, func(c blobtest.Call) blobtest.Fault {
				if c.N > 1 {
					return blobtest.Fault{}
				}
				return tt.fault
			})
			got, err := readAll(t.Context(), src, desc, 100, 800)
			if !bytes.Equal(got, tt.want) || !errors.Is(err, tt.err) {
				t.Errorf("got %d bytes, error %v; want %d bytes, error %v", len(got), err, len(tt.want), tt.err)
			}
			if got, err := readAll(t.Context(), src, desc, 100, 800); err != nil || !bytes.Equal(got, want[100:900]) {
				t.Errorf("second call: %d bytes, error %v", len(got), err)
			}
		})
	}
}

func TestInjectStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := blobtest.NewMemory()
		desc := m.Add(blobtest.Bytes(1000, 1))
		src := blobtest.Inject(m, func(blobtest.Call) blobtest.Fault { return blobtest.Fault{Stall: true, At: 5} })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			_, err := readAll(ctx, src, desc, 0, 1000)
			done <- err
		}()
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("did not stall: %v", err)
		default:
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("error = %v", err)
		}
	})
}

func readAll(ctx context.Context, src blob.Source, desc blob.Descriptor, offset, length int64) ([]byte, error) {
	rc, err := src.Open(ctx, desc, offset, length)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}
