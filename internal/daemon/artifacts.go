// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/mount"
)

// newBlobs makes what the files of lazy artifacts are. Readers may come at once.
func (d *Daemon) newBlobs(e lazyblob.Exporter) (err error) {
	root := d.cfg.ArtifactPath()
	if _, err := os.Stat(root); d.cfg.ArtifactRoot != "" && err != nil {
		// Layers do not need it, and pods have other ways to their artifacts.
		root = filepath.Join(d.cfg.Root, "artifacts")
		d.log.Error("artifact_root has to be there already: files of artifacts go elsewhere until it is, and the daemon is restarted", "to", root, "err", err)
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return fmt.Errorf("creating directory for artifacts: %w", err)
	}
	if d.blobSpace, err = newSpace(root, d.cfg.ArtifactLimit, d.log); err != nil {
		return err
	}
	own := IndexConfig(d.cfg, nil, d.log)
	own.Look, own.Publish = nil, nil
	finder, err := indexes.New(own)
	if err != nil {
		return err
	}
	d.composeAgain = make(chan struct{}, 1)
	c := lazyblob.Config{
		Root: root, Mounts: filepath.Join(d.cfg.RunRoot, "blobs"), Exporter: e,
		Space: d.blobSpace, Scheduler: d.scheduler, Patience: time.Duration(d.cfg.ReadTimeout), Logger: d.log,
		Keep: finder.KeepChunks,
		Changed: func() {
			select {
			case d.composeAgain <- struct{}{}:
			default:
			}
		},
	}
	if !d.cfg.Fill.Off {
		c.Pay = d.filler.Pay
	}
	d.blobs, err = lazyblob.NewSet(c)
	return err
}

// newArtifacts makes what keeps the composed artifact store.
func (d *Daemon) newArtifacts(finder *indexes.Finder) (err error) {
	c := artifacts.Config{
		Dir: d.cfg.ArtifactStorePath(), State: filepath.Join(d.cfg.Root, "artifacts.json"), Names: d.cfg.Artifacts,
		Interval: time.Duration(d.cfg.ArtifactInterval), Sources: d.sources, Registries: d.cfg.Trusted,
		Indexes: finder, IndexTrust: d.cfg.Index.Trust, Blobs: d.blobs, Wake: d.composeAgain, Logger: d.log,
	}
	for _, s := range d.cfg.ArtifactStores {
		c.Stores = append(c.Stores, artifacts.Store{Path: s.Path, Verify: s.Verify, Filter: s.Filter.Artifacts()})
	}
	d.artifacts, err = artifacts.New(c)
	return err
}

// selinux is where the kernel shows that it has SELinux.
const selinux = "/sys/fs/selinux/enforce"

// blobMounter mounts blobs. Containers read them without overlayfs in between, and
// runtimes do not label what is read-only: so the mount has the label of what all
// containers may read.
func (d *Daemon) blobMounter() *mount.Mounter {
	m := *d.mounter
	if _, err := os.Stat(selinux); !errors.Is(err, fs.ErrNotExist) {
		m.Label = "system_u:object_r:container_ro_file_t:s0"
	}
	return &m
}

// Artifacts tells what the composed artifact store has, and from where.
func (d *Daemon) Artifacts() artifacts.All { return d.artifacts.Status() }

// PrepareArtifact offers an artifact that is in a registry.
func (d *Daemon) PrepareArtifact(ctx context.Context, req control.ArtifactRequest) error {
	ref, err := artifacts.Parse(req.Reference)
	if err != nil {
		return fmt.Errorf("%w: %w", control.ErrBadRequest, err)
	}
	var creds *registry.Credentials
	if c := req.Credentials; c != nil && *c != (control.Credentials{}) {
		creds = &registry.Credentials{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken}
	}
	if err := d.artifacts.Prepare(ctx, ref, creds); errors.Is(err, artifactstore.ErrImage) {
		return fmt.Errorf("%w; runtimes pull it lazily as it is, and holdfast prepare prepares it", err)
	} else if err != nil {
		return err
	}
	d.log.Info("prepared artifact", "artifact", ref.String())
	if !req.Wait {
		return nil
	}
	return d.artifacts.Fetch(ctx, ref)
}

// RemoveArtifacts lets go of artifacts that were prepared.
func (d *Daemon) RemoveArtifacts(ctx context.Context, names []string) error {
	full := make([]string, len(names))
	for i, n := range names {
		ref, err := artifacts.Parse(n)
		if err != nil {
			return fmt.Errorf("%w: %w", control.ErrBadRequest, err)
		}
		full[i] = ref.String()
	}
	return d.artifacts.Remove(ctx, full...)
}
