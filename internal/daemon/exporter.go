// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/fusedev"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/lazyblob"
	"github.com/holdfast/holdfast/internal/mount"
)

// exporter serves the devices of layers through FUSE.
type exporter struct {
	server  *fusedev.Server
	timeout time.Duration
}

func (e *exporter) Export(d digest.Digest, dev *device.Device) (string, error) {
	if err := e.server.Add(d, patient{dev, e.timeout}); err != nil {
		return "", fmt.Errorf("exporting device: %w", err)
	}
	return e.server.Path(d), nil
}

func (e *exporter) Withdraw(d digest.Digest) { e.server.Remove(d) }

// blobs serves the devices of blobs, which know themselves how long to wait.
type blobs struct{ server *fusedev.Server }

func (b blobs) Export(d digest.Digest, dev lazyblob.Device) error {
	if err := b.server.Add(d, dev); err != nil {
		return fmt.Errorf("exporting blob: %w", err)
	}
	return nil
}

func (b blobs) Path(d digest.Digest) string { return b.server.Path(d) }

func (b blobs) Withdraw(d digest.Digest) { b.server.Remove(d) }

// patient is a device whose readers wait for so long and no longer.
type patient struct {
	*device.Device
	timeout time.Duration
}

func (p patient) Wait(ctx context.Context, off int64, n int) (release func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, p.timeout, fmt.Errorf("no answer within %s", p.timeout))
	defer cancel()
	return p.Device.Wait(ctx, off, n)
}

// probeMounts finds out how layers can be mounted here.
func (d *Daemon) probeMounts(ctx context.Context, e *exporter) (*mount.Mounter, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	m, err := d.mounterFor(ctx, e)
	if err != nil {
		return nil, err
	}
	m.ReadAheadKB = int(d.cfg.ReadAhead >> 10)
	return m, nil
}

func (d *Daemon) mounterFor(ctx context.Context, e *exporter) (*mount.Mounter, error) {
	if d.cfg.Mount != "auto" {
		return mount.New(mount.Method(d.cfg.Mount), d.log), nil
	}
	name := digest.FromString("probe")
	if err := e.server.Add(name, zeros{}); err != nil {
		return nil, fmt.Errorf("probing mounts: %w", err)
	}
	defer e.server.Remove(name)
	return mount.Probe(ctx, d.cfg.Root, e.server.Path(name), d.log)
}

// zeros is a device to probe with.
type zeros struct{}

func (zeros) Size() int64                                      { return 16 * index.BlockSize }
func (zeros) Wait(context.Context, int64, int) (func(), error) { return func() {}, nil }
func (zeros) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}
