// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/holdfast/holdfast/internal/testimage"
)

// update is what a new version of an image cost a node that had all of the old one.
type update struct {
	Format testimage.Format `json:"format"`
	// Fetched are the bytes of blobs until everything had been read, Size those of
	// all layers.
	Fetched int64 `json:"fetched"`
	Size    int64 `json:"size"`
}

// measureUpdate reads all of an image, and then all of its next version, of which
// one file in twenty is another one, and every layer has been made anew.
func (b *bench) measureUpdate(ctx context.Context) error {
	for _, f := range []testimage.Format{testimage.EStargz, testimage.ZstdChunked} {
		if err := b.updateOnce(ctx, f); err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
	}
	return nil
}

func (b *bench) updateOnce(ctx context.Context, f testimage.Format) (err error) {
	old, err := b.large.Image(ctx, f)
	if err != nil {
		return err
	}
	next := old
	if next.Layers, err = b.large.Next(ctx, f); err != nil {
		return err
	}
	stand, err := b.newStand("update", old, noFill+"profile = \"off\"\n")
	if err != nil {
		return err
	}
	defer func() { err = joined(err, stand.Close(ctx)) }()
	if err := stand.Daemon.Start(ctx); err != nil {
		return err
	}
	ref, err := stand.Push(next, "next")
	if err != nil {
		return err
	}
	for _, version := range []string{stand.Ref, ref} {
		stand.Registry.ResetCounts()
		if err := stand.Daemon.PrepareAll(ctx, version); err != nil {
			return err
		}
		if err := stand.Lazy.Pull(ctx, version); err != nil {
			return err
		}
		if _, err := readContainer(ctx, stand.Lazy, version); err != nil {
			return err
		}
	}
	u := update{Format: f, Fetched: stand.Registry.Counts().BlobBytes}
	for _, l := range next.Layers {
		u.Size += l.Descriptor.Size
	}
	b.log("new version in %s: %.1f of %.1f MB fetched", f, float64(u.Fetched)/1e6, float64(u.Size)/1e6)
	b.report.Update = append(b.report.Update, u)
	return nil
}

func (u update) bar() bar {
	return bar{What: fmt.Sprintf("new version, 5 %% of files changed, %s: fetched", u.Format), Unit: "%", Want: 15,
		Measured: 100 * float64(u.Fetched) / float64(u.Size),
		Detail:   fmt.Sprintf("%.1f of %.1f MB", float64(u.Fetched)/1e6, float64(u.Size)/1e6)}
}
