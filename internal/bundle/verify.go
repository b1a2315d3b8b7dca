// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

// Problem is what is wrong with something in a bundle.
type Problem struct {
	What  string `json:"what"`
	Wrong string `json:"wrong"`
	// Images are the names that need it.
	Images []string `json:"images,omitempty"`
}

// Report is what Verify has found.
type Report struct {
	Names    []string  `json:"names"`
	Blobs    int       `json:"blobs"`
	Bytes    int64     `json:"bytes"` // that were read and compared
	Problems []Problem `json:"problems"`
	Notes    []string  `json:"notes"` // what is no harm
}

// need is a blob that something in index.json leads to.
type need struct {
	size  int64 // -1: whatever it has
	names map[string]bool
	// optional is that of a platform that may have been left out.
	optional bool
}

// verification is one Verify.
type verification struct {
	layout *ocidir.Layout
	needs  map[digest.Digest]*need

	mu     sync.Mutex // protects the fields below, and calls of progress
	report Report
}

func (v *verification) wrong(what string, names map[string]bool, format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Problems = append(v.report.Problems, Problem{what, fmt.Sprintf(format, args...), slices.Sorted(maps.Keys(names))})
}

// Verify reads all of a bundle, and compares each blob with its digest and its size. The
// error is that there is no bundle that could be verified.
func Verify(ctx context.Context, l *ocidir.Layout, progress func(d digest.Digest, done, total int64)) (*Report, error) {
	if err := l.CheckVersion(ctx); err != nil {
		return nil, fmt.Errorf("verifying: %w", err)
	}
	idx, err := l.Index(ctx)
	if err != nil {
		return nil, fmt.Errorf("verifying: %w", err)
	}
	files, err := l.Files(ctx)
	if err != nil {
		return nil, fmt.Errorf("verifying: %w", err)
	}
	v := &verification{layout: l, needs: map[digest.Digest]*need{}}
	v.report = Report{Names: []string{}, Problems: []Problem{}, Notes: []string{}}
	seen := map[string]bool{}
	for _, m := range idx.Manifests {
		name := m.Annotations[v1.AnnotationRefName]
		if full, ok := ocidir.FullName(name); ok {
			name = full
		}
		if name != "" {
			if seen[name] {
				v.wrong("name "+name, nil, "two entries of index.json have it: the first counts")
			}
			seen[name] = true
			v.report.Names = append(v.report.Names, name)
		}
		if err := v.walk(ctx, m, name, false); err != nil {
			return nil, err
		}
	}
	if err := v.read(ctx, files, progress); err != nil {
		return nil, err
	}
	v.strays(files)
	slices.SortFunc(v.report.Problems, func(a, b Problem) int { return strings.Compare(a.What+a.Wrong, b.What+b.Wrong) })
	return &v.report, nil
}

// walk notes what a manifest and all that it leads to need.
func (v *verification) walk(ctx context.Context, d v1.Descriptor, name string, optional bool) error {
	if sound := d.Digest.Validate() == nil; !sound {
		v.wrong(fmt.Sprintf("manifest %q", d.Digest), map[string]bool{name: true}, "that is no digest")
		return nil
	}
	if !v.need(d, name, optional) {
		return nil
	}
	m, err := v.layout.Manifest(ctx, d.Digest.String())
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return nil //nolint:nilerr // told when all blobs are compared
	}
	manifests, blobs, err := ocidir.Children(m)
	if err != nil {
		v.wrong("manifest "+d.Digest.String(), map[string]bool{name: true}, "%v", err)
		return nil
	}
	for _, b := range blobs {
		v.need(b, name, false)
	}
	for _, child := range manifests {
		if err := v.walk(ctx, child, name, true); err != nil {
			return err
		}
	}
	return nil
}

// need notes that a name needs a blob, and reports whether that is new.
func (v *verification) need(d v1.Descriptor, name string, optional bool) bool {
	n := v.needs[d.Digest]
	if n == nil {
		n = &need{size: d.Size, names: map[string]bool{}, optional: true}
		v.needs[d.Digest] = n
	}
	if n.size != d.Size {
		v.wrong("blob "+d.Digest.String(), map[string]bool{name: true}, "one manifest says that it has %d bytes, another %d", n.size, d.Size)
	}
	n.optional = n.optional && optional
	if name == "" {
		name = "(refers to an image)"
	}
	known := n.names[name]
	n.names[name] = true
	return !known
}

// read compares all blobs, needed or not, with their digests.
func (v *verification) read(ctx context.Context, files map[string]int64, progress func(digest.Digest, int64, int64)) error {
	for d, n := range v.needs {
		name := path.Join(v1.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
		size, ok := files[name]
		switch {
		case !ok && n.optional:
			delete(v.needs, d)
		case !ok:
			v.wrong("blob "+d.String(), n.names, "it is missing: create the bundle again, or import it from another copy")
			delete(v.needs, d)
		case size != n.size:
			v.wrong("blob "+d.String(), n.names, "it has %d bytes instead of %d", size, n.size)
			delete(v.needs, d)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	// The largest first, so that none is left alone in the end.
	for _, d := range slices.SortedFunc(maps.Keys(v.needs), func(a, b digest.Digest) int { return int(v.needs[b].size - v.needs[a].size) }) {
		g.Go(func() error { return v.compare(ctx, blob.Descriptor{Digest: d, Size: v.needs[d].size}, progress) })
	}
	return g.Wait()
}

func (v *verification) compare(ctx context.Context, d blob.Descriptor, progress func(digest.Digest, int64, int64)) error {
	err := ocidir.Check(ctx, v.layout, d, func(done int64) {
		v.mu.Lock()
		defer v.mu.Unlock()
		progress(d.Digest, done, d.Size)
	})
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, blob.ErrCorrupt):
		v.wrong("blob "+d.Digest.String(), v.needs[d.Digest].names, "%v", err)
	case err != nil && !errors.Is(err, io.EOF):
		v.wrong("blob "+d.Digest.String(), v.needs[d.Digest].names, "it cannot be read: %v", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Blobs++
	v.report.Bytes += d.Size
	return nil
}

// strays tells of files that nothing leads to.
func (v *verification) strays(files map[string]int64) {
	count, bytes := 0, int64(0)
	for name, size := range files {
		switch dir, file := path.Split(name); {
		case name == v1.ImageIndexFile, name == v1.ImageLayoutFile, strings.HasPrefix(file, "."), file == "index.lock", strings.HasPrefix(name, ".ingest/"):
		case path.Dir(path.Clean(dir)) == v1.ImageBlobsDir:
			if _, needed := v.needs[digest.NewDigestFromEncoded(digest.Algorithm(path.Base(dir)), file)]; !needed {
				count++
				bytes += size
			}
		default:
			v.report.Notes = append(v.report.Notes, fmt.Sprintf("%q is no part of an OCI layout, and is never read", name))
		}
	}
	if count > 0 {
		v.report.Notes = append(v.report.Notes, fmt.Sprintf("%d blobs with %d bytes are not needed by anything that is listed whole", count, bytes))
	}
	slices.Sort(v.report.Notes)
}
