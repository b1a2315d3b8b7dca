// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
	"github.com/holdfast/holdfast/test/lab"
)

// file is a file of the layer that is read.
type file struct {
	name string
	size int
	seed uint64
}

func (f file) content() []byte { return testimage.Bytes(f.size, f.seed) }

// files are of all sizes that matter: within a chunk, of several, and many small
// ones in a frame's neighbourhood.
func files() []file {
	var all []file
	for i := range 120 {
		size := 3_000 + i*i*41
		switch {
		case i%20 == 0:
			size = 9<<20 + i
		case i%5 == 0:
			size = 1<<20 + i
		}
		all = append(all, file{fmt.Sprintf("f%03d", i), size, uint64(i)}) //nolint:gosec // small
	}
	return all
}

// stand is a daemon with one lazy layer, and readers of it.
type stand struct {
	t        *testing.T
	registry *testregistry.Server
	daemon   *lab.Daemon
	files    []file
	tree     string
	dir      string
}

func newStand(t *testing.T, settings string) *stand {
	t.Helper()
	s := &stand{t: t, files: files(), dir: t.TempDir()}
	var parts []testimage.File
	for _, f := range s.files {
		parts = append(parts, testimage.File{Header: tar.Header{Name: f.name}, Content: f.content()})
	}
	l, err := testimage.ConvertBytes(t.Context(), testimage.Tar(parts...), testimage.EStargz, testimage.Options{})
	s.must(err)
	top, err := testimage.ConvertBytes(t.Context(), testimage.Tar(testimage.File{Header: tar.Header{Name: "top"}, Content: []byte("x")}), testimage.EStargz, testimage.Options{})
	s.must(err)
	s.registry, err = testregistry.Start(testregistry.Options{})
	s.must(err)
	t.Cleanup(func() { _ = s.registry.Close() })
	_, err = testimage.Image{Layers: []testimage.Layer{l, top}, Cmd: []string{"/f000"}}.PushTo(s.registry, "soak", "latest")
	s.must(err)
	conf := filepath.Join(s.dir, "registries.conf")
	s.must(os.WriteFile(conf, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", s.registry.Host()), 0o600))
	settings += fmt.Sprintf("trusted = [%q]\nregistries_conf = %q\nruntime_roots = [%q]\n", s.registry.Host(), conf, filepath.Join(s.dir, "runtime"))
	s.daemon, err = lab.NewDaemon(programs[0], filepath.Join(s.dir, "daemon"), settings)
	s.must(err)
	s.must(s.daemon.Start(t.Context()))
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(s.daemon.LogFile())
			t.Logf("the end of the daemon's log:\n%s", log[max(0, len(log)-8000):])
		}
		if err := s.daemon.Close(); err != nil {
			t.Error(err)
		}
	})
	var res prepare.Result
	_, err = s.daemon.CLI(t.Context(), &res, "prepare", s.registry.Host()+"/soak:latest")
	s.must(err)
	if res.Lazy() != 1 {
		t.Fatalf("not lazy: %+v", res)
	}
	s.tree = s.daemon.LayerTree(l.Descriptor.Digest)
	return s
}

func (s *stand) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// load starts readers that read and compare until stop is called, which returns
// how many bytes they have compared. Any difference, and any error, fails the test.
func (s *stand) load(readers int) (compared *atomic.Int64, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	compared = &atomic.Int64{}
	var all sync.WaitGroup
	for i := range readers {
		random := rand.New(rand.NewPCG(1, uint64(i))) //nolint:gosec // a test
		all.Go(func() {
			for ctx.Err() == nil {
				f := s.files[random.IntN(len(s.files))]
				n, err := s.readFile(f, random)
				compared.Add(n)
				if err != nil {
					s.t.Errorf("reader %d: %v", i, err)
					return
				}
			}
		})
	}
	return compared, func() { cancel(); all.Wait() }
}

// readFile compares a file, or a part of it, without the page cache.
func (s *stand) readFile(f file, random *rand.Rand) (int64, error) {
	r, err := os.Open(filepath.Join(s.tree, f.name))
	if err != nil {
		return 0, err
	}
	defer r.Close() //nolint:errcheck // read only
	// What another reader is just reading stays; the rest is read anew.
	if err := unix.Fadvise(int(r.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return 0, err
	}
	off := random.IntN(f.size)
	if random.IntN(3) == 0 {
		off = 0
	}
	want := f.content()[off:]
	got := make([]byte, len(want))
	if _, err := io.ReadFull(io.NewSectionReader(r, int64(off), int64(len(want))), got); err != nil {
		return 0, fmt.Errorf("reading %s at %d: %w", f.name, off, err)
	}
	if !bytes.Equal(got, want) {
		return 0, fmt.Errorf("%s at %d: %w", f.name, off, errDiffers)
	}
	return int64(len(want)), nil
}

var errDiffers = errors.New("the bytes are not those of the image")

// footprint is what must not grow while workers come and go.
type footprint struct {
	mounts, keeperFDs, children int
}

func (s *stand) footprint() footprint {
	s.t.Helper()
	mounts, err := lab.MountsBelow(s.dir)
	s.must(err)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.daemon.Keeper()))
	s.must(err)
	children := 0
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.daemon.Keeper()))
	s.must(err)
	for _, l := range lists {
		data, err := os.ReadFile(l)
		s.must(err)
		children += len(bytes.Fields(data))
	}
	return footprint{len(mounts), len(fds), children}
}
