// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/blob/retry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var policy = retry.Policy{Attempts: 4, Base: 100 * time.Millisecond, Max: 2 * time.Second}

func TestConformance(t *testing.T) {
	blobtest.Run(t, func(_ *testing.T, blobs map[digest.Digest][]byte) blob.Source {
		return retry.New(blobtest.Memory(blobs), policy)
	})
}

// Sources that fail all the time still deliver, and deliver the same bytes.
func TestConformanceOverBrokenSource(t *testing.T) {
	quick := retry.Policy{Attempts: 4, Base: time.Microsecond, Max: time.Microsecond}
	broken := blob.Temporary(errors.New("broken"))
	for name, script := range map[string]func(blobtest.Call) blobtest.Fault{
		"open": func(c blobtest.Call) blobtest.Fault { return faultIf(c.N%2 == 1, blobtest.Fault{OpenErr: broken}) },
		"read": func(c blobtest.Call) blobtest.Fault {
			return faultIf(c.N%3 != 0, blobtest.Fault{ReadErr: broken, At: c.Length / 3})
		},
		"truncate": func(c blobtest.Call) blobtest.Fault {
			return faultIf(c.N%3 != 0, blobtest.Fault{Truncate: true, At: c.Length / 2})
		},
	} {
		t.Run(name, func(t *testing.T) {
			// The tests of the suite that call concurrently see the faults in
			// any order, so every call has its own count.
			blobtest.Run(t, func(_ *testing.T, blobs map[digest.Digest][]byte) blob.Source {
				return perCall{blobtest.Memory(blobs), script, quick}
			})
		})
	}
}

// perCall wraps the source anew for every Open, so that faults count per call.
type perCall struct {
	blob.Source
	script func(blobtest.Call) blobtest.Fault
	policy retry.Policy
}

func (p perCall) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	return retry.New(blobtest.Inject(p.Source, p.script), p.policy).Open(ctx, desc, offset, length)
}

func faultIf(cond bool, f blobtest.Fault) blobtest.Fault {
	if cond {
		return f
	}
	return blobtest.Fault{}
}

// ask is one call the source below saw, and how long after the start.
type ask struct {
	Offset, Length int64
}

func TestRetries(t *testing.T) {
	data := blobtest.Bytes(1000, 1)
	temporary := blob.Temporary(errors.New("connection reset"))
	busy := func(d time.Duration) error { return &blob.TemporaryError{Err: errors.New("busy"), RetryAfter: d} }
	errLater := busy(time.Hour)
	permanent := fmt.Errorf("asking: %w", blob.ErrUnauthorized)

	tests := []struct {
		name       string
		faults     []blobtest.Fault // of the first calls
		wantErr    error
		want       []ask
		atLeast    time.Duration
		lessOrSame time.Duration
	}{
		{name: "no fault", want: []ask{{100, 800}}},
		{
			name:       "two refusals",
			faults:     []blobtest.Fault{{OpenErr: temporary}, {OpenErr: temporary}},
			want:       []ask{{100, 800}, {100, 800}, {100, 800}},
			lessOrSame: 300 * time.Millisecond,
		},
		{
			name:       "attempts used up",
			faults:     []blobtest.Fault{{OpenErr: temporary}, {OpenErr: temporary}, {OpenErr: temporary}, {OpenErr: temporary}},
			wantErr:    temporary,
			want:       []ask{{100, 800}, {100, 800}, {100, 800}, {100, 800}},
			lessOrSame: 700 * time.Millisecond,
		},
		{
			name:    "permanent",
			faults:  []blobtest.Fault{{OpenErr: permanent}},
			wantErr: blob.ErrUnauthorized,
			want:    []ask{{100, 800}},
		},
		{
			name:       "broken streams go on where they stopped",
			faults:     []blobtest.Fault{{ReadErr: temporary, At: 10}, {ReadErr: temporary}, {Truncate: true, At: 90}},
			want:       []ask{{100, 800}, {110, 790}, {110, 790}, {200, 700}},
			lessOrSame: 700 * time.Millisecond,
		},
		{
			name:    "permanent in the stream",
			faults:  []blobtest.Fault{{ReadErr: permanent, At: 10}},
			wantErr: blob.ErrUnauthorized,
			want:    []ask{{100, 800}},
		},
		{
			name:       "attempts used up by breaks",
			faults:     []blobtest.Fault{{ReadErr: temporary, At: 1}, {OpenErr: temporary}, {ReadErr: temporary, At: 1}, {ReadErr: temporary, At: 1}},
			wantErr:    temporary,
			want:       []ask{{100, 800}, {101, 799}, {101, 799}, {102, 798}},
			lessOrSame: 700 * time.Millisecond,
		},
		{
			name:       "retry after",
			faults:     []blobtest.Fault{{OpenErr: busy(time.Second)}},
			want:       []ask{{100, 800}, {100, 800}},
			atLeast:    time.Second,
			lessOrSame: time.Second,
		},
		{
			name:    "retry after much later",
			faults:  []blobtest.Fault{{OpenErr: errLater}},
			wantErr: errLater,
			want:    []ask{{100, 800}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := blobtest.NewMemory()
				desc := m.Add(data)
				var asked []ask
				src := retry.New(blobtest.Inject(m, func(c blobtest.Call) blobtest.Fault {
					asked = append(asked, ask{c.Offset, c.Length})
					if c.N > len(tt.faults) {
						return blobtest.Fault{}
					}
					return tt.faults[c.N-1]
				}), policy)

				start := time.Now()
				got, err := readAll(t.Context(), src, desc, 100, 800)
				took := time.Since(start)

				if !errors.Is(err, tt.wantErr) {
					t.Errorf("error = %v; want %v", err, tt.wantErr)
				}
				if !bytes.Equal(got, data[100:100+len(got)]) || err == nil && len(got) != 800 {
					t.Errorf("got %d bytes, not those of the blob", len(got))
				}
				if diff := cmp.Diff(tt.want, asked); diff != "" {
					t.Errorf("calls (-want +got):\n%s", diff)
				}
				if took < tt.atLeast || took > tt.lessOrSame {
					t.Errorf("took %v; want %v to %v", took, tt.atLeast, tt.lessOrSame)
				}
			})
		})
	}
}

