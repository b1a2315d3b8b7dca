// SPDX-License-Identifier: Apache-2.0

package artifactstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

// Report is what was found out about a store.
type Report struct {
	Problems  []Problem `json:"problems"`
	Artifacts int       `json:"artifacts"`
	Blobs     int       `json:"blobs"`
	Bytes     int64     `json:"bytes"` // of content that was compared
}

// Problem is something that is wrong.
type Problem struct {
	What   string `json:"what"`
	Wrong  string `json:"wrong"`
	Remedy string `json:"remedy"`
}

const (
	addAgain = "add it again: holdfast artifact add"
	takeOut  = "take it out: holdfast artifact remove"
)

// Verify reads all of the store at a path, and compares it with its digests. It writes
// nothing, so that media may be read-only.
func Verify(ctx context.Context, path string, progress func(d digest.Digest, done, total int64)) (*Report, error) {
	l := Layout(path)
	idx, err := l.Index(ctx)
	if err != nil {
		return nil, fmt.Errorf("verifying artifact store: %w", err)
	}
	r := &Report{Problems: []Problem{}}
	wrong := func(what, remedy string, err error) {
		r.Problems = append(r.Problems, Problem{what, err.Error(), remedy})
	}
	if _, err := os.Stat(filepath.Join(l.Path(), LockName)); errors.Is(err, fs.ErrNotExist) {
		wrong(LockName, "open the store once where it can be written to, with any holdfast artifact command that writes",
			errors.New("it is missing: runtimes that use the store directly cannot read it where it is read-only"))
	}
	names, digests, done := map[string]bool{}, map[digest.Digest]string{}, map[digest.Digest]error{}
	for _, d := range idx.Manifests {
		name := d.Annotations[v1.AnnotationRefName]
		what := "artifact " + name
		if name == "" {
			what = "artifact " + d.Digest.String()
		}
		r.Artifacts++
		if err := checkDigest(name, d.Digest); err != nil {
			wrong(what, "add it under its full name (--as), and "+takeOut, fmt.Errorf("runtimes cannot find it: %w", err))
		}
		if names[name] {
			wrong(what, takeOut, errors.New("the name is there twice"))
		}
		if other, twice := digests[d.Digest]; twice {
			wrong(what, addAgain, fmt.Errorf("it has the digest of %s: runtimes find neither by that", other))
		}
		names[name], digests[d.Digest] = true, name
		m, err := l.Manifest(ctx, d.Digest.String())
		var a *Artifact
		if err == nil {
			a, err = Parse(m)
		}
		if err == nil && d.MediaType != v1.MediaTypeImageManifest {
			err = fmt.Errorf("it is listed with type %q: %w", d.MediaType, ErrUnreadable)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			wrong(what, takeOut, fmt.Errorf("runtimes cannot read the store because of it: %w", err))
			continue
		}
		for _, b := range a.Blobs() {
			err, known := done[b.Digest]
			if !known {
				err = r.compare(ctx, l, b, progress)
				done[b.Digest] = err
			}
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err != nil {
				wrong(what, addAgain, fmt.Errorf("blob %s: %w", b.Digest, err))
			}
		}
	}
	return r, nil
}

func (r *Report) compare(ctx context.Context, l *ocidir.Layout, b blob.Descriptor, progress func(digest.Digest, int64, int64)) error {
	r.Blobs++
	size, err := l.Stat(ctx, b.Digest)
	if err != nil {
		return err
	}
	if size != b.Size {
		return fmt.Errorf("it has %d bytes, not %d: %w", size, b.Size, blob.ErrCorrupt)
	}
	r.Bytes += b.Size
	return ocidir.Check(ctx, l, b, func(done int64) { progress(b.Digest, done, b.Size) })
}
