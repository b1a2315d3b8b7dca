// SPDX-License-Identifier: Apache-2.0

package sharedstore

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/imagestore"
)

// Added is what became of an image.
type Added struct {
	Name   string        `json:"name"`
	ID     string        `json:"id"`
	Digest digest.Digest `json:"digest"` // of the manifest
	// Layers of the image, and how many of them were made now; the others were there.
	Layers int `json:"layers"`
	Made   int `json:"made"`
}

// Progress tells how many bytes of a layer's blob have been read. It is called by one
// goroutine at a time.
type Progress func(layer digest.Digest, done, total int64)

// Add adds an image under its names, which then name nothing else in this store. It
// takes up what an interrupted Add has left. If it fails, the store has no part of the
// image that a runtime could see, except for whole layers, which others can use.
func (s *Store) Add(ctx context.Context, img *Image, progress Progress) (added *Added, err error) {
	err = s.write(ctx, func() error {
		added, err = s.add(ctx, img, progress)
		return err
	})
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		err = fmt.Errorf("%w: make room, or let unneeded layers go (holdfast store prune), and add it again", err)
	}
	if err != nil {
		return nil, fmt.Errorf("adding %s to %s: %w", img.Names[0], s.root, err)
	}
	return added, nil
}

// layer is one of the image's layers, and its place in the store.
type layer struct {
	image.Layer
	id, parent string
	unpacked   chan struct{} // closed when it is staged, or there
}

func (s *Store) add(ctx context.Context, img *Image, progress Progress) (*Added, error) {
	recorded, err := s.layers()
	if err != nil {
		return nil, err
	}
	have := map[string]bool{}
	for _, l := range recorded {
		have[l.ID] = true
	}
	var chain []*layer
	parent := ""
	for _, l := range img.Layers {
		id := imagestore.ChainID(parent, l.DiffID)
		chain = append(chain, &layer{Layer: l, id: id, parent: parent, unpacked: make(chan struct{})})
		parent = id
	}
	var telling sync.Mutex
	var g errgroup.Group
	g.SetLimit(max(2, runtime.GOMAXPROCS(0)) + 1)
	made := 0
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g.Go(func() error {
		n, err := s.recordChain(ctx, chain, have)
		made = n
		return err
	})
	for _, l := range chain {
		if have[l.id] {
			close(l.unpacked)
			continue
		}
		g.Go(func() error {
			err := s.unpack(ctx, l.id, l.parent, l.Layer, img.Sources, func(done int64) {
				telling.Lock()
				defer telling.Unlock()
				progress(l.Digest, done, l.Size)
			})
			if err != nil {
				err = fmt.Errorf("layer %s: %w", l.Digest, err)
				cancel(err)
				return err
			}
			close(l.unpacked)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, context.Cause(ctx)
	}
	if err := s.addImage(ctx, img, parent); err != nil {
		return nil, err
	}
	return &Added{Name: img.Names[0], ID: img.id(), Digest: img.Manifest.Digest, Layers: len(chain), Made: made}, s.noteUnneeded()
}

// recordChain records layers as they get ready, base first, and counts them.
func (s *Store) recordChain(ctx context.Context, chain []*layer, have map[string]bool) (made int, err error) {
	var below []string
	for _, l := range chain {
		select {
		case <-l.unpacked:
		case <-ctx.Done():
			return made, context.Cause(ctx)
		}
		if !have[l.id] {
			m, err := s.settle(l.id, below)
			if err == nil {
				err = s.record(ctx, m)
			}
			if err != nil {
				return made, fmt.Errorf("layer %s: %w", l.Digest, err)
			}
			made++
			have[l.id] = true
		}
		below = slices.Insert(below, 0, l.id)
	}
	return made, nil
}
