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

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/fusedev"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/prepare"
)

// Version is set when a release is built.
var Version = "devel"

// probeTimeout bounds what is tried on the kernel at the start.
const probeTimeout = 20 * time.Second

// Daemon is a running daemon; it is the control socket's service.
type Daemon struct {
	cfg      config.Config
	log      *slog.Logger
	started  time.Time
	mounter  *mount.Mounter
	layers   *layer.Set
	store    *imagestore.Store
	preparer *prepare.Preparer
	registry *registry.Client
	disabled error // why nothing is published
}

// Run runs a daemon until ctx ends. ready is called when it answers.
//
// It starts from the bottom up, using no network: directories and their lock,
// the FUSE mount, the probe of how to mount EROFS, all layers on disk, the
// records that lead to them, and then the control socket. It stops in the
// opposite order.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger, ready func()) (err error) {
	unlock, err := lockDirectories(cfg)
	if err != nil {
		return err
	}
	defer unlock()
	d := &Daemon{cfg: cfg, log: log, started: time.Now()}
	if d.store, err = imagestore.Create(cfg.StorePath(), filepath.Join(cfg.RunRoot, "records")); err != nil {
		return err
	}
	if d.disabled = imagestore.Probe(ctx, cfg.Root); d.disabled != nil {
		log.Error("publishing nothing: runtimes would not understand our records", "err", d.disabled)
	}

	fuseDir := filepath.Join(cfg.RunRoot, "devices")
	conn, err := mountFUSE(fuseDir)
	if err != nil {
		return err
	}
	server := fusedev.New(conn, log)
	// The server goes last: everything above it reads through it.
	serverCtx, stopServer := context.WithCancel(context.WithoutCancel(ctx))
	var serving errgroup.Group
	serving.Go(func() error { return server.Run(serverCtx) })
	defer func() {
		stopServer()
		err = errors.Join(err, serving.Wait(), conn.Unmount(), conn.Close())
	}()
	exports := &exporter{server: server, timeout: time.Duration(cfg.ReadTimeout)}
	if d.mounter, err = d.probeMounts(ctx, exports); err != nil {
		return err
	}
	log.Info("mounting layers", "method", d.mounter.String())

	d.layers, err = layer.NewSet(layer.Config{
		Root: filepath.Join(cfg.Root, "layers"), Mounts: filepath.Join(cfg.RunRoot, "layers"),
		Mounter: d.mounter, Exporter: exports,
		Scheduler: device.NewScheduler(cfg.MaxFetches), Logger: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.layers.Close()) }()
	if err := d.layers.Load(ctx); err != nil {
		return err
	}
	server.Ready()
	return d.serve(ctx, ready)
}

// serve publishes and answers until ctx ends.
func (d *Daemon) serve(ctx context.Context, ready func()) (err error) {
	d.registry = registry.New(d.registryConfig())
	defer d.registry.Close()
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	d.preparer, err = prepare.New(background, prepare.Config{
		Policy: prepare.Policy{
			Trusted: d.cfg.Trusted, Exclude: d.cfg.Exclude,
			TopLayerLimit: int64(d.cfg.TopLayerLimit),
			StallTimeout:  time.Duration(d.cfg.StallTimeout),
			RuntimeRoots:  d.cfg.RuntimeRoots,
		},
		Registry: d.registry, Layers: d.layers, Store: d.store,
		Images: filepath.Join(d.cfg.Root, "images"), Logger: d.log,
	})
	if err != nil {
		stop()
		return err
	}
	defer func() {
		stop()
		d.preparer.Wait()
		// The layers' mounts go next; the runtime's pulls must not find them.
		if err := d.preparer.Suspend(context.WithoutCancel(ctx)); err != nil {
			d.log.Warn("withdrawing records before the stop", "err", err)
		}
	}()
	if d.disabled == nil {
		if err := d.preparer.Restore(ctx); err != nil {
			return err
		}
	}
	listener, err := control.Listen(d.cfg.SocketPath())
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return control.Serve(ctx, listener, d, d.metrics(), d.log) })
	g.Go(func() error { return d.layers.Run(ctx) })
	d.log.Info("ready", "version", Version, "socket", d.cfg.SocketPath(), "store", d.store.Root(), "layers", len(d.layers.All()))
	ready()
	return g.Wait()
}

// mountFUSE mounts the device directory, in place of one that a daemon left
// that was killed.
func mountFUSE(dir string) (*fusedev.Conn, error) {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("unmounting %s: %w", dir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating device directory: %w", err)
	}
	return fusedev.Mount(dir)
}

// lockDirectories creates the daemon's directories and makes sure that no other
// daemon uses them.
func lockDirectories(cfg config.Config) (unlock func(), err error) {
	var files []*os.File
	unlock = func() {
		for _, f := range files {
			_ = f.Close()
		}
	}
	for _, dir := range []string{cfg.Root, cfg.RunRoot} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			unlock()
			return nil, fmt.Errorf("creating the daemon's directories: %w", err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			unlock()
			return nil, fmt.Errorf("closing the daemon's directories to others: %w", err)
		}
		f, err := os.OpenFile(filepath.Join(dir, "daemon.lock"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			unlock()
			return nil, fmt.Errorf("locking the daemon's directories: %w", err)
		}
		files = append(files, f)
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			unlock()
			return nil, fmt.Errorf("another daemon uses %s: stop it first (systemctl stop holdfast), or give this one directories of its own (root, runroot): %w", dir, err)
		}
	}
	return unlock, nil
}
