// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/shape"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// Stand is a place to compare a normal start of the sample image with a lazy
// one: a registry behind a shaped line, and a Podman for each.
type Stand struct {
	Registry *testregistry.Server
	Ref      string // the sample image, through the line
	Daemon   *Daemon
	Normal   *Podman
	Lazy     *Podman

	line *shape.Proxy
	dir  string
}

// Start is one start of a container, from nothing to its first useful output.
type Start struct {
	Prepare  time.Duration `json:"prepare"` // nanoseconds, as all durations here
	Pull     time.Duration `json:"pull"`
	Run      time.Duration `json:"run"` // podman run until the ready line
	Total    time.Duration `json:"total"`
	Bytes    int64         `json:"bytes"`    // of layers and manifests, that the registry sent until then
	Requests int64         `json:"requests"` // to the registry until then
	Output   string        `json:"output"`   // of the program: must be the same for all
}

// NewStand sets up a stand in dir with an image; the daemon is not started yet.
func NewStand(dir, binary string, image testimage.Image, line shape.Line, settings string) (_ *Stand, err error) {
	s := &Stand{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close(context.Background()))
		}
	}()
	if s.Registry, err = testregistry.Start(testregistry.Options{}); err != nil {
		return nil, err
	}
	if _, err := image.PushTo(s.Registry, "demo", "latest"); err != nil {
		return nil, err
	}
	if s.line, err = shape.Start(s.Registry.Host(), line); err != nil {
		return nil, err
	}
	s.Ref = s.line.Addr() + "/demo:latest"
	insecure := []string{s.line.Addr(), s.Registry.Host()}
	lazyDir := filepath.Join(dir, "lazy")
	settings += fmt.Sprintf("trusted = [%q]\nregistries_conf = %q\nruntime_roots = [%q]\n",
		s.line.Addr(), filepath.Join(lazyDir, "registries.conf"), filepath.Join(lazyDir, "root"))
	if s.Daemon, err = NewDaemon(binary, filepath.Join(dir, "daemon"), settings); err != nil {
		return nil, err
	}
	if s.Normal, err = NewPodman(filepath.Join(dir, "normal"), PodmanOptions{Insecure: insecure}); err != nil {
		return nil, err
	}
	s.Lazy, err = NewPodman(lazyDir, PodmanOptions{ImageStore: s.Daemon.Store(), Insecure: insecure})
	return s, err
}

// Close ends and removes everything.
func (s *Stand) Close(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var err error
	for _, p := range []*Podman{s.Normal, s.Lazy} {
		if p != nil {
			err = errors.Join(err, p.Close(ctx))
		}
	}
	if s.Daemon != nil {
		err = errors.Join(err, s.Daemon.Close())
	}
	if s.line != nil {
		err = errors.Join(err, s.line.Close())
	}
	if s.Registry != nil {
		err = errors.Join(err, s.Registry.Close())
	}
	return errors.Join(err, RemoveAll(s.dir))
}

// StartNormal pulls and runs the image as it is done without us.
func (s *Stand) StartNormal(ctx context.Context) (Start, error) {
	return s.start(ctx, s.Normal, func(context.Context) error { return nil })
}

// StartLazy prepares, pulls and runs the image. The daemon runs.
func (s *Stand) StartLazy(ctx context.Context) (Start, error) {
	return s.start(ctx, s.Lazy, func(ctx context.Context) error {
		var res prepare.Result
		if _, err := s.Daemon.CLI(ctx, &res, "prepare", s.Ref); err != nil {
			return fmt.Errorf("%w\n%s", err, s.Daemon.logTail())
		}
		if res.Lazy() != len(res.Layers) {
			return fmt.Errorf("not all layers are lazy: %+v", res)
		}
		return nil
	})
}

func (s *Stand) start(ctx context.Context, p *Podman, prepareImage func(context.Context) error) (Start, error) {
	s.Registry.ResetCounts()
	begin := time.Now()
	var r Start
	if err := prepareImage(ctx); err != nil {
		return r, err
	}
	r.Prepare = time.Since(begin)
	if err := p.Pull(ctx, s.Ref); err != nil {
		return r, err
	}
	r.Pull = time.Since(begin) - r.Prepare
	ready := func() {
		r.Total = time.Since(begin)
		c := s.Registry.Counts()
		r.Bytes, r.Requests = c.BlobBytes, c.Total
	}
	var err error
	r.Run, r.Output, err = p.RunUntil(ctx, ReadyLine, ready, s.Ref)
	return r, err
}

// Rerun runs the image again, with everything that is local by now.
func (s *Stand) Rerun(ctx context.Context, p *Podman) (time.Duration, error) {
	took, _, err := p.RunUntil(ctx, ReadyLine, nil, s.Ref)
	return took, err
}

// Forget makes the next start of both a first one: no image, no cache.
func (s *Stand) Forget(ctx context.Context) error {
	if err := errors.Join(s.Normal.Reset(ctx), s.Lazy.Reset(ctx)); err != nil {
		return err
	}
	_, err := s.Daemon.CLI(ctx, nil, "remove", s.Ref)
	if err != nil && !strings.Contains(err.Error(), prepare.ErrUnknown.Error()) {
		return err
	}
	return DropPageCache()
}
