// SPDX-License-Identifier: Apache-2.0

// Package daemon wires the parts of Holdfast together and runs them: see [Run]
// for the order in which they start and stop.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/credentials"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/fill"
	"github.com/holdfast/holdfast/internal/fusedev"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/keeper"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/pins"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/rootsocket"
	"github.com/holdfast/holdfast/internal/sources"
)

// Version is set when a release is built.
var Version = "devel"

// probeTimeout bounds what is tried on the kernel at the start.
const probeTimeout = 20 * time.Second

// Daemon is a running daemon; it is the control socket's service.
type Daemon struct {
	cfg          config.Config
	log          *slog.Logger
	started      time.Time
	mounter      *mount.Mounter
	space        *cache.Space
	layers       *layer.Set
	blobSpace    *cache.Space
	blobs        *lazyblob.Set
	artifacts    *artifacts.Manager
	composeAgain chan struct{} // a lazy blob has changed
	store        *imagestore.Store
	preparer     *prepare.Preparer
	sources      *sources.Set
	registry     *registry.Client
	filler       *fill.Filler
	pinner       *pins.Pinner
	scheduler    *device.Scheduler
	disabled     error // why nothing is published
}

// Inherited is what a daemon has of its keeper.
type Inherited struct {
	// Device is the descriptor of the FUSE mount on [Devices]; Run takes it over.
	Device *os.File
	// Credentials is where those that pulls brought are kept: see package credentials.
	Credentials *os.File
	// Ready is called when the daemon answers.
	Ready func() error
}

// Devices is where the devices of layers are served.
func Devices(cfg config.Config) string { return filepath.Join(cfg.RunRoot, "devices") }

// Run runs a daemon, as the worker of a keeper, until ctx ends. The caller holds
// the lock on the directories: see [Lock].
//
// It starts with what others wait for: it opens the layers on disk and serves
// their devices, which is all that the mounts of an earlier worker need. Then
// come, still without a network, the probe of how to mount EROFS, the layers that
// are not mounted, the records that lead to them, and the control socket.
//
// It stops in the opposite order. If ctx ends with the cause
// [keeper.ErrHandOver], mounts and records stay as they are for the next worker,
// which the kernel asks what this one has not answered.
func Run(ctx context.Context, cfg config.Config, in Inherited, log *slog.Logger) (err error) {
	d := &Daemon{cfg: cfg, log: log, started: time.Now()}
	conn, err := fusedev.Adopt(in.Device, Devices(cfg))
	if err != nil {
		return err
	}
	server := fusedev.New(conn, log)
	exports := &exporter{server: server, timeout: time.Duration(cfg.ReadTimeout)}
	if d.space, err = newSpace(cfg.Root, cfg.CacheLimit, log); err != nil {
		return errors.Join(err, conn.Close())
	}
	d.scheduler = device.NewScheduler(cfg.MaxFetches)
	d.layers, err = layer.NewSet(layer.Config{
		Root: filepath.Join(cfg.Root, "layers"), Mounts: filepath.Join(cfg.RunRoot, "layers"),
		Exporter: exports, Space: d.space, Scheduler: d.scheduler, Patience: time.Duration(cfg.ReadTimeout), Logger: log,
	})
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	d.filler = fill.New(fill.Config{
		Layers: d.layers, Scheduler: d.scheduler, Rate: int64(cfg.Fill.Rate), Missing: cfg.Fill.Missing, Quarantined: d.quarantined, Logger: log,
	})
	if err = d.newBlobs(blobs{server}); err != nil {
		return errors.Join(err, conn.Close())
	}
	if err := server.Resend(); err != nil && !errors.Is(err, fusedev.ErrNoResend) {
		return errors.Join(err, conn.Close())
	}
	serverCtx, stopServer := context.WithCancel(context.WithoutCancel(ctx))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var serving errgroup.Group
	serving.Go(func() error {
		err := server.Run(serverCtx)
		if err == nil && serverCtx.Err() == nil {
			err = errors.New("the FUSE mount is gone")
		}
		cancel(errors.Join(keeper.ErrHandOver, err)) // another worker may do better
		return err
	})
	defer func() {
		d.layers.Flush() // while readers are still served: it takes time
		d.blobs.Flush()
		// Before the layers go: what readers ask for then is not refused, it waits
		// for the next server, or for the keeper to end the mount.
		stopServer()
		err = errors.Join(err, serving.Wait())
		if ending(ctx) {
			err = errors.Join(err, d.layers.Unmount(), d.blobs.Unmount())
		}
		err = errors.Join(err, d.layers.Close(), d.blobs.Close(), conn.Close())
	}()
	if err := errors.Join(d.layers.Open(ctx), d.blobs.Open(ctx)); err != nil {
		return unlessEnded(ctx, err)
	}
	err = d.prepare(ctx, in.Credentials, func(p *prepare.Preparer) error {
		p.RestoreSources()
		d.artifacts.RestoreSources()
		if err := d.layers.Export(); err != nil {
			return err
		}
		server.Ready()
		if err := d.mount(ctx, exports); err != nil {
			return err
		}
		return d.serve(ctx, in.Ready)
	})
	return unlessEnded(ctx, err)
}

// unlessEnded drops an error that says no more than that ctx has ended.
func unlessEnded(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(ctx))) {
		return nil
	}
	return err
}

// ending reports whether the daemon is to stop for good. Otherwise another worker
// will go on, also after an error.
func ending(ctx context.Context) bool {
	return ctx.Err() != nil && !errors.Is(context.Cause(ctx), keeper.ErrHandOver)
}

