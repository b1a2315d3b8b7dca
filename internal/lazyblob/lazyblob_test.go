// SPDX-License-Identifier: Apache-2.0

package lazyblob_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/chunklist"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/layer/layertest"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/mount"
)

// size is that of the blobs: some chunks, and no whole number of blocks.
const size = 5*chunklist.ChunkSize + 12345

func content(seed byte) []byte {
	p := make([]byte, size)
	r := rand.NewChaCha8([32]byte{seed})
	_, _ = r.Read(p) // never fails
	return p
}

func descriptor(p []byte) blob.Descriptor {
	return blob.Descriptor{Digest: digest.FromBytes(p), Size: int64(len(p))}
}

func listOf(t testing.TB, p []byte) *chunklist.List {
	t.Helper()
	b := chunklist.NewBuilder()
	if _, err := b.Write(p); err != nil {
		t.Fatal(err)
	}
	l, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// bench is what a test's sets work with.
type bench struct {
	t        testing.TB
	dir      string
	exporter layertest.Blobs
	mounter  *mount.Mounter
	config   lazyblob.Config

	mu      sync.Mutex
	kept    []digest.Digest
	changes int
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir()}
	m, e := layertest.Start(t, b.dir)
	b.mounter, b.exporter = m, layertest.Blobs{Exporter: e}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	space := cache.NewSpace(0, log)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = space.Run(ctx) })
	t.Cleanup(func() { stop(); running.Wait() })
	b.config = lazyblob.Config{
		Root: filepath.Join(b.dir, "blobs"), Mounts: filepath.Join(b.dir, "mounts"), Exporter: b.exporter,
		Space: space, Scheduler: device.NewScheduler(8), Patience: 2 * time.Second, Logger: log,
		Keep: func(_ context.Context, l *chunklist.List) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.kept = append(b.kept, l.Blob)
			return nil
		},
		Changed: func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.changes++
		},
	}
	return b
}

// set returns a set, with what is on disk. close ends it as the end of a process does,
// or, with unmount, as a stop.
func (b *bench) set() (s *lazyblob.Set, end func(unmount bool)) {
	b.t.Helper()
	s, err := lazyblob.NewSet(b.config)
	if err == nil {
		err = s.Open(b.t.Context())
	}
	if err == nil {
		err = s.Mount(b.t.Context(), b.mounter)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	ended := false
	end = func(unmount bool) {
		if ended {
			return
		}
		ended = true
		var err error
		if unmount {
			err = s.Unmount()
		}
		for _, one := range s.All() {
			b.exporter.Withdraw(digest.FromString("blob " + one.Descriptor().Digest.String()))
		}
		if err := errors.Join(err, s.Close()); err != nil {
			b.t.Error(err)
		}
	}
	b.t.Cleanup(func() { end(true) })
	return s, end
}

// same checks that a blob reads as it should.
func (b *bench) same(path string, want []byte) {
	b.t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		b.t.Errorf("%s: %d bytes that are not the blob's %d, error %v", path, len(got), len(want), err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != int64(len(want)) || info.Mode().Perm()&0o444 != 0o444 {
		b.t.Errorf("%s: %v, error %v", path, info, err)
	}
}

// until waits for something that happens in the background.
func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatal(what + ": not yet")
		}
	}
}

