// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"
	"go.podman.io/storage"
)

// TestHide reads hidden records with containers/storage: by their ids they are
// there, with a digest and a size, and by their digests they are not.
func TestHide(t *testing.T) {
	s, layers := create(t), chain(t, 3)
	if err := s.Publish(t.Context(), layers); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	reader, err := storage.GetStore(storage.StoreOptions{
		GraphRoot: filepath.Join(dir, "root"), RunRoot: filepath.Join(dir, "run"), GraphDriverName: driverDir,
		GraphDriverOptions: []string{"overlay.imagestore=" + s.Root()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Shutdown(true) //nolint:errcheck // it goes away as a whole
	bad := layers[1]
	for range 2 { // the second changes nothing
		if err := s.Hide(t.Context(), bad.BlobDigest); err != nil {
			t.Fatal(err)
		}
	}
	for i, l := range layers {
		byBlob, errBlob := reader.LayersByCompressedDigest(l.BlobDigest)
		byDiff, errDiff := reader.LayersByUncompressedDigest(l.DiffID)
		if hidden := i == 1; hidden != (len(byBlob) == 0) || hidden != (len(byDiff) == 0) ||
			hidden != errors.Is(errBlob, storage.ErrLayerUnknown) || hidden != errors.Is(errDiff, storage.ErrLayerUnknown) {
			t.Errorf("layer %d is found by blob: %d (%v), by diff ID: %d (%v)", i, len(byBlob), errBlob, len(byDiff), errDiff)
		}
		got, err := reader.Layer(l.ID)
		if err != nil {
			t.Fatal(err)
		}
		if got.Parent != l.Parent || got.UncompressedDigest == "" || got.UncompressedSize != l.DiffSize {
			t.Errorf("layer %d: %+v", i, got)
		}
	}
	// What we know of it stays, and stays after a start.
	check := func() {
		t.Helper()
		got, err := s.Layers()
		if err != nil {
			t.Fatal(err)
		}
		want := layers
		want[1].Hidden = true
		if d := cmp.Diff(want, got, cmpopts.IgnoreFields(Layer{}, "MountDirectory")); d != "" {
			t.Error(d)
		}
	}
	check()
	mounts := map[digest.Digest]string{}
	for _, l := range layers {
		mounts[l.BlobDigest] = l.MountDirectory
	}
	broken, err := s.Recover(t.Context(), func(d digest.Digest) (string, bool) { m, ok := mounts[d]; return m, ok })
	if err != nil || len(broken) > 0 {
		t.Fatalf("broken: %v, %v", broken, err)
	}
	check()
	if err := s.Withdraw(t.Context(), layers[2].ID, layers[1].ID, layers[0].ID); err != nil {
		t.Error(err)
	}
}
