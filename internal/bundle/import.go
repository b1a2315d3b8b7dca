// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
)

// ErrNotThere means that a bundle has nothing of a name.
var ErrNotThere = errors.New("it is not in the bundle")

// Names returns the full names in a bundle, or those of them that are asked for, without
// what cosign keeps beside them.
func Names(ctx context.Context, l *ocidir.Layout, wanted []string) ([]string, error) {
	all, err := l.Names(ctx)
	if err != nil {
		return nil, err
	}
	if wanted == nil {
		return slices.DeleteFunc(all, isBeside), nil
	}
	var some []string
	for _, w := range wanted {
		full, ok := ocidir.FullName(w)
		if !ok || !slices.Contains(all, full) {
			return nil, fmt.Errorf("%s: %w", w, ErrNotThere)
		}
		some = append(some, full)
	}
	return some, nil
}

// isBeside reports whether a name is one of those that cosign makes of a digest.
func isBeside(name string) bool {
	_, tag, ok := ocidir.SplitTag(name)
	const prefix, hexLen = "sha256-", 64
	return ok && len(tag) > len(prefix)+hexLen && tag[:len(prefix)] == prefix && tag[len(prefix)+hexLen] == '.'
}

// Import copies images and artifacts of a bundle, with what refers to them, to another
// layout. Names that are there move.
func Import(ctx context.Context, l *ocidir.Layout, names []string, to ocidir.Sink, o Options) ([]*Packed, error) {
	if err := l.CheckVersion(ctx); err != nil {
		return nil, err
	}
	p := New(to, o)
	all := []*Packed{}
	for _, name := range names {
		got, err := p.Pack(ctx, Origin{Name: name, Asked: name, Reader: l, Sources: []blob.Source{l}})
		if err != nil {
			return all, err
		}
		all = append(all, got)
	}
	return all, p.Finish(ctx)
}

// Exists reports whether there is anything at a path.
func Exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// List returns what is in a bundle, without reading its blobs.
func List(ctx context.Context, l *ocidir.Layout) ([]*Packed, error) {
	names, err := Names(ctx, l, nil)
	if err != nil {
		return nil, err
	}
	all := []*Packed{}
	for _, name := range names {
		p := New(counting{}, Options{})
		got, err := p.Pack(ctx, Origin{Name: name, Asked: name, Reader: l})
		if err != nil {
			return nil, err
		}
		all = append(all, got)
	}
	return all, nil
}

// counting is a sink that has everything.
type counting struct{}

func (counting) Has(context.Context, blob.Descriptor) (bool, error) { return true, nil }

func (counting) Put(context.Context, blob.Descriptor, io.Reader) error { return nil }

func (counting) List(context.Context, func([]v1.Descriptor) ([]v1.Descriptor, error)) error {
	return nil
}
