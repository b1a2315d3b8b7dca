// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/holdfast/holdfast/internal/shape"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// unmodified is what was measured with the image as everybody makes it: gzip
// layers without an index.
type unmodified struct {
	Image []layerOnDisk `json:"image"`
	// Normal are normal pulls and starts, ReadNormal reads of all files after them.
	Normal     []lab.Start     `json:"normal"`
	ReadNormal []time.Duration `json:"readNormal"`
	// First are those of a node that finds no index; its prepare reads all layers.
	First     []lab.Start     `json:"first"`
	ReadFirst []time.Duration `json:"readFirst"`
	// Indexed are those of a node that finds the first one's index in the registry,
	// Profiled those of one that finds a profile as well.
	Indexed  []lab.Start `json:"indexed"`
	Profiled []lab.Start `json:"profiled"`
	// EStargz are lazy starts of the image's eStargz copy.
	EStargz []lab.Start `json:"estargz"`
	// Warm are starts with everything local.
	Warm []time.Duration `json:"warm"`
	// Gunzip is how long one core decompresses each layer, Line how long the line
	// needs for all of them.
	Gunzip []time.Duration `json:"gunzip"`
	Line   time.Duration   `json:"line"`
}

// nodes are the settings of the nodes that are compared; the fill would blur it.
const (
	noFill      = "fill = \"off\"\n"
	firstNode   = noFill + "index.stores = []\nindex.publish = [\"registry\"]\nprofile = \"off\"\n"
	indexedNode = noFill + "profile = \"off\"\n"
	recordNode  = noFill + "index.publish = [\"registry\"]\n"
	nextNode    = noFill
)

// measureUnmodified starts the gzip image on a node that finds nothing, on one that
// finds its index, and on one that finds a profile of that one.
func (b *bench) measureUnmodified(ctx context.Context) (err error) {
	r := &b.report.Unmodified
	image, err := b.large.Image(ctx, testimage.Gzip)
	if err != nil {
		return err
	}
	r.Image = describe(image)
	copied, err := b.large.Image(ctx, testimage.EStargz)
	if err != nil {
		return err
	}
	if err := b.measureGunzip(ctx, image); err != nil {
		return err
	}
	stand, err := b.newStand("unmodified", image, firstNode)
	if err != nil {
		return err
	}
	defer func() { err = joined(err, stand.Close(ctx)) }()
	if err := stand.Daemon.Start(ctx); err != nil { // its store has to be there for Podman
		return err
	}
	copiedRef, err := stand.Push(copied, "estargz")
	if err != nil {
		return err
	}
	for i := range b.pairs {
		normal := func() error { return b.startNormalAndRead(ctx, stand, r) }
		first := func() error { return b.startFirstAndRead(ctx, stand, r) }
		if err := inTurn(i, normal, first); err != nil {
			return err
		}
		if err := b.startOthers(ctx, stand, copiedRef, r); err != nil {
			return err
		}
	}
	return nil
}

// newStand is a stand beside the main one, behind the same line.
func (b *bench) newStand(name string, image testimage.Image, settings string) (*lab.Stand, error) {
	line := shape.Line{RTT: b.rtt, Rate: b.report.Line.BytesPerSecond}
	return lab.NewStand(filepath.Join(b.dir, "work", name), b.binary, image, line, settings)
}

// measureGunzip measures the least that pulling needs: of one core for a layer, and
// of the line for all.
func (b *bench) measureGunzip(ctx context.Context, image testimage.Image) error {
	r := &b.report.Unmodified
	var size int64
	for _, l := range image.Layers {
		took, err := gunzip(ctx, l.Path)
		if err != nil {
			return err
		}
		b.log("one core decompresses %s in %.2f s", filepath.Base(l.Path), took.Seconds())
		r.Gunzip = append(r.Gunzip, took)
		size += l.Descriptor.Size
	}
	r.Line = time.Duration(float64(size) / float64(b.report.Line.BytesPerSecond) * float64(time.Second))
	return nil
}

