// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
)

var errDown = errors.New("connection refused")

// down is a source that refuses until it is time, counted from now.
func down(m made, until time.Duration) *watched {
	back := time.Now().Add(until)
	return watch(blobtest.Inject(blobtest.NewMemory(m.blob), func(blobtest.Call) blobtest.Fault {
		if time.Now().Before(back) {
			return blobtest.Fault{OpenErr: blob.Temporary(errDown)}
		}
		return blobtest.Fault{}
	}))
}

// refusing is a source that always gives the same error.
func refusing(m made, name string, err error) *watched {
	return watch(named{faults(blobtest.NewMemory(m.blob), blobtest.Fault{OpenErr: err}), name})
}

// slow is a source that sends so many bytes, then pauses for so long.
type slow struct {
	blob.Source
	bytes int
	pause time.Duration
}

func (s slow) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	body, err := s.Source.Open(ctx, desc, offset, length)
	return &slowBody{body, ctx, s}, err
}

type slowBody struct {
	io.ReadCloser
	ctx context.Context
	slow
}

func (b *slowBody) Read(p []byte) (int, error) {
	select {
	case <-time.After(b.pause):
		return b.ReadCloser.Read(p[:min(len(p), b.bytes)])
	case <-b.ctx.Done():
		return 0, b.ctx.Err()
	}
}

// took runs f and returns how long that took.
func took(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

func within(t *testing.T, what string, got, from, to time.Duration) {
	t.Helper()
	if got < from || got > to {
		t.Errorf("%s after %s, want %s to %s", what, got, from, to)
	}
}

func TestAReadOutlastsAnOutage(t *testing.T) {
	m := chunked(t, 3)
	for _, sources := range []int{1, 2} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, m, rigOptions{})
			for _, name := range []string{"a", "b"}[:sources] {
				r.AddSources([]blob.Source{named{down(m, time.Minute), name}})
			}
			within(t, "read", took(func() {
				if err := r.check(t.Context(), base, 10); err != nil {
					t.Error(err)
				}
			}), time.Minute, time.Minute+10*time.Second)
			synctest.Wait()
			if s := r.Stats(); s.Failures < 6 || s.LastError != "" || len(s.Troubles) != sources-1 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// What a reader is told, and status, when its time is up.
func TestAReadersTimeIsUp(t *testing.T) {
	m := chunked(t, 3)
	synctest.Test(t, func(t *testing.T) {
		src := down(m, time.Hour)
		r := newRig(t, m, rigOptions{}, named{src, "quay.io/x"})
		start, patience := time.Now(), errors.New("no answer in time")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, patience)
		defer cancel()
		err := r.wait(ctx, base, 10)
		within(t, "error", time.Since(start), time.Minute, time.Minute)
		if !errors.Is(err, patience) || !errors.Is(err, errDown) || !strings.Contains(err.Error(), "quay.io/x") {
			t.Errorf("error %v", err)
		}
		s := r.Stats()
		if len(s.Troubles) != 1 || s.LastError != err.Error() {
			t.Fatalf("stats %+v", s)
		}
		if w := s.Troubles[0]; w.Source != "quay.io/x" || !strings.Contains(w.Error, errDown.Error()) || !w.Since.Equal(start) || w.Failures != len(src.seen()) {
			t.Errorf("trouble %+v", w)
		}
		// Nobody waits: nobody asks.
		asked := len(src.seen())
		time.Sleep(10 * time.Minute)
		if n := len(src.seen()); n != asked || r.waiting() != 0 {
			t.Errorf("%d requests for nobody", n-asked)
		}
		time.Sleep(time.Hour)
		if err := r.check(t.Context(), base, 10); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		synctest.Wait()
		if s := r.Stats(); s.LastError != "" || s.Troubles != nil {
			t.Errorf("stats %+v", s)
		}
	})
}

func TestWhatNobodyWaitsForIsTriedOnce(t *testing.T) {
	m := chunked(t, 3)
	synctest.Test(t, func(t *testing.T) {
		src := down(m, time.Hour)
		r := newRig(t, m, rigOptions{}, src)
		within(t, "prefetch", took(func() {
			if err := r.PrefetchBlob(t.Context(), int64(len(m.blob)), Fill); !errors.Is(err, errDown) {
				t.Errorf("error %v", err)
			}
		}), 0, 0)
		if n := len(src.seen()); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

func TestPermanentErrorsEndARead(t *testing.T) {
	m := chunked(t, 3)
	for _, last := range []error{blob.ErrNotFound, blob.ErrUnauthorized, blob.ErrNoRange} {
		synctest.Test(t, func(t *testing.T) {
			a, b := refusing(m, "a", blob.ErrNotFound), refusing(m, "b", last)
			r := newRig(t, m, rigOptions{}, a, b)
			for n := 1; n < 3; n++ { // the next read tries again
				within(t, "error", took(func() {
					if err := r.wait(t.Context(), base, 10); !errors.Is(err, blob.ErrNotFound) || !errors.Is(err, last) {
						t.Errorf("error %v", err)
					}
				}), 0, 0)
				if len(a.seen()) != n || len(b.seen()) != n {
					t.Errorf("%d and %d requests, want %d", len(a.seen()), len(b.seen()), n)
				}
			}
		})
	}
}

// A source that is added during an outage ends it.
func TestABetterSourceComes(t *testing.T) {
	m := chunked(t, 3)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, m, rigOptions{}, named{down(m, time.Hour), "a"}, refusing(m, "b", blob.ErrNotFound))
		time.AfterFunc(30*time.Second, func() { r.AddSources([]blob.Source{blobtest.NewMemory(m.blob)}) })
		within(t, "read", took(func() {
			if err := r.check(t.Context(), base, 10); err != nil {
				t.Error(err)
			}
		}), 30*time.Second, 40*time.Second)
	})
}

