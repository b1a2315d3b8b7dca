// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/shape"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
	"github.com/holdfast/holdfast/test/lab"
)

// starts are those of one line.
type starts struct {
	Normal []lab.Start `json:"normal"`
	Lazy   []lazyStart `json:"lazy"`
}

// lazyStart is a lazy start, with what it fetched of the layers' files.
type lazyStart struct {
	lab.Start
	// Data is how many bytes the registry sent until the container was ready,
	// without manifest, configuration and indexes.
	Data int64 `json:"data"`
}

// touched sums up the compressed chunks that were read, by what the daemon says.
func touched(layers []lab.LayerStart) (n int64) {
	for _, l := range layers {
		n += l.Touched
	}
	return n
}

// measureStarts starts the image normally and lazily, in pairs, nothing cached.
func (b *bench) measureStarts(ctx context.Context) error {
	tocs, err := tocOffsets(b.image)
	if err != nil {
		return err
	}
	for _, line := range []struct {
		name  string
		stand *lab.Stand
		into  *starts
	}{
		{"shaped", b.stand, &b.report.Shaped}, {"unshaped", b.stand.Unshaped(), &b.report.Unshaped},
	} {
		for i := range b.pairs {
			if err := line.stand.Forget(ctx); err != nil {
				return err
			}
			if err := b.freshDaemon(ctx); err != nil {
				return err
			}
			normal := func() error {
				s, err := cold(ctx, line.stand.StartNormal)
				b.logTook(err, "%s normal start: %.2f s", line.name, s.Total.Seconds())
				line.into.Normal = append(line.into.Normal, s)
				return err
			}
			lazy := func() error {
				s, err := cold(ctx, line.stand.StartLazy)
				b.logTook(err, "%s lazy start: %.2f s", line.name, s.Total.Seconds())
				line.into.Lazy = append(line.into.Lazy, lazyStart{s, s.Bytes - besides(s.Served, tocs)})
				return err
			}
			if err := inTurn(i, normal, lazy); err != nil {
				return err
			}
			if n, l := line.into.Normal[i].Output, line.into.Lazy[i].Output; n != l {
				return fmt.Errorf("the program says %q when started lazily and %q normally", l, n)
			}
		}
	}
	return nil
}

// inTurn calls two functions, in one order in even rounds and in the other in
// odd ones.
func inTurn(round int, a, b func() error) error {
	if round%2 == 1 {
		a, b = b, a
	}
	if err := a(); err != nil {
		return err
	}
	return b()
}

// cold starts a container with an empty page cache.
func cold(ctx context.Context, start func(context.Context) (lab.Start, error)) (lab.Start, error) {
	if err := lab.DropPageCache(); err != nil {
		return lab.Start{}, err
	}
	return start(ctx)
}

// noReadAhead is less than a page: the kernel then reads what it is asked for
// and nothing else.
const noReadAhead = "read_ahead = \"1KiB\"\nfill = \"off\"\nprofile = \"off\"\n"

// measureTouched finds out what the workload itself touches: without the
// kernel's read-ahead, which asks the daemon for more than the workload asks the
// kernel for. The time of that start does not count.
func (b *bench) measureTouched(ctx context.Context) (err error) {
	stand, err := lab.NewStand(filepath.Join(b.dir, "work", "touched"), b.binary, b.image, shape.Line{}, noReadAhead)
	if err != nil {
		return err
	}
	defer func() { err = joined(err, stand.Close(ctx)) }()
	if err := stand.Daemon.Start(ctx); err != nil {
		return err
	}
	s, err := cold(ctx, stand.StartLazy)
	if err != nil {
		return err
	}
	b.report.Touched = touched(s.Layers)
	b.log("the workload touches chunks of %.1f MB", float64(b.report.Touched)/1e6)
	return nil
}

// besides counts what the registry sent that is not data of the files in the
// layers: blobs that are no layer, and what lies behind the data of a layer.
func besides(served []testregistry.Served, tocs map[digest.Digest]int64) (n int64) {
	for _, r := range served {
		toc := tocs[r.Digest] // 0: no layer
		n += max(0, r.Offset+r.Length-max(r.Offset, toc))
	}
	return n
}

// tocOffsets says where the data of each layer ends.
func tocOffsets(image testimage.Image) (map[digest.Digest]int64, error) {
	offsets := map[digest.Digest]int64{}
	for _, l := range image.Layers {
		f, err := os.Open(l.Path)
		if err != nil {
			return nil, fmt.Errorf("reading the sample: %w", err)
		}
		off, _, err := estargz.OpenFooter(io.NewSectionReader(f, 0, l.Descriptor.Size))
		if err = joined(err, f.Close()); err != nil {
			return nil, fmt.Errorf("reading the sample %s: %w", l.Path, err)
		}
		offsets[l.Descriptor.Digest] = off
	}
	return offsets, nil
}