// A stream that makes progress between breaks may break more often than a
// single range may fail.
func TestProgressRenewsAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := blobtest.NewMemory()
		data := blobtest.Bytes(10<<20, 1)
		desc := m.Add(data)
		calls := 0
		src := retry.New(blobtest.Inject(m, func(blobtest.Call) blobtest.Fault {
			calls++
			return blobtest.Fault{ReadErr: blob.Temporary(io.ErrUnexpectedEOF), At: 1 << 20}
		}), retry.Policy{Attempts: 2, Base: time.Second, Max: time.Second})
		got, err := readAll(t.Context(), src, desc, 0, desc.Size)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("got %d bytes, error %v", len(got), err)
		}
		if calls != 10 {
			t.Errorf("%d calls; want 10", calls)
		}
	})
}

func TestWaitEndsWithContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := retry.New(blobtest.Inject(blobtest.NewMemory(), func(blobtest.Call) blobtest.Fault {
			return blobtest.Fault{OpenErr: &blob.TemporaryError{Err: errors.New("busy"), RetryAfter: time.Second}}
		}), policy)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second/2, cancel)
		start := time.Now()
		_, err := src.Open(ctx, blob.Descriptor{Digest: "sha256:x", Size: 5}, 0, 5)
		if took := time.Since(start); took != time.Second/2 || !errors.Is(err, context.Canceled) || blob.IsTemporary(err) {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

// A wait that the deadline would interrupt is not worth beginning.
func TestNoWaitPastDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := &blob.TemporaryError{Err: errors.New("busy"), RetryAfter: time.Second}
		ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
		defer cancel()
		start := time.Now()
		err := retry.Do(ctx, policy, func(context.Context) error { return busy })
		if took := time.Since(start); took != 0 || !errors.Is(err, busy) {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

// Bytes that arrived are delivered before the wait for more of them.
func TestBytesAreNotHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := blobtest.NewMemory()
		desc := m.Add([]byte("some bytes"))
		src := retry.New(dataErrSource{blobtest.Inject(m, func(c blobtest.Call) blobtest.Fault {
			return faultIf(c.N == 1, blobtest.Fault{At: 4, ReadErr: &blob.TemporaryError{Err: errors.New("busy"), RetryAfter: time.Second}})
		})}, policy)
		rc, err := src.Open(t.Context(), desc, 0, desc.Size)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		start := time.Now()
		p := make([]byte, 10)
		n, err := rc.Read(p)
		if took := time.Since(start); n != 4 || err != nil || took != 0 {
			t.Errorf("first read = %d, %v after %v", n, err, took)
		}
		rest, err := io.ReadAll(rc)
		if took := time.Since(start); string(rest) != " bytes" || err != nil || took < time.Second {
			t.Errorf("rest = %q, %v after %v", rest, err, took)
		}
	})
}

// dataErrSource returns errors together with the last bytes before them.
type dataErrSource struct{ blob.Source }

func (s dataErrSource) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	rc, err := s.Source.Open(ctx, desc, offset, length)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{iotest.DataErrReader(rc), rc}, nil
}

func TestReadAfterClose(t *testing.T) {
	m := blobtest.NewMemory()
	desc := m.Add([]byte("some bytes"))
	rc, err := retry.New(m, policy).Open(t.Context(), desc, 0, desc.Size)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := rc.Close(); err != nil {
			t.Error(err)
		}
	}
	if n, err := rc.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("read after close = %d, %v", n, err)
	}
}

func readAll(ctx context.Context, src blob.Source, desc blob.Descriptor, offset, length int64) ([]byte, error) {
	rc, err := src.Open(ctx, desc, offset, length)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}