func add(t testing.TB, s *lazyblob.Set, p []byte, list *lazyblob.Listing, sources ...blob.Source) *lazyblob.Blob {
	t.Helper()
	got, err := s.Add(t.Context(), descriptor(p), list, sources)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// With a chunk list a part is read, and no more than a part is fetched.
func TestListed(t *testing.T) {
	b := newBench(t)
	s, end := b.set()
	p := content(1)
	one := add(t, s, p, &lazyblob.Listing{List: listOf(t, p), Trust: index.Found}, blobtest.NewMemory(p))
	f, err := os.Open(one.Path())
	if err != nil {
		t.Fatal(err)
	}
	part := make([]byte, 100)
	if _, err := f.ReadAt(part, 3*chunklist.ChunkSize-50); err != nil || !bytes.Equal(part, p[3*chunklist.ChunkSize-50:][:100]) {
		t.Errorf("a part reads as %x, error %v", part, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if s := one.State(); s.Device == nil || s.Device.Present == 0 || s.Verified {
		t.Errorf("state %+v", s)
	}
	b.same(one.Path(), p)
	lazy := one.Path()
	if err := one.Fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	if one.Path() == lazy || !one.State().Verified {
		t.Errorf("complete, and still at %s", one.Path())
	}
	b.same(one.Path(), p)
	b.same(lazy, p) // who has it mounted goes on
	end(false)
	s, end = b.set()
	one, _ = s.Get(descriptor(p).Digest)
	if one == nil || !one.State().Verified {
		t.Fatal("a complete blob is not there after a restart")
	}
	b.same(one.Path(), p)
	b.same(lazy, p)
	direct := one.Path()
	end(true)
	// As after a boot: the mark that it may be mounted directly is of another one.
	if err := os.WriteFile(filepath.Join(filepath.Dir(direct), cache.FrozenName), []byte("another boot"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = b.set()
	if one, _ = s.Get(descriptor(p).Digest); one.Path() != direct {
		t.Errorf("after a boot a complete blob is at %s", one.Path())
	}
	b.same(direct, p)
}

// Without one, readers wait until all is here and has its digest.
func TestWhole(t *testing.T) {
	b := newBench(t)
	s, end := b.set()
	p := content(2)
	bad := lying{flipped(p)}
	one := add(t, s, p, nil, bad, blobtest.NewMemory(p))
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() { b.same(one.Path(), p) })
	}
	readers.Wait()
	b.until("kept", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.kept) == 1 && b.kept[0] == descriptor(p).Digest && b.changes > 0
	})
	if st := one.State(); !st.Verified || !st.Listed {
		t.Errorf("state %+v", st)
	}
	b.same(one.Path(), p)
	end(true)
	s, _ = b.set()
	one, _ = s.Get(descriptor(p).Digest)
	b.same(one.Path(), p)
}

// No source has the right bytes: readers get an error, nothing wrong, and nothing stays.
func TestWholeLies(t *testing.T) {
	b := newBench(t)
	s, _ := b.set()
	p := content(3)
	one := add(t, s, p, nil, lying{flipped(p)})
	if got, err := os.ReadFile(one.Path()); err == nil {
		t.Errorf("%d wrong bytes", len(got))
	}
	if st := one.State(); st.Error == "" || !strings.Contains(st.Error, "digest") || st.Verified {
		t.Errorf("state %+v", st)
	}
	one.AddSources([]blob.Source{blobtest.NewMemory(p)})
	b.same(one.Path(), p)
}

// A chunk list that was found is about other content: no reader gets any of it once that
// is known, and the blob is not offered.
func TestListLies(t *testing.T) {
	b := newBench(t)
	s, _ := b.set()
	p, other := content(4), content(5)
	list := listOf(t, other)
	list.Blob = descriptor(p).Digest
	one := add(t, s, p, &lazyblob.Listing{List: list}, lying{other}) // who lies in both
	if err := one.Fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	if one.Bad() == nil {
		t.Error("it counts as good")
	}
	if _, err := os.ReadFile(one.Path()); err == nil {
		t.Error("it can be read")
	}
	q := content(15)
	list = listOf(t, other)
	list.Blob = descriptor(q).Digest
	honest := add(t, s, q, &lazyblob.Listing{List: list}, blobtest.NewMemory(q))
	if _, err := os.ReadFile(honest.Path()); err == nil {
		t.Error("chunks that do not match can be read")
	}
}

// lying is a source that has other bytes than are asked for.
type lying struct{ p []byte }

func (l lying) Open(_ context.Context, _ blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.p[offset:][:length])), nil
}

func (lying) String() string { return "liar" }

func flipped(p []byte) []byte {
	q := bytes.Clone(p)
	q[len(q)/2] ^= 1
	return q
}

