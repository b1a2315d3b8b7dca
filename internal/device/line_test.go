// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/index"
)

// line is a line between registries and this node, in a bubble of synctest: time
// passes on it and nowhere else.
type line struct {
	rtt    time.Duration
	rate   int64 // bytes a second, all connections together
	window int   // bytes of a connection that come without being read

	mu    sync.Mutex // protects the field below
	clear time.Time  // when all that has been put on the line has left it
}

// fast is what the bars are about: 1 Gbit/s, and 20 ms.
func fast() *line { return &line{rtt: 20 * time.Millisecond, rate: 125_000_000, window: 1 << 20} }

// carries is how long the line takes for so many bytes.
func (l *line) carries(n int64) time.Duration {
	return time.Duration(float64(n) / float64(l.rate) * float64(time.Second))
}

// put puts bytes on the line and returns when they have left it.
func (l *line) put(n int) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); l.clear.Before(now) {
		l.clear = now
	}
	l.clear = l.clear.Add(l.carries(int64(n)))
	return l.clear
}

// source is a registry at the other end.
func (l *line) source(data []byte) blob.Source { return remote{blobtest.NewMemory(data), l} }

type remote struct {
	blob.Source
	line *line
}

const segment = 16 << 10

func (r remote) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if err := sleep(ctx, r.line.rtt); err != nil {
		return nil, err
	}
	body, err := r.Source.Open(ctx, desc, offset, length)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	a := &arriving{segments: make(chan []byte, r.line.window/segment), cancel: cancel, ctx: ctx}
	a.pump.Go(func() {
		defer close(a.segments)
		for {
			p := make([]byte, segment)
			n, err := io.ReadFull(body, p)
			if n == 0 && err != nil || sleep(ctx, time.Until(r.line.put(n))) != nil {
				return
			}
			select {
			case a.segments <- p[:n]:
			case <-ctx.Done():
				return
			}
		}
	})
	return a, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// arriving is a body on its way.
type arriving struct {
	segments chan []byte
	rest     []byte
	ctx      context.Context
	cancel   func()
	pump     sync.WaitGroup
}

func (a *arriving) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		next, ok := <-a.segments
		if !ok && a.ctx.Err() != nil {
			return 0, a.ctx.Err()
		}
		if !ok {
			return 0, io.EOF
		}
		a.rest = next
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

func (a *arriving) Close() error {
	a.cancel()
	a.pump.Wait()
	return nil
}

// fetchInOrder fetches what lies in ranges.
func (r *rig) fetchInOrder(ctx context.Context, ranges []blob.Range) error {
	var wants []Want
	for _, x := range ranges {
		wants = append(wants, Want{r.Device, x})
	}
	return FetchInOrder(ctx, wants, Profile)
}

// stored is a layer of n files of a chunk each, uncompressed: it takes the line's
// time and nothing else.
func stored(n int) made {
	const apart = chunkSize + index.BlockSize
	m := made{blob: make([]byte, n*chunkSize), device: make([]byte, n*apart), index: &index.Index{DeviceSize: int64(n) * apart}}
	_, _ = rand.NewChaCha8([32]byte{}).Read(m.blob) // never fails
	for i := range n {
		content := m.blob[i*chunkSize:][:chunkSize]
		copy(m.device[i*apart:], content)
		m.index.Chunks = append(m.index.Chunks, index.Chunk{
			Offset: int64(i) * apart, Size: chunkSize, BlobOffset: int64(i) * chunkSize, BlobSize: chunkSize, Digest: sha256.Sum256(content),
		})
	}
	return m
}

// started is what a workload took that jumps around in a layer of 640 chunks, in
// clusters of which it skips a fifth, and computes for half a millisecond in
// between.
type started struct {
	took     time.Duration
	requests int
	fetched  int64
}

// ahead is when what a workload wants is fetched for it.
type ahead int

const (
	never ahead = iota
	before
	meanwhile
)

func (m made) start(t *testing.T, order []int, when ahead) (s started) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		src := watch(fast().source(m.blob))
		r := newRig(t, m, rigOptions{}, src)
		var g errgroup.Group
		fetch := func() error { return r.fetchInOrder(t.Context(), m.bytesOf(order...)) }
		switch when {
		case before:
			if err := fetch(); err != nil {
				t.Fatal(err)
			}
		case meanwhile:
			g.Go(fetch)
		}
		begin := time.Now()
		for _, i := range order {
			if err := r.check(t.Context(), m.index.Chunks[i].Offset, chunkSize); err != nil {
				t.Fatal(err)
			}
			time.Sleep(500 * time.Microsecond)
		}
		s = started{time.Since(begin), len(src.seen()), r.Stats().Fetched}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		r.quiet(t)
	})
	return s
}