// prepare makes what prepares images, for as long as run takes.
func (d *Daemon) prepare(ctx context.Context, keptIn *os.File, run func(*prepare.Preparer) error) (err error) {
	if d.store, err = imagestore.Create(d.cfg.StorePath(), filepath.Join(d.cfg.RunRoot, "records")); err != nil {
		return err
	}
	kept, err := credentials.OpenKept(keptIn)
	if err != nil {
		return err
	}
	d.registry = registry.New(RegistryConfig(d.cfg, d.log))
	defer d.registry.Close()
	finder, err := indexes.New(IndexConfig(d.cfg, d.registry, d.log))
	if err != nil {
		return err
	}
	if d.cfg.Offline {
		finder = finder.Offline()
	}
	d.sources = sources.New(d.sourcesConfig())
	if d.pinner, err = d.newPinner(); err != nil {
		return err
	}
	if err := d.newArtifacts(finder); err != nil {
		return err
	}
	profiles, err := d.profiles()
	if err != nil {
		return err
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	d.preparer, err = prepare.New(background, prepare.Config{
		Policy: prepare.Policy{
			Trusted: d.cfg.Trusted, Include: d.cfg.Include, Exclude: d.cfg.Exclude,
			TopLayerLimit: int64(d.cfg.TopLayerLimit),
			StallTimeout:  time.Duration(d.cfg.StallTimeout),
			IndexTrust:    d.cfg.Index.Trust,
			Build:         d.cfg.Index.Build,
			RuntimeRoots:  d.cfg.RuntimeRoots,
			Grace:         time.Duration(d.cfg.GCGrace),
		},
		Sources: d.sources, Pinned: d.pinner.Has, Registry: d.registry, Layers: d.layers, Store: d.store, Kept: kept, Indexes: finder,
		Images: filepath.Join(d.cfg.Root, "images"), Profiles: profiles, Logger: d.log,
	})
	if err != nil {
		return err
	}
	defer func() {
		stop()
		d.preparer.Wait()
		if !ending(ctx) {
			return
		}
		// The layers' mounts go next; the runtime's pulls must not find them.
		if err := d.preparer.Suspend(context.WithoutCancel(ctx)); err != nil {
			d.log.Warn("withdrawing records before the stop", "err", err)
		}
		if err := d.artifacts.Suspend(context.WithoutCancel(ctx)); err != nil {
			d.log.Warn("withdrawing lazy artifacts before the stop", "err", err)
		}
	}()
	return run(d.preparer)
}

// mount mounts what is not mounted yet.
func (d *Daemon) mount(ctx context.Context, exports *exporter) (err error) {
	if d.mounter, err = d.probeMounts(ctx, exports); err != nil {
		return err
	}
	d.log.Info("mounting layers", "method", d.mounter.String())
	if err := d.layers.Mount(ctx, d.mounter); err != nil {
		return err
	}
	if err := d.blobs.Mount(ctx, d.blobMounter()); err != nil {
		return err
	}
	if d.disabled = imagestore.Probe(ctx, d.cfg.Root); d.disabled != nil {
		d.log.Error("publishing nothing: runtimes would not understand our records", "err", d.disabled)
	}
	return nil
}

// serve restores records, publishes and answers until ctx ends.
func (d *Daemon) serve(ctx context.Context, ready func() error) error {
	if d.disabled == nil {
		if err := d.preparer.Restore(ctx); err != nil {
			return err
		}
	}
	if err := d.artifacts.Start(ctx); err != nil {
		d.log.Error("composing the artifact store", "err", err) // images do not need it
	}
	listener, err := rootsocket.Listen(d.cfg.SocketPath())
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return control.Serve(gctx, listener, d, d.metrics(), d.log) })
	g.Go(func() error { return d.layers.Run(gctx) })
	g.Go(func() error { return d.space.Run(gctx) })
	g.Go(func() error { return d.blobs.Run(gctx) })
	g.Go(func() error { return d.blobSpace.Run(gctx) })
	g.Go(func() error { return d.artifacts.Run(gctx) })
	g.Go(func() error { return d.preparer.Run(gctx, d.inUse) })
	g.Go(func() error { return d.filler.Run(gctx) })
	g.Go(func() error { return d.pinner.Run(gctx) })
	g.Go(func() error { return d.serveAttached(gctx) })
	d.log.Info("ready", "version", Version, "socket", d.cfg.SocketPath(), "store", d.store.Root(), "layers", len(d.layers.All()))
	return errors.Join(ready(), g.Wait())
}

// inUse has the layers of images filled that a runtime refers to.
func (d *Daemon) inUse(images []prepare.Image) {
	if d.cfg.Fill.Off {
		return
	}
	var layers []digest.Digest
	for _, img := range images {
		for _, l := range img.Layers {
			if l.Action != prepare.Left {
				layers = append(layers, l.Digest)
			}
		}
	}
	d.filler.Want(layers)
}

// quarantined takes a bad layer out of the runtimes' sight.
func (d *Daemon) quarantined(ctx context.Context, l *layer.Layer) {
	if err := d.preparer.Quarantine(ctx, l); err != nil {
		d.log.Error("hiding a layer in quarantine", "layer", l.Digest.String(), "err", err)
	}
}

// newSpace returns the disk space that layers, or blobs, share below a directory.
func newSpace(dir string, limit config.Share, log *slog.Logger) (*cache.Space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, fmt.Errorf("measuring the file system of %s: %w", dir, err)
	}
	return cache.NewSpace(limit.Of(int64(st.Blocks)*st.Bsize), log), nil //nolint:gosec // disks are smaller
}
