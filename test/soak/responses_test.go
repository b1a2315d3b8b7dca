// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/blobtest"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/blob/retry"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/estargz"
	"github.com/holdfast/holdfast/internal/index/indextest"
	"github.com/holdfast/holdfast/internal/index/zstdchunked"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

const (
	wantFaulty    = 10_000
	probability   = 0.7 // of an answer to be faulty
	deviceReaders = 4   // of each device
	timeout       = 10 * time.Minute
	repository    = "team/app"
)

// layer is what is read, and what it has to be.
type layer struct {
	blob  []byte
	desc  blob.Descriptor
	table *index.Table
	want  []byte // the device
}

// counts is what has happened.
type counts struct{ passes, reads, failures atomic.Int64 }

// Whatever a registry answers, deviceReaders get the right bytes or an error, and the
// right bytes in the end: 10,000 answers that are corrupted, truncated, stalled or
// misranged, and errors on top, over HTTP/1.1 and HTTP/2.
func TestFaultyResponses(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	layers := []layer{makeLayer(t, testimage.EStargz), makeLayer(t, testimage.ZstdChunked)}
	random := testregistry.NewRandom(1, probability)
	faulty := func() (n int64) {
		for kind, c := range random.Counts() {
			switch kind {
			case "status", "reset", "dripping": // come on top: they hold no wrong bytes
			default:
				n += c
			}
		}
		return n
	}
	sources := startRegistries(t, random, layers)

	var did counts
	sched := device.NewScheduler(8)
	g, ctx := errgroup.WithContext(ctx)
	root := t.TempDir()
	for i := range 16 {
		g.Go(func() error {
			for faulty() < wantFaulty {
				dir, err := os.MkdirTemp(root, "")
				if err != nil {
					return err
				}
				if err := did.pass(ctx, dir, layers[i%len(layers)], sched, sources); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%d answers that were corrupted, truncated, stalled or misranged; all kinds: %v", faulty(), random.Counts())
	t.Logf("%d passes, %d reads were right, %d had an error and were repeated",
		did.passes.Load(), did.reads.Load(), did.failures.Load())
	for kind, n := range random.Counts() {
		if n < wantFaulty/100/2 {
			t.Errorf("%s: only %d times", kind, n)
		}
	}
}

// pass reads all of a layer whose cache is empty, by several deviceReaders, and looks
// at the cache in the end.
func (did *counts) pass(ctx context.Context, dir string, l layer, sched *device.Scheduler, sources []blob.Source) (err error) {
	c, err := cache.Open(dir, l.table, cache.NewSpace(0, slog.New(slog.DiscardHandler)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close(), os.RemoveAll(dir)) }()
	dev := device.New(device.Config{
		Descriptor: l.desc, Table: l.table, Cache: c, Scheduler: sched,
		Logger: slog.New(slog.DiscardHandler), Patience: 3 * time.Second,
	})
	defer dev.Close()
	dev.AddSources(sources)
	var g errgroup.Group
	n := did.passes.Add(1)
	for i := range deviceReaders {
		g.Go(func() error { return did.read(ctx, dev, l, uint64(n)*deviceReaders+uint64(i)) }) //nolint:gosec // small
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i := range l.table.Len() {
		at := l.table.At(i)
		got := make([]byte, at.Size)
		if _, err := c.ReadAt(got, at.Offset); err != nil {
			return err
		}
		if c.Has(i) && !bytes.Equal(got, l.want[at.Offset:at.End()]) {
			return fmt.Errorf("chunk %d is wrong in the cache", i)
		}
	}
	return nil
}

// read reads all of the device, in pieces and in an order of its own. A piece
// that has an error is read again.
func (did *counts) read(ctx context.Context, dev *device.Device, l layer, seed uint64) error {
	const piece = 24 << 10                   // more than a chunk
	random := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // no secret
	got := make([]byte, piece)
	for _, i := range random.Perm(int((dev.Size() + piece - 1) / piece)) {
		off := int64(i) * piece
		want := l.want[off:min(off+piece, dev.Size())]
		var release func()
		for {
			var err error
			release, err = dev.Wait(ctx, off, len(want))
			if ctx.Err() != nil {
				return fmt.Errorf("not at the end after %s: %w", timeout, err)
			}
			if err == nil {
				break
			}
			did.failures.Add(1)
		}
		_, err := dev.ReadAt(got[:len(want)], off)
		release()
		if err != nil {
			return fmt.Errorf("reading %d bytes at %d: %w", len(want), off, err)
		}
		if !bytes.Equal(got[:len(want)], want) {
			return fmt.Errorf("wrong bytes in %d+%d of %s", off, len(want), l.desc.Digest)
		}
		did.reads.Add(1)
	}
	return nil
}

// makeLayer makes a layer of many small chunks.
func makeLayer(t *testing.T, format testimage.Format) layer {
	t.Helper()
	var files []testimage.File
	for i := range 24 {
		files = append(files, testimage.File{
			Header:  tar.Header{Name: fmt.Sprint("file", i)},
			Content: testimage.Bytes(i*i*100, uint64(i+1)), //nolint:gosec // small
		})
	}
	made, err := testimage.ConvertBytes(t.Context(), testimage.Tar(files...), format, testimage.Options{ChunkSize: 8 << 10})
	if err != nil {
		t.Fatal(err)
	}
	l := layer{blob: made.Bytes, desc: blob.Descriptor{Digest: made.Descriptor.Digest, Size: made.Descriptor.Size}}
	open := estargz.Open
	if format == testimage.ZstdChunked {
		open = zstdchunked.Open
	}
	idx, err := open(t.Context(), blobtest.NewMemory(made.Bytes), l.desc, made.Descriptor.Annotations)
	if err != nil {
		t.Fatal(err)
	}
	l.want = indextest.Device(t, idx, made.Bytes)
	name := filepath.Join(t.TempDir(), "chunks")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(index.WriteTable(f, idx), f.Close()); err != nil {
		t.Fatal(err)
	}
	if l.table, err = index.OpenTable(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.table.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// startRegistries starts two registries that hold the layers, one over HTTP/1.1
// and one over HTTP/2, and returns them as the daemon would use them.
func startRegistries(t *testing.T, random *testregistry.Random, layers []layer) []blob.Source {
	t.Helper()
	dir := t.TempDir()
	var sources []blob.Source
	for _, tls := range []bool{false, true} {
		server, err := testregistry.Start(testregistry.Options{TLS: tls, Fault: random.Fault})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := server.Close(); err != nil {
				t.Error(err)
			}
		})
		for _, l := range layers {
			server.AddBlob(l.blob)
		}
		conf := filepath.Join(dir, "registries.conf")
		insecure := fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = %v\n", server.Host(), !tls)
		certs := filepath.Join(dir, "certs.d")
		err = errors.Join(os.WriteFile(conf, []byte(insecure), 0o600), os.MkdirAll(filepath.Join(certs, server.Host()), 0o700))
		if tls {
			err = errors.Join(err, os.WriteFile(filepath.Join(certs, server.Host(), "ca.crt"), server.CA(), 0o600))
		}
		if err != nil {
			t.Fatal(err)
		}
		client := registry.New(registry.Config{
			RegistriesConf: conf, RegistriesConfDir: filepath.Join(dir, "none"), CertsDir: []string{certs},
			StallTimeout: 300 * time.Millisecond,
		})
		t.Cleanup(client.Close)
		ref, err := reference.ParseNormalizedNamed(server.Host() + "/" + repository + ":v1")
		if err != nil {
			t.Fatal(err)
		}
		endpoints, err := client.Endpoints(ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range endpoints {
			sources = append(sources, retry.New(e, retry.Policy{Attempts: 3, Base: time.Millisecond, Max: 10 * time.Millisecond}))
		}
	}
	return sources
}