// What a profile names is ready in little more than a warm start and the time of
// the line for its bytes.
func TestStartByProfile(t *testing.T) {
	const chunks = 640
	m := stored(chunks)
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // no secret
	var order []int
	var bytes int64
	for _, c := range random.Perm(chunks / 10)[:40] {
		for _, k := range random.Perm(10)[:8] {
			i := c*10 + k
			order, bytes = append(order, i), bytes+m.index.Chunks[i].BlobSize
		}
	}
	warm, cold, guided := m.start(t, order, before), m.start(t, order, never), m.start(t, order, meanwhile)
	line := fast().carries(bytes)
	t.Logf("%d bytes, %s of the line: warm %v, cold %v, by profile %v", bytes, line, warm, cold, guided)
	if bar := warm.took*14/10 + line; guided.took > bar {
		t.Errorf("started in %s, the bar is %s", guided.took, bar)
	}
	if guided.requests > cold.requests || guided.fetched > bytes*3/2 {
		t.Errorf("%d requests, without a profile %d; %d bytes for %d", guided.requests, cold.requests, guided.fetched, bytes)
	}
}

// twoImages are devices of two images that share a line of 20 ms and 1 Gbit/s, and
// all chunks of either.
func twoImages(t *testing.T, m made) (a, b *rig, all []blob.Range) {
	t.Helper()
	l, sched := fast(), NewScheduler(8)
	a, b = newRig(t, m, rigOptions{sched: sched}, l.source(m.blob)), newRig(t, m, rigOptions{sched: sched}, l.source(m.blob))
	for i := range m.index.Chunks {
		all = append(all, m.frame(0, i).Range)
	}
	return a, b, all
}

// A read that somebody waits for is not held up by what another image's profile
// says, and does not hold that up for longer than its bytes come.
func TestReaderBesideAnotherImagesProfile(t *testing.T) {
	const chunks, reads = 600, 40
	m := stored(chunks)
	read := func(t *testing.T, r *rig) (took time.Duration) {
		for i := range reads {
			begin := time.Now()
			c := m.index.Chunks[i*111%chunks]
			if err := r.check(t.Context(), c.Offset, 1); err != nil {
				t.Fatal(err)
			}
			took += time.Since(begin)
		}
		return took / reads
	}
	var alone, beside, fetch, fetchBeside time.Duration
	synctest.Test(t, func(t *testing.T) {
		a, b, all := twoImages(t, m)
		alone = read(t, b)
		b.quiet(t)
		begin := time.Now()
		if err := a.fetchInOrder(t.Context(), all); err != nil {
			t.Error(err)
		}
		fetch = time.Since(begin)
	})
	synctest.Test(t, func(t *testing.T) {
		a, b, all := twoImages(t, m)
		done := make(chan error)
		begin := time.Now()
		go func() {
			err := a.fetchInOrder(t.Context(), all)
			fetchBeside = time.Since(begin)
			done <- err
		}()
		time.Sleep(50 * time.Millisecond)
		beside = read(t, b)
		if err := <-done; err != nil {
			t.Error(err)
		}
		b.quiet(t)
	})
	t.Logf("a read takes %s alone and %s beside a profile, which takes %s alone and %s beside the reads", alone, beside, fetch, fetchBeside)
	if beside > alone*5/4 {
		t.Errorf("a read takes %s beside a profile, and %s alone", beside, alone)
	}
	if fetchBeside > fetch*2 {
		t.Errorf("fetching by a profile takes %s beside reads that wait for answers most of the time, and %s alone", fetchBeside, fetch)
	}
}

// Two images that are fetched by their profiles share the line, whoever came first.
func TestProfilesSideBySide(t *testing.T) {
	m := stored(900)
	synctest.Test(t, func(t *testing.T) {
		a, b, all := twoImages(t, m)
		var g errgroup.Group
		g.Go(func() error { return a.fetchInOrder(t.Context(), all) })
		time.Sleep(60 * time.Millisecond)
		g.Go(func() error { return b.fetchInOrder(t.Context(), all) })
		before := a.Stats().Present
		time.Sleep(200 * time.Millisecond)
		gotA, gotB := a.Stats().Present-before, b.Stats().Present
		if gotA < gotB/2 || gotB < gotA/2 || gotA+gotB < 250 {
			t.Errorf("in the same time one got %d chunks, the other %d", gotA, gotB)
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
}
