// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"go.podman.io/storage"

	"github.com/holdfast/holdfast/internal/erofs"
	"github.com/holdfast/holdfast/internal/mount"
)

// Probe writes a chain of two records into a scratch store below dir and reads
// it back with containers/storage itself: proof that what [Store.Publish] writes
// is what runtimes understand. It leaves nothing behind, nor what a Probe that was
// killed has left; one Probe may run in a dir at a time.
func Probe(ctx context.Context, dir string) (err error) {
	scratch := filepath.Join(dir, "store-probe")
	defer func() { err = errors.Join(err, clearProbe(scratch)) }()
	err = clearProbe(scratch)
	if err == nil {
		err = probe(ctx, scratch)
	}
	if err != nil {
		return fmt.Errorf("probing the image store: %w", err)
	}
	return nil
}

// clearProbe removes a scratch store with what is mounted in it.
func clearProbe(scratch string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(scratch))
	if err != nil {
		return fmt.Errorf("clearing %s: %w", scratch, err)
	}
	for _, m := range slices.Backward(mounts) {
		if err := mount.Unbind(m.Mountpoint); err != nil {
			return fmt.Errorf("clearing %s: %w", scratch, err)
		}
	}
	if err := os.RemoveAll(scratch); err != nil {
		return fmt.Errorf("clearing %s: %w", scratch, err)
	}
	return nil
}

func probe(ctx context.Context, scratch string) (err error) {
	own, err := Create(filepath.Join(scratch, "store"), filepath.Join(scratch, "records"))
	if err != nil {
		return err
	}
	base := probeLayer("", "base", filepath.Join(scratch, "mount"))
	top := probeLayer(base.ID, "top", filepath.Join(scratch, "mount"))
	for _, l := range []Layer{base, top} {
		if err := os.MkdirAll(filepath.Join(l.MountDirectory, "diff"), 0o700); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, own.Detach()) }()
	// An earlier reader must see the records without being opened again.
	reader, err := storage.GetStore(storage.StoreOptions{
		GraphRoot: filepath.Join(scratch, "root"), RunRoot: filepath.Join(scratch, "run"),
		GraphDriverName:    driverDir,
		GraphDriverOptions: []string{"overlay.imagestore=" + own.Root()},
	})
	if err != nil {
		return fmt.Errorf("opening containers/storage: %w", err)
	}
	defer reader.Shutdown(true) //nolint:errcheck // the scratch store goes away as a whole
	if err := own.Publish(ctx, []Layer{base, top}); err != nil {
		return err
	}
	for _, want := range []Layer{base, top} {
		got, err := reader.LayersByCompressedDigest(want.BlobDigest)
		if err != nil {
			return fmt.Errorf("looking up a published layer: %w", err)
		}
		if len(got) != 1 || got[0].ID != want.ID || got[0].Parent != want.Parent || got[0].UncompressedDigest != want.DiffID {
			return fmt.Errorf("containers/storage reads a published layer as %+v, want %+v", got, want)
		}
	}
	if err := own.Withdraw(ctx, top.ID, base.ID); err != nil {
		return err
	}
	if _, err := reader.Layer(base.ID); !errors.Is(err, storage.ErrLayerUnknown) {
		return fmt.Errorf("containers/storage still knows a withdrawn layer: %w", err)
	}
	return nil
}

func probeLayer(parent, name, mounts string) Layer {
	diffID, blob := digest.FromString(name), digest.FromString(name+" blob")
	return Layer{
		ID: ChainID(parent, diffID), Parent: parent,
		BlobDigest: blob, BlobSize: 1,
		DiffID: diffID, DiffSize: 1, Compression: Gzip,
		MountDirectory: filepath.Join(mounts, erofs.Name(blob)),
	}
}