// The process ends in the middle of a fetch of the whole: the next one goes on.
func TestWholeResumes(t *testing.T) {
	b := newBench(t)
	p := content(6)
	s, end := b.set()
	release := make(chan struct{})
	one := add(t, s, p, nil, &halting{Source: blobtest.NewMemory(p), at: 3 << 20, until: release})
	go func() { _ = one.Fetch(context.Background()) }()
	b.until("three MiB are there", func() bool { return one.State().Local >= 3<<20 })
	end(false)
	close(release)
	// What was made durable is told by this file.
	if err := os.WriteFile(filepath.Join(b.config.Root, descriptor(p).Digest.Encoded(), "incoming.json"), []byte("2097152"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = b.set()
	one, _ = s.Get(descriptor(p).Digest)
	counting := &halting{Source: blobtest.NewMemory(p), at: size}
	one.AddSources([]blob.Source{counting})
	b.same(one.Path(), p)
	if counting.first.offset != 2<<20 { // it was asked first
		t.Errorf("it went on at %d", counting.first.offset)
	}
}

// halting is a source that stops in the middle.
type halting struct {
	blob.Source
	at    int64
	until chan struct{}

	first struct {
		once   sync.Once
		offset int64
	}
}

func (h *halting) Open(ctx context.Context, d blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	h.first.once.Do(func() { h.first.offset = offset })
	rc, err := h.Source.Open(ctx, d, offset, length)
	return &halted{ReadCloser: rc, h: h, ctx: ctx, at: offset}, err
}

type halted struct {
	io.ReadCloser
	h   *halting
	ctx context.Context //nolint:containedctx // of one stream
	at  int64
}

func (r *halted) Read(p []byte) (int, error) {
	if r.at >= r.h.at {
		select {
		case <-r.h.until:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
	n, err := r.ReadCloser.Read(p[:min(int64(len(p)), max(1, r.h.at-r.at))])
	r.at += int64(n)
	return n, err
}

// A blob without a list that is larger than what blobs may have.
func TestNoRoom(t *testing.T) {
	b := newBench(t)
	b.config.Space = cache.NewSpace(2<<20, b.config.Logger)
	s, _ := b.set()
	p := content(7)
	one := add(t, s, p, nil, blobtest.NewMemory(p))
	if err := one.Fetch(t.Context()); !errors.Is(err, lazyblob.ErrNoRoom) || !strings.Contains(err.Error(), "artifact_limit") {
		t.Errorf("error %v", err)
	}
	huge := descriptor(content(8))
	huge.Size = 1 << 50
	if _, err := s.Add(t.Context(), huge, nil, []blob.Source{blobtest.NewMemory(p)}); err == nil {
		one, _ := s.Get(huge.Digest)
		if err := one.Fetch(t.Context()); !errors.Is(err, lazyblob.ErrNoRoom) {
			t.Errorf("error %v", err)
		}
	}
}

func TestRemove(t *testing.T) {
	b := newBench(t)
	s, _ := b.set()
	p := content(9)
	one := add(t, s, p, &lazyblob.Listing{List: listOf(t, p)}, blobtest.NewMemory(p))
	file := filepath.Join(b.dir, "container")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := mount.Bind(one.Path(), file); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mount.Unbind(file) })
	if gone, err := s.Remove(one.Descriptor().Digest); gone || err != nil {
		t.Errorf("removed in use: %t, %v", gone, err)
	}
	b.same(file, p)
	if err := mount.Unbind(file); err != nil {
		t.Fatal(err)
	}
	if gone, err := s.Remove(one.Descriptor().Digest); !gone || err != nil {
		t.Errorf("removed: %t, %v", gone, err)
	}
	if left, err := os.ReadDir(b.config.Root); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestEmpty(t *testing.T) {
	b := newBench(t)
	s, _ := b.set()
	one := add(t, s, nil, nil, blobtest.NewMemory(nil))
	b.same(one.Path(), nil)
}
