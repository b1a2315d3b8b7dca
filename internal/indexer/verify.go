// SPDX-License-Identifier: Apache-2.0

package indexer

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/stream"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/verify"
)

// Verdict is how an index compares with its layer.
type Verdict string

// The verdicts.
const (
	Right   Verdict = "ok"
	Differs Verdict = "differs"
	NoIndex Verdict = "no index"
	Unknown Verdict = "unknown" // the layer could not be read
)

// VerifyResult is how the index of a layer compares with it.
type VerifyResult struct {
	Layer
	Verdict Verdict `json:"verdict"`
	Reason  string  `json:"reason,omitempty"` // the first difference, or what failed
	Index   *Found  `json:"index,omitempty"`  // the one that was compared
}

// ErrDiffers means that an index is not that of its layer.
var ErrDiffers = errors.New("an index differs from its layer")

// Verify reads each layer whole and compares it with its index: the one in a place,
// or, if that is "", the best that is found. The error is [ErrDiffers], [ErrNone], or
// that a layer could not be read; there are results for all layers then, unless ctx
// has ended.
func (x *Indexer) Verify(ctx context.Context, from index.Place) ([]VerifyResult, error) {
	img := x.places()
	candidates := func(l image.Layer) []candidate { return x.candidates(img, l) }
	if from != "" {
		place, err := img.Open(from)
		if err != nil {
			return nil, err
		}
		candidates = func(l image.Layer) []candidate {
			return []candidate{x.at(indexes.Place{Place: place, Trust: index.Found}, l)}
		}
	}
	results, err := each(ctx, x.layers(), func(ctx context.Context, l image.Layer) VerifyResult {
		r := x.verify(ctx, l, candidates(l))
		r.Layer = Layer{l.Digest, l.Size}
		return r
	})
	if err != nil {
		return nil, err
	}
	has := func(v Verdict) bool {
		return slices.ContainsFunc(results, func(r VerifyResult) bool { return r.Verdict == v })
	}
	switch {
	case has(Differs):
		return results, ErrDiffers
	case has(Unknown):
		return results, errors.New("not all layers could be read")
	case !has(Right):
		return results, ErrNone
	}
	return results, nil
}

// verify compares a layer with the index of the first place that has one.
func (x *Indexer) verify(ctx context.Context, l image.Layer, candidates []candidate) VerifyResult {
	for _, c := range candidates {
		r := VerifyResult{Index: &Found{From: c.from, Trust: c.trust}}
		idx, err := c.open(ctx)
		switch {
		case err == nil:
		case absent(err):
			continue
		case errors.Is(err, index.ErrInvalid), errors.Is(err, index.ErrTooLarge):
			r.Verdict, r.Reason = Differs, err.Error()
			return r
		default:
			r.Verdict, r.Reason = Unknown, err.Error()
			return r
		}
		r.Index.Kind = idx.Kind
		difference, err := x.compare(ctx, l, idx)
		if err = errors.Join(err, idx.close()); err != nil {
			difference, r.Verdict = err, Unknown
		} else if r.Verdict = Right; difference != nil {
			r.Verdict = Differs
		}
		if difference != nil {
			r.Reason = difference.Error()
		}
		return r
	}
	return VerifyResult{Verdict: NoIndex}
}

// compare returns the first difference between a layer and an index, nil if there is
// none.
func (x *Indexer) compare(ctx context.Context, l image.Layer, idx *opened) (difference, err error) {
	dir, err := os.MkdirTemp(x.Finder.Config.Temp, "holdfast-verify-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	tableName := filepath.Join(dir, "chunks")
	f, err := os.Create(tableName)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(index.WriteTable(f, idx.Index), f.Close()); err != nil {
		return nil, err
	}
	table, err := index.OpenTable(tableName)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, table.Close()) }()
	res, err := fromSources(ctx, x, l, func(blob io.Reader) (*stream.Result, error) {
		var res *stream.Result
		res, difference, err = compareContent(ctx, l, idx, table, dir, blob)
		if err != nil {
			return nil, err
		}
		return res, res.Check(l.Digest, l.DiffID)
	})
	if err != nil || difference != nil {
		return difference, err
	}
	return compareTree(dir, idx.Index, res.Index)
}

