// SPDX-License-Identifier: Apache-2.0

package fill

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/estargz"
	"github.com/holdfast/holdfast/internal/index/zstdchunked"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/layer/layertest"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/testimage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a node that fills layers.
type rig struct {
	*Filler
	t        *testing.T
	dir      string
	mounter  *mount.Mounter
	exporter *layertest.Exporter
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir()}
	r.mounter, r.exporter = layertest.Start(t, r.dir)
	r.open()
	t.Cleanup(r.close)
	return r
}

func (r *rig) open() {
	r.t.Helper()
	sched := device.NewScheduler(4)
	set, err := layer.NewSet(layer.Config{
		Root: filepath.Join(r.dir, "layers"), Mounts: filepath.Join(r.dir, "mounts"),
		Exporter: r.exporter, Scheduler: sched, Logger: slog.New(slog.DiscardHandler),
	})
	if err == nil {
		err = errors.Join(set.Open(r.t.Context()), set.Export(), set.Mount(r.t.Context(), r.mounter))
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.Filler = New(Config{Layers: set, Scheduler: sched, Logger: slog.New(slog.DiscardHandler)})
}

func (r *rig) close() {
	if err := errors.Join(r.Layers.Unmount(), r.Layers.Close()); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) reopen() { r.close(); r.open() }

// add adds a lazy layer that is said to be like stated, with the index of shown.
func (r *rig) add(shown, stated testimage.Layer, sources ...blob.Source) *layer.Layer {
	r.t.Helper()
	desc := blob.Descriptor{Digest: shown.Descriptor.Digest, Size: shown.Descriptor.Size}
	src := blobtest.NewMemory(shown.Bytes)
	idx, err := estargz.Open(r.t.Context(), src, desc, shown.Descriptor.Annotations)
	if errors.Is(err, index.ErrNoIndex) {
		idx, err = zstdchunked.Open(r.t.Context(), src, desc, shown.Descriptor.Annotations)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	st, err := r.Layers.Stage(stated.Descriptor.Digest)
	if err != nil {
		r.t.Fatal(err)
	}
	l, err := st.Commit(r.t.Context(), layer.Meta{
		Digest: stated.Descriptor.Digest, Size: stated.Descriptor.Size, DiffID: stated.DiffID, BlobCompression: index.Gzip,
	}, idx, false)
	if err != nil {
		r.t.Fatal(err)
	}
	l.Device().AddSources(sources)
	return l
}

// fillAll fills a layer the way Run does, until nothing is to be done.
func (r *rig) fillOnce(l *layer.Layer) error {
	r.t.Helper()
	r.Want([]digest.Digest{l.Digest})
	got, _, _ := r.take(time.Now().Add(time.Hour))
	if got != l {
		r.t.Fatal("there is nothing to do")
	}
	err := r.fill(r.t.Context(), l)
	r.done(r.t.Context(), l, err)
	return err
}

func convert(t *testing.T, plain []byte, f testimage.Format) testimage.Layer {
	t.Helper()
	l, err := testimage.ConvertBytes(t.Context(), plain, f, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func plain(mode int64, seed uint64) []byte {
	return testimage.Tar(
		testimage.File{Header: tar.Header{Name: "d", Typeflag: tar.TypeDir}},
		testimage.File{Header: tar.Header{Name: "d/small", Mode: mode}, Content: testimage.Bytes(100, 1)},
		testimage.File{Header: tar.Header{Name: "d/large"}, Content: testimage.Bytes(300_000, seed)},
	)
}

// TestVerified fills layers of every format whose index comes with them, with
// everything that may be in a layer.
func TestVerified(t *testing.T) {
	for _, format := range []testimage.Format{testimage.EStargz, testimage.ZstdChunked, testimage.ZstdChunkedStargz} {
		t.Run(string(format), func(t *testing.T) {
			r := newRig(t)
			for _, c := range testimage.Corpus() {
				if !contains(c.Formats, format) || c.RawNames {
					continue
				}
				content := convert(t, c.Tar, format)
				l := r.add(content, content, blobtest.NewMemory(content.Bytes))
				if err := r.fillOnce(l); err != nil {
					t.Fatalf("%s: %v", c.Name, err)
				}
				if v := l.Verdict(); v != (layer.Verdict{Verified: true}) || !l.Complete() {
					t.Errorf("%s: verdict %+v, complete %v", c.Name, v, l.Complete())
				}
			}
		})
	}
}

func contains(all []testimage.Format, f testimage.Format) bool {
	for _, g := range all {
		if f == g {
			return true
		}
	}
	return false
}

// TestFilledNeedsNobody reads a filled layer after a start, with no source and
// with no FUSE.
func TestFilledNeedsNobody(t *testing.T) {
	r := newRig(t)
	p := plain(0o644, 2)
	content := convert(t, p, testimage.EStargz)
	l := r.add(content, content, blobtest.NewMemory(content.Bytes))
	if err := r.fillOnce(l); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	l, _ = r.Layers.Get(content.Descriptor.Digest)
	if !l.Verdict().Verified {
		t.Error("the verdict is lost")
	}
	r.exporter.Withdraw(l.Digest)
	if diff := layertest.Compare(filepath.Join(l.MountDirectory(), "diff"), p); diff != "" {
		t.Error(diff)
	}
	if r.todo(l.Digest) != nil {
		t.Error("it is to be filled again")
	}
}

// TestQuarantine fills layers that are not what they are said to be.
func TestQuarantine(t *testing.T) {
	truth := convert(t, plain(0o644, 2), testimage.EStargz)
	// These tell nothing of their index in their tar.
	chunked := convert(t, plain(0o644, 2), testimage.ZstdChunked)
	otherMode := convert(t, plain(0o4755, 2), testimage.ZstdChunked)
	otherContent := convert(t, plain(0o644, 3), testimage.EStargz)
	otherTree := convert(t, testimage.Tar(
		testimage.File{Header: tar.Header{Name: "d", Typeflag: tar.TypeDir}},
		testimage.File{Header: tar.Header{Name: "d/renamed"}, Content: testimage.Bytes(100, 1)},
		testimage.File{Header: tar.Header{Name: "d/large"}, Content: testimage.Bytes(300_000, 2)},
	), testimage.ZstdChunked)
	otherDiffID := truth
	otherDiffID.DiffID = digest.FromString("another tar")
	noTar := []byte(strings.Repeat("this is no tar, but it has its digest. ", 100))
	broken := truth
	broken.Descriptor.Digest, broken.Descriptor.Size = digest.FromBytes(noTar), int64(len(noTar))
	broken.Bytes = noTar
	for _, tt := range []struct {
		name          string
		shown, stated testimage.Layer
		want          string
	}{
		{"mode", otherMode, chunked, `mode of "d/small"`},
		{"name", otherTree, chunked, `only one of them has`},
		{"content", otherContent, truth, "its index does not fit its content"},
		{"diff ID", truth, otherDiffID, "the image states"},
		{"no tar", truth, broken, "a normal pull could not extract it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			l := r.add(tt.shown, tt.stated, blobtest.NewMemory(tt.stated.Bytes))
			if err := r.fillOnce(l); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if v := l.Verdict(); v.Verified || !strings.Contains(v.Quarantined, tt.want) {
					t.Errorf("verdict %+v, want %q", v, tt.want)
				}
				if _, err := os.ReadFile(filepath.Join(l.MountDirectory(), "diff/d/large")); !errors.Is(err, unix.EIO) {
					t.Errorf("reading it: %v", err)
				}
				if r.todo(l.Digest) != nil {
					t.Error("it is to be filled again")
				}
				r.reopen() // a quarantine lasts
				l, _ = r.Layers.Get(l.Digest)
			}
		})
	}
}

// flipped is a source of the same blob with a byte changed.
func flipped(l testimage.Layer) blob.Source {
	return named{blobtest.Inject(blobtest.NewMemory(l.Bytes), func(blobtest.Call) blobtest.Fault {
		return blobtest.Fault{At: l.Descriptor.Size / 2, Flip: 1}
	}), "flipped"}
}

type named struct {
	blob.Source
	name string
}

func (n named) String() string { return n.name }

// TestSourceLies: a source that sends other bytes is not the layer's fault.
func TestSourceLies(t *testing.T) {
	content := convert(t, plain(0o644, 2), testimage.EStargz)
	r := newRig(t)
	l := r.add(content, content, flipped(content), blobtest.NewMemory(content.Bytes))
	if err := r.fillOnce(l); err != nil || !l.Verdict().Verified {
		t.Fatalf("verdict %+v, %v", l.Verdict(), err)
	}
	if diff := layertest.Compare(filepath.Join(l.MountDirectory(), "diff"), plain(0o644, 2)); diff != "" {
		t.Error(diff)
	}
}

func TestAllSourcesLie(t *testing.T) {
	content := convert(t, plain(0o644, 2), testimage.EStargz)
	r := newRig(t)
	l := r.add(content, content, flipped(content))
	for range maxLies - 1 {
		if err := r.fillOnce(l); !errors.Is(err, errLie) {
			t.Fatalf("got %v", err)
		}
		if v := l.Verdict(); v != (layer.Verdict{}) {
			t.Fatalf("verdict %+v", v)
		}
		if s := r.State(l.Digest); !strings.HasPrefix(s, "waiting: from flipped") {
			t.Errorf("state %q", s)
		}
	}
	if err := r.fillOnce(l); err != nil || l.Verdict().Quarantined == "" {
		t.Errorf("verdict %+v, %v", l.Verdict(), err)
	}
}

// TestSourceFails: nothing is concluded from a source that does not answer.
func TestSourceFails(t *testing.T) {
	content := convert(t, plain(0o644, 2), testimage.EStargz)
	for name, fault := range map[string]blobtest.Fault{
		"refuses": {OpenErr: blob.ErrUnauthorized},
		"breaks":  {At: 1000, ReadErr: blob.Temporary(io.ErrUnexpectedEOF)},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			l := r.add(content, content, blobtest.Inject(blobtest.NewMemory(content.Bytes), func(blobtest.Call) blobtest.Fault { return fault }))
			for range maxLies + 1 {
				if err := r.fillOnce(l); err == nil {
					t.Fatal("it succeeded")
				}
			}
			if l.Verdict() != (layer.Verdict{}) {
				t.Errorf("verdict %+v", l.Verdict())
			}
		})
	}
}

// TestRun fills what is wanted, and nothing else, at a rate.
func TestRun(t *testing.T) {
	r := newRig(t)
	r.Filler = New(Config{Layers: r.Layers, Scheduler: r.Scheduler, Rate: 100 << 20, Logger: r.Logger})
	var all []*layer.Layer
	for i := range uint64(3) {
		content := convert(t, plain(0o644, 10+i), testimage.EStargz)
		all = append(all, r.add(content, content, blobtest.NewMemory(content.Bytes)))
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.Want([]digest.Digest{all[2].Digest, all[0].Digest})
	for start := time.Now(); !all[0].Verdict().Verified || !all[2].Verdict().Verified; {
		if time.Since(start) > 20*time.Second {
			t.Fatal("they are not filled")
		}
		time.Sleep(5 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if v := all[1].Verdict(); v.Verified {
		t.Error("a layer was filled that nobody wants")
	}
}