// gunzip decompresses a file, which is in the page cache, with one core.
func gunzip(ctx context.Context, path string) (took time.Duration, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("reading the sample: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	if _, err := io.Copy(io.Discard, f); err != nil {
		return 0, fmt.Errorf("reading the sample %s: %w", path, err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	return timed(func() error {
		z, err := gzip.NewReader(f)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, z); err != nil {
			return fmt.Errorf("decompressing the sample %s: %w", path, err)
		}
		return ctx.Err()
	})()
}

// startNormalAndRead pulls normally, starts, and reads all files.
func (b *bench) startNormalAndRead(ctx context.Context, stand *lab.Stand, r *unmodified) error {
	if err := stand.Normal.Reset(ctx); err != nil {
		return err
	}
	s, err := cold(ctx, stand.StartNormal)
	if err != nil {
		return err
	}
	r.Normal = append(r.Normal, s)
	took, err := readContainer(ctx, stand.Normal, stand.Ref)
	r.ReadNormal = append(r.ReadNormal, took)
	b.logTook(err, "unmodified, normally: pull %.2f s, ready %.2f s, all read in %.2f s", s.Pull.Seconds(), s.Total.Seconds(), took.Seconds())
	return err
}

// startFirstAndRead is the same on a node that finds no index anywhere.
func (b *bench) startFirstAndRead(ctx context.Context, stand *lab.Stand, r *unmodified) error {
	if err := b.newNode(ctx, stand, firstNode); err != nil {
		return err
	}
	s, err := cold(ctx, stand.StartLazy)
	if err != nil {
		return err
	}
	r.First = append(r.First, s)
	took, err := readContainer(ctx, stand.Lazy, stand.Ref)
	r.ReadFirst = append(r.ReadFirst, took)
	b.logTook(err, "unmodified, first node: prepare %.2f s, ready %.2f s, all read in %.2f s", s.Prepare.Seconds(), s.Total.Seconds(), took.Seconds())
	return err
}

// readContainer reads all files of a container of the image, with the page cache
// that pulling has left.
func readContainer(ctx context.Context, p *lab.Podman, ref string) (time.Duration, error) {
	root, err := p.Mount(ctx, ref)
	if err != nil {
		return 0, err
	}
	return timed(func() error { _, err := readTree(ctx, root); return err })()
}

// startOthers starts the image on nodes that come after the first one.
func (b *bench) startOthers(ctx context.Context, stand *lab.Stand, copied string, r *unmodified) error {
	start := func(what, settings, ref string, into *[]lab.Start) error {
		if err := b.newNode(ctx, stand, settings); err != nil {
			return err
		}
		other := stand.Of(ref)
		s, err := cold(ctx, other.StartLazy)
		*into = append(*into, s)
		b.logTook(err, "unmodified, %s: prepare %.2f s, ready %.2f s, %.1f MB", what, s.Prepare.Seconds(), s.Total.Seconds(), float64(s.Bytes)/1e6)
		return err
	}
	if err := start("eStargz copy", nextNode+"profile = \"off\"\n", copied, &r.EStargz); err != nil {
		return err
	}
	if err := start("with an index", indexedNode, stand.Ref, &r.Indexed); err != nil {
		return err
	}
	if len(r.Profiled) == 0 {
		if err := start("recording a profile", recordNode, stand.Ref, new([]lab.Start)); err != nil {
			return err
		}
		if err := stand.Daemon.PushProfile(ctx, stand.Ref); err != nil {
			return err
		}
	}
	if err := start("with a profile", nextNode, stand.Ref, &r.Profiled); err != nil {
		return err
	}
	for range 3 {
		took, err := stand.Rerun(ctx, stand.Lazy)
		if err != nil {
			return err
		}
		r.Warm = append(r.Warm, took)
	}
	return nil
}

// newNode makes the daemon of a stand one of a node that has never seen anything.
func (b *bench) newNode(ctx context.Context, stand *lab.Stand, settings string) error {
	if _, peak, err := stand.Daemon.RSS(ctx); err == nil {
		b.report.PeakRSS = append(b.report.PeakRSS, peak)
	}
	if err := stand.Lazy.Reset(ctx); err != nil {
		return err
	}
	return stand.Daemon.Renew(ctx, stand.Settings(settings))
}

// The bars of these measurements.

func (u *unmodified) indexedBar() bar {
	normal, indexed := median(u.Normal, startTime), median(u.Indexed, startTime)
	return bar{What: "unmodified, index in the registry: ready, sooner than normally", Unit: "times", Want: 10,
		Measured: normal.Total.Seconds() / indexed.Total.Seconds(),
		Detail:   fmt.Sprintf("%.2f s, normally %.2f s", indexed.Total.Seconds(), normal.Total.Seconds())}
}

func (u *unmodified) copyBar() bar {
	indexed, copied := median(u.Indexed, startTime), median(u.EStargz, startTime)
	return bar{What: "the same, against its eStargz copy", Unit: "times", Want: 1.2,
		Measured: indexed.Total.Seconds() / copied.Total.Seconds(),
		Detail:   fmt.Sprintf("%.2f s with %.1f MB, the copy %.2f s with %.1f MB", indexed.Total.Seconds(), float64(indexed.Bytes)/1e6, copied.Total.Seconds(), float64(copied.Bytes)/1e6)}
}

func (u *unmodified) profileBar(l line) bar {
	s, warm := median(u.Profiled, startTime), median(u.Warm, time.Duration.Seconds).Seconds()
	own := float64(s.Bytes) / float64(l.BytesPerSecond)
	return bar{What: "with a profile: ready, to a warm start plus the line's time", Unit: "times", Want: 1.4,
		Measured: s.Total.Seconds() / (warm + own),
		Detail: fmt.Sprintf("%.2f s, of which prepare %.2f and pull %.2f; warm %.2f s, line %.2f s for %.1f MB",
			s.Total.Seconds(), s.Prepare.Seconds(), s.Pull.Seconds(), warm, own, float64(s.Bytes)/1e6)}
}

func (u *unmodified) firstBar() bar {
	normal, first := median(u.Normal, pullOf), median(u.First, prepareOf)
	return bar{What: "no index anywhere: all layers usable, to a normal pull", Unit: "times", Want: 2.0 / 3,
		Measured: first.Prepare.Seconds() / normal.Pull.Seconds(),
		Detail:   fmt.Sprintf("%.2f s, normally %.2f s", first.Prepare.Seconds(), normal.Pull.Seconds())}
}

func (u *unmodified) firstLeastBar() bar {
	first, least := median(u.First, prepareOf).Prepare, u.Line
	for _, g := range u.Gunzip {
		least = max(least, g)
	}
	return bar{What: "the same, to the larger of line and gunzip", Unit: "times", Want: 1.25,
		Measured: first.Seconds() / least.Seconds(),
		Detail:   fmt.Sprintf("%.2f s, line %.2f s, gunzip %v", first.Seconds(), u.Line.Seconds(), u.Gunzip)}
}

func (u *unmodified) readBar() bar {
	normal := median(u.Normal, pullOf).Pull + median(u.ReadNormal, time.Duration.Seconds)
	first := median(u.First, prepareOf)
	lazy := first.Prepare + first.Pull + median(u.ReadFirst, time.Duration.Seconds)
	return bar{What: "no index anywhere: pulled and everything read, to normally", Unit: "times", Want: 1,
		Measured: lazy.Seconds() / normal.Seconds(),
		Detail: fmt.Sprintf("%.2f s, normally %.2f s; reading alone %.2f s, normally %.2f s", lazy.Seconds(), normal.Seconds(),
			median(u.ReadFirst, time.Duration.Seconds).Seconds(), median(u.ReadNormal, time.Duration.Seconds).Seconds())}
}

func pullOf(s lab.Start) float64    { return s.Pull.Seconds() }
func prepareOf(s lab.Start) float64 { return s.Prepare.Seconds() }