// compareContent reads a layer's blob and compares it with a table. It does so with
// a device whose cache has no room: what the background fill compares is the same.
func compareContent(ctx context.Context, l image.Layer, idx *opened, table *index.Table, dir string, blob io.Reader) (_ *stream.Result, difference, err error) {
	log := slog.New(slog.DiscardHandler)
	store, err := cache.Open(dir, table, cache.NewSpace(1, log))
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	dev := device.New(device.Config{Descriptor: l.Blob(), Table: table, Cache: store, Scheduler: device.NewScheduler(1), Logger: log})
	defer dev.Close()
	filling, err := dev.Filling()
	if err != nil {
		return nil, nil, err
	}
	defer filling.Close()
	files := newFileCheck(filling, idx)
	res, difference, err := verify.Content(ctx, blob, l.Size, files, table)
	return res, cmp.Or(difference, files.difference), err
}

// compareTree compares the tree of an index with that of one which was made of the
// layer's very tar.
func compareTree(dir string, idx, real *index.Index) (difference, err error) {
	if idx.RootImplied != real.RootImplied {
		return fmt.Errorf("%w: only one of them describes the root", erofs.ErrTreeDiffers), nil
	}
	const name = "layer"
	have, err := os.Create(filepath.Join(dir, "image"))
	if err != nil {
		return nil, err
	}
	defer have.Close() //nolint:errcheck // nobody needs it any more
	scratch, err := os.Create(filepath.Join(dir, "scratch"))
	if err != nil {
		return nil, err
	}
	defer scratch.Close() //nolint:errcheck // as above
	if err := erofs.Write(have, idx, name); err != nil {
		return nil, err
	}
	err = erofs.CompareTree(have, name, idx.DeviceSize, real, scratch)
	if errors.Is(err, erofs.ErrTreeDiffers) {
		return err, nil
	}
	return nil, err
}

// fileCheck compares files with the digests that came with an index, and passes
// everything on.
type fileCheck struct {
	*device.Filling
	files      []index.Inode // those with content, in the order of the device
	digests    [][sha256.Size]byte
	next       int // file
	hash       hash.Hash
	difference error
}

func newFileCheck(f *device.Filling, idx *opened) *fileCheck {
	c := &fileCheck{Filling: f, digests: idx.digests.Files, hash: sha256.New()}
	if idx.digests.Blob == "" {
		return c
	}
	for _, n := range idx.Inodes {
		if n.Mode&unix.S_IFMT == unix.S_IFREG && n.Size > 0 {
			c.files = append(c.files, n)
		}
	}
	slices.SortFunc(c.files, func(a, b index.Inode) int { return cmp.Compare(a.Offset, b.Offset) })
	if len(c.files) != len(c.digests) {
		c.difference = fmt.Errorf("there are digests of %d files, and %d files with content", len(c.digests), len(c.files))
	}
	return c
}

// WriteAt takes in what follows. Only sparse files have gaps, and no index with
// digests describes those.
func (c *fileCheck) WriteAt(p []byte, off int64) (int, error) {
	for rest, at := p, off; len(rest) > 0 && c.difference == nil && c.next < len(c.files); {
		file := c.files[c.next]
		n := min(int64(len(rest)), file.Offset+file.Size-at)
		if at < file.Offset || n <= 0 {
			c.difference = fmt.Errorf("content at %d of the device, where the index has none", at)
			break
		}
		c.hash.Write(rest[:n])
		if rest, at = rest[n:], at+n; at == file.Offset+file.Size {
			if got := [sha256.Size]byte(c.hash.Sum(nil)); got != c.digests[c.next] {
				c.difference = fmt.Errorf("file %d at %d of the device: got sha256:%x, want sha256:%x", c.next, file.Offset, got, c.digests[c.next])
			}
			c.hash.Reset()
			c.next++
		}
	}
	return c.Filling.WriteAt(p, off)
}
