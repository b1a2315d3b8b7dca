// SPDX-License-Identifier: Apache-2.0

package layer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/testimage"
)

// files is a layer of files that are made of these seeds.
func files(t *testing.T, seeds ...uint64) content {
	t.Helper()
	var all []testimage.File
	for i, seed := range seeds {
		all = append(all, testimage.File{
			Header:  tar.Header{Name: fmt.Sprintf("file-%d", i)},
			Content: testimage.Bytes(100_000, seed),
		})
	}
	plain := testimage.Tar(all...)
	l, err := testimage.ConvertBytes(t.Context(), plain, testimage.EStargz, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return content{l, plain}
}

// read reads all of a layer.
func read(t *testing.T, l *layer.Layer) {
	t.Helper()
	release, err := l.Device().Wait(t.Context(), 0, int(l.Device().Size()))
	if err != nil {
		t.Fatal(err)
	}
	release()
}

func TestLayersShareChunks(t *testing.T) {
	one, two := files(t, 1, 2, 3, 4, 5), files(t, 1, 2, 9, 4, 5)
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, r *rig) // of what is on disk, between two starts
		want   int64                      // chunks that are copied; the landmark is one
	}{
		{"at once", nil, 5},
		{"after a restart", func(*testing.T, *rig) {}, 5},
		{"of an earlier version", func(t *testing.T, r *rig) {
			if err := os.Remove(r.path(one, "digests")); err != nil {
				t.Fatal(err)
			}
		}, 5},
		{"with a damaged list", func(t *testing.T, r *rig) {
			if err := os.Truncate(r.path(one, "digests"), 30); err != nil {
				t.Fatal(err)
			}
		}, 5},
		{"with the list of another layer", func(t *testing.T, r *rig) {
			list, err := os.ReadFile(r.path(newContentOnDisk(t, r), "digests"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(r.path(one, "digests"), list, 0o600); err != nil {
				t.Fatal(err)
			}
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			from := r.mustAdd(t, one)
			read(t, from)
			if tt.change != nil {
				r.reopen(t, func() { tt.change(t, r) })
				from, _ = r.Get(one.Descriptor.Digest)
			}
			from.AddOrigin("example.com/app", true)
			to := r.mustAdd(t, two)
			r.check(t, two)
			if s := to.Device().Stats(); s.CopiedChunks < tt.want-1 || s.CopiedChunks > tt.want {
				t.Errorf("%+v, want %d copied", s, tt.want)
			}
		})
	}
}

// newContentOnDisk is a layer that has been added and closed.
func newContentOnDisk(t *testing.T, r *rig) content {
	t.Helper()
	other := files(t, 100, 101, 102, 103, 104, 105, 106, 107)
	r.open(t)
	r.mustAdd(t, other)
	if err := r.Unmount(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return other
}

// A file that a layer has twice is fetched once.
func TestLayerSharesWithItself(t *testing.T) {
	r := newRig(t)
	l := r.mustAdd(t, files(t, 1, 2, 3, 1))
	for _, i := range []int{1, 4} { // behind the landmark
		c := l.Chunks().At(i)
		release, err := l.Device().Wait(t.Context(), c.Offset, 100)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	if s := l.Device().Stats(); s.CopiedChunks != 1 {
		t.Errorf("%+v", s)
	}
}

// Nothing is lent out of a layer that goes, and nobody is hurt by that.
func TestLendersComeAndGo(t *testing.T) {
	r := newRig(t)
	one := files(t, 1, 2, 3, 4, 5)
	var others []content
	for i := range uint64(6) {
		others = append(others, files(t, 1, 2, 10+i, 4, 5))
	}
	var g errgroup.Group
	g.Go(func() error {
		for range 10 {
			l, err := r.add(t.Context(), one)
			if err != nil {
				return err
			}
			l.AddOrigin("example.com/app", true)
			if err := l.Device().PrefetchBlob(t.Context(), 1<<40, 0); err != nil {
				return err
			}
			if err := r.Remove(one.Descriptor.Digest); err != nil {
				return err
			}
		}
		return nil
	})
	for _, c := range others {
		g.Go(func() error {
			for range 5 {
				l, err := r.add(t.Context(), c)
				if err != nil {
					return err
				}
				p := make([]byte, l.Device().Size())
				release, err := l.Device().Wait(t.Context(), 0, len(p))
				if err != nil {
					return err
				}
				_, err = l.Device().ReadAt(p, 0)
				release()
				if err != nil {
					return err
				}
				if !bytes.Contains(p, testimage.Bytes(100_000, 4)) {
					return fmt.Errorf("layer %s has other bytes", l.Digest)
				}
				if err := r.Remove(c.Descriptor.Digest); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}