// One source has only wrong bytes, the other is away: the read waits for it.
func TestCorruptAndAway(t *testing.T) {
	m := chunked(t, 1)
	synctest.Test(t, func(t *testing.T) {
		bad := watch(named{flip(m, firstChunk), "bad"})
		r := newRig(t, m, rigOptions{}, bad, named{down(m, 30*time.Second), "away"})
		if err := r.check(t.Context(), base, 10); err != nil {
			t.Error(err)
		}
		if n := len(bad.seen()); n != fetchRounds {
			t.Errorf("the bad source was asked %d times", n)
		}
	})
}

func TestASourceThatDrips(t *testing.T) {
	m := chunked(t, 1)
	for _, c := range []struct {
		name    string
		slow    slow
		other   bool          // stands by
		at      time.Duration // when the bytes are there
		request int           // to the slow source
	}{
		{"beside another", slow{bytes: 1, pause: 3 * time.Second}, true, DefaultPatience / 3, 1},
		{"alone", slow{bytes: 1, pause: 3 * time.Second}, false, DefaultPatience / 2, 2},
		{"stalls", slow{pause: time.Hour}, true, DefaultPatience / 3, 1},
		{"slow, but in time", slow{bytes: 1000, pause: 2900 * time.Millisecond}, true, 100 * time.Second, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c.slow.Source = named{blobtest.NewMemory(m.blob), "slow"}
				src := watch(c.slow)
				second := watch(named{blobtest.NewMemory(m.blob), "other"})
				r := newRig(t, m, rigOptions{}, &firstCalls{src, 1, second})
				if c.other {
					r.setSources([]blob.Source{src, second})
				}
				ctx, cancel := context.WithTimeout(t.Context(), DefaultPatience)
				defer cancel()
				within(t, "read", took(func() {
					if err := r.check(ctx, base, 10); err != nil {
						t.Error(err)
					}
				}), c.at, c.at+5*time.Second)
				if n := len(src.seen()) + len(second.seen()); n != map[bool]int{true: 1, false: 2}[c.at == 100*time.Second] {
					t.Errorf("%d requests", n)
				}
			})
		})
	}
}

// firstCalls is one source for the first calls and then another.
type firstCalls struct {
	*watched
	n    int
	then blob.Source
}

func (f *firstCalls) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if len(f.seen()) < f.n {
		return f.watched.Open(ctx, desc, offset, length)
	}
	return f.then.Open(ctx, desc, offset, length)
}

// A chunk that takes long in all is fine as long as each in time.
func TestPaceCountsByChunk(t *testing.T) {
	m := chunked(t, 8)
	synctest.Test(t, func(t *testing.T) {
		src := watch(slow{named{blobtest.NewMemory(m.blob), "slow"}, 1000, time.Second}) // half a minute a chunk
		other := refusing(m, "other", blob.ErrNotFound)
		r := newRig(t, m, rigOptions{}, src, other)
		if err := r.check(t.Context(), base, 8*chunkSize); err != nil {
			t.Error(err)
		}
		if len(src.seen()) != 1 || len(other.seen()) != 0 {
			t.Errorf("%d and %d requests", len(src.seen()), len(other.seen()))
		}
	})
}

// Only the time in which the source is waited for counts.
func TestPaceDoesNotCountOthersTime(t *testing.T) {
	m := chunked(t, 1)
	synctest.Test(t, func(t *testing.T) {
		src := &paced{
			Source:   slow{blobtest.NewMemory(m.blob), 20_000, time.Second},
			patience: time.Minute, check: 10 * time.Second, ends: []int64{int64(len(m.blob))},
		}
		body, err := src.Open(t.Context(), blobtest.Memory{}.Add(m.blob), 0, int64(len(m.blob)))
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
		for err == nil {
			time.Sleep(time.Minute)
			_, err = body.Read(make([]byte, 1<<20))
		}
		if !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
}

// The first look may come before Open has gone on: in real time, since a bubble
// has no such moments.
func TestPaceIsLookedAtFromTheStart(t *testing.T) {
	data := []byte("some bytes")
	src := &paced{Source: blobtest.NewMemory(data), patience: time.Hour, check: 1}
	for range 5000 {
		body, err := src.Open(t.Context(), blobtest.Memory{}.Add(data), 0, int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(body); err != nil || string(got) != string(data) {
			t.Fatalf("got %q, error %v", got, err)
		}
		body.Close()
	}
}
